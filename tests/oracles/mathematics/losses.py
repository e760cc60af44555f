"""Every loss once more, from its definition: one step, float64, loops, sorting and bisection; no torch.

z: drafter logits, p: target probabilities, lists over the vocabulary. `merge` is the head-and-bucket view.
"""

import math

import numpy as np


def softmax(z):
    z = np.asarray(z, dtype=np.float64)
    e = np.exp(z - z.max())
    return e / e.sum()


def order(p):
    """Token ids, most probable first, lowest id first at ties."""
    return sorted(range(len(p)), key=lambda j: (-p[j], j))


def merge(x, ids):
    """Probabilities of the ids, and of all others together; nothing to add when there are no others."""
    rest = [x[j] for j in range(len(x)) if j not in set(ids)]
    kept = [x[j] for j in ids]
    return kept + [math.fsum(rest)] if rest else kept


def kl(p, q):
    return math.fsum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True) if a > 0)


def reverse_kl(p, q):
    return kl(q, p)


def jensen_shannon(p, q, beta):
    m = [beta * a + (1 - beta) * b for a, b in zip(p, q, strict=True)]
    return beta * kl(p, m) + (1 - beta) * kl(q, m)


def overlap(p, q):
    return math.fsum(min(a, b) for a, b in zip(p, q, strict=True))


def renyi_half(p, q):
    return -2 * math.log(math.fsum(math.sqrt(a * b) for a, b in zip(p, q, strict=True)))


def top_k_ce(p, q, k):
    return -math.fsum(p[j] * math.log(q[j]) for j in order(p)[:k])


def reach(accept, beyond=0.0, focal=0.0):
    """Weight of each draft of a path from the chances of acceptance along it."""
    weights, before = [], 1.0
    for a in accept:
        weights.append(before + beyond * (1 - before) + focal * before * (1 - a))
        before *= a
    return weights


def end_to_end_tv(accept):
    products = [math.prod(accept[: d + 1]) for d in range(len(accept))]
    return 1 - math.fsum(products) / len(accept)


def total_variation(p, q):
    return 0.5 * math.fsum(abs(a - b) for a, b in zip(p, q, strict=True))


def lk_alpha(p, q):
    return -math.log(overlap(p, q))


def lk_hybrid(p, q, eta):
    mix = math.exp(-eta * overlap(p, q))
    return mix * kl(p, q) + (1 - mix) * total_variation(p, q)


def renormalised_kl(p, q, ids):
    pk, qk = [p[j] for j in ids], [q[j] for j in ids]
    return kl([a / sum(pk) for a in pk], [b / sum(qk) for b in qk])


def discounted_ce(z, g, weight):
    """log(e^{z_g} + Σ_{j≠g} w_j e^{z_j}) − z_g."""
    top = max(z)
    total = math.fsum((1.0 if j == g else weight[j]) * math.exp(z[j] - top) for j in range(len(z)))
    return math.log(total) - (z[g] - top)


def margin_weights(p, k, a, floor):
    g, *others = order(p)[:k]
    weight = [1.0] * len(p)
    for j in others:
        weight[j] = max(floor, 1 - (p[j] / p[g]) ** a)
    return weight


def pool_level(p_g, competitors):
    """The level c with (p_g − c)₊ = Σ (c − p_t)₊ over the competitors, by bisection."""
    low, high = 0.0, p_g
    for _ in range(200):
        c = 0.5 * (low + high)
        low, high = (c, high) if p_g - c > math.fsum(max(c - t, 0.0) for t in competitors) else (low, c)
    return 0.5 * (low + high)


def pool_weights(p, k, m, floor):
    ranks = order(p)
    c = pool_level(p[ranks[0]], [p[j] for j in ranks[1 : m + 1]])
    weight = [1.0] * len(p)
    for j in ranks[1:k]:
        weight[j] = max(floor, 1 - p[j] / c)
    return weight


def runner_up_weights(p, m):
    weight = [1.0] * len(p)
    for j in order(p)[1:m]:
        weight[j] = 0.0
    return weight


def missed(z, g, m):
    """Is g outside the drafter's top-m, ties counted against it?"""
    return sum(z[j] >= z[g] for j in range(len(z)) if j != g) >= m


def radius(p_g, competitors):
    """Σ_S p log(p/c) over the pool: g and the competitors below the level."""
    c = pool_level(p_g, competitors)
    return math.fsum(x * math.log(x / c) for x in [p_g, *(t for t in competitors if 0 < t < c)])


def coarse_radius(p, k, m):
    """Least radius over how many of the m competitors hide in the tail, the tail being equal tokens."""
    kept = [p[j] for j in order(p)[:k]]
    tail, hidden = 1 - math.fsum(kept), len(p) - k
    values = [radius(kept[0], kept[1 : m + 1])]
    for n in range(1, min(m, hidden) + 1):
        values.append(radius(kept[0], kept[1 : m + 1 - n] + [tail / n] * n))
    return max(min(values), 0.0)


def prefix_weights(accept, smoothing=0.0):
    s = [(1 - smoothing) * a + smoothing for a in accept]
    return [sum(math.prod(s[: k + 1]) for k in range(i, len(s))) for i in range(len(s))]


def best_first_tree(q_by_prefix, budget, depth):
    """Paths of the `budget` most probable nodes; q_by_prefix(prefix) is the next-token distribution."""
    level, nodes = [((), 1.0)], []
    for _ in range(depth):
        level = [
            ((*prefix, j), w * x) for prefix, w in level for j, x in enumerate(q_by_prefix(prefix)) if x > 0
        ]
        nodes += level
    nodes.sort(key=lambda node: -node[1])
    return {prefix for prefix, _ in nodes[:budget]}
