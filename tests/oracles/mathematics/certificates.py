"""Acceptance certificates from their definitions: sets by loops, radii by a solver or in 50 digits."""

import itertools
import math
import warnings

import mpmath
import numpy as np

from certdraft.certificates import Additive, Coverage, Multiplicative, StrictGreedy, TopM, Typical

mpmath.mp.dps = 50


def accepted_set(p, rule):
    """Ids the rule accepts at target p, a list of floats."""
    greedy = max(range(len(p)), key=lambda i: (p[i], -i))
    ranked = sorted(p, reverse=True)
    if isinstance(rule, (StrictGreedy, Coverage)):
        threshold = p[greedy]
    elif isinstance(rule, Additive):
        threshold = p[greedy] - rule.t
    elif isinstance(rule, Multiplicative):
        threshold = rule.alpha * p[greedy]
    elif isinstance(rule, TopM):
        threshold = p[greedy] - rule.t if rule.t is not None else rule.alpha * p[greedy]
        if rule.m <= len(p):
            threshold = max(threshold, ranked[rule.m - 1])
    elif isinstance(rule, Typical):
        entropy = -sum(x * math.log(x) for x in p if x > 0)
        threshold = min(rule.epsilon, rule.delta * math.exp(-entropy))
    return {i for i in range(len(p)) if i == greedy or p[i] > threshold}


def width(rule):
    """How many rejected tokens must overtake the accepted ones for a failure."""
    return rule.m if isinstance(rule, Coverage) else 1


def solver_radius(p, accepted, m, direction):
    """Least divergence over all q in which some m rejected tokens are level with every accepted one."""
    import cvxpy as cp

    rejected = [i for i in range(len(p)) if i not in accepted]
    if len(rejected) < m:
        return math.inf
    best = math.inf
    for failing in itertools.combinations(rejected, m):
        q, level = cp.Variable(len(p)), cp.Variable()
        target = np.asarray(p)
        value = cp.sum(cp.kl_div(target, q) if direction == "forward" else cp.kl_div(q, target))
        limits = [q >= 0, cp.sum(q) == 1]
        limits += [q[i] <= level for i in accepted] + [q[i] >= level for i in failing]
        problem = cp.Problem(cp.Minimize(value), limits)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the solver's remark that 1e-12 is ambitious
            problem.solve(solver=cp.CLARABEL, tol_gap_abs=1e-12, tol_gap_rel=1e-12, tol_feas=1e-12)
        best = min(best, float(problem.value))
    return best


def exact_radius(p, accepted, m, direction):
    """The same in 50 digits: the water level by bisection, the m most probable rejected tokens overtaking.

    Floats are taken as they are and rescaled to sum to 1.
    """
    total = mpmath.fsum(p)
    p = [mpmath.mpf(x) / total for x in p]
    rejected = sorted((p[i] for i in range(len(p)) if i not in accepted), reverse=True)
    if len(rejected) < m:
        return math.inf
    high, low = [p[i] for i in accepted], rejected[:m]
    if max(high) <= min(low):
        return 0.0
    if (
        direction == "reverse" and min(low) == 0
    ):  # level with an impossible token: the accepted ones must vanish
        left = 1 - mpmath.fsum(high)
        return float(-mpmath.log(left)) if left > 1e-30 else math.inf
    u = (lambda x: x) if direction == "forward" else mpmath.log
    bottom, top = u(min(low)), u(max(high))
    for _ in range(200):
        middle = (bottom + top) / 2
        over = mpmath.fsum(max(u(a) - middle, 0) for a in high if a > 0)
        under = mpmath.fsum(max(middle - u(t), 0) for t in low)
        bottom, top = (middle, top) if over > under else (bottom, middle)
    pool = [a for a in high if a > 0 and u(a) > middle] + [t for t in low if u(t) < middle]
    if direction == "forward":
        return float(mpmath.fsum(x * mpmath.log(x / middle) for x in pool if x > 0))
    common = mpmath.exp(middle)
    return float(-mpmath.log(1 - mpmath.fsum(pool) + len(pool) * common))


def large_radius(p, accepted, direction):
    """The radius of a single-token rule for thousands of tokens: sorted prefixes, extended precision."""
    p = np.asarray(p, dtype=np.longdouble)
    p = p / p.sum()
    inside = np.zeros(len(p), dtype=bool)
    inside[list(accepted)] = True
    if inside.all():
        return math.inf
    high, best = np.sort(p[inside])[::-1], p[~inside].max()
    u = (lambda x: x) if direction == "forward" else np.log
    means = (u(best) + np.cumsum(u(high))) / np.arange(2, len(high) + 2)
    k = int(np.argmax(means))
    pool = np.append(high[: k + 1], best)
    if direction == "forward":
        return float(np.sum(pool * np.log(pool / means[k])))
    return float(-np.log(1 - pool.sum() + len(pool) * np.exp(means[k])))


def run_lengths(radii, epsilon, cap):
    """Certified steps in a row from each step, one by one."""
    runs = []
    for start in range(len(radii)):
        n = 0
        while n < cap and start + n < len(radii) and radii[start + n] > epsilon:
            n += 1
        runs.append(n)
    return runs


def budget_radius(p, threshold):
    """Least Σ KL(p_i‖x_i) over binary x with Π x_i ≤ threshold, two steps at most, by a fine scan."""

    def binary(a, x):
        first = a * math.log(a / x)
        return first + ((1 - a) * math.log((1 - a) / (1 - x)) if a < 1 else 0.0)

    if math.prod(p) <= threshold:
        return 0.0
    if len(p) == 1:
        return binary(p[0], threshold)
    scan = np.linspace(threshold / p[1], p[0], 200_001)[1:-1]
    return min(binary(p[0], x) + binary(p[1], threshold / x) for x in scan)
