"""Stop rules and CostAware: E1 (optimal stopping), E3 (limits), E4 (throughput), plain rounds."""

import math
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles.models.decoding_models import MarginalDrafter, TableDrafter, TableTarget, random_distribution

from certdraft.decoding import BestFirst, CostAware, CostModel, RealClock, SampleMatch, decode
from certdraft.decoding.cost.cost_aware import take_lambda, take_ratio, take_safe
from certdraft.decoding.draft_session import DraftSession
from certdraft.decoding.trees.tree import Node


def stream(masses: list[float]) -> list[Node]:
    """Nodes of given masses; the rules look at nothing else."""
    return [Node(math.log(m), (rank,), rank, 0) for rank, m in enumerate(masses)]


def thetas(masses: list[float], spent: float, verify: list[float]) -> list[float]:
    """Tokens per second of a round for every tree size, by definition."""
    phi = [0.0, *accumulate(masses)]
    return [(1 + phi[n]) / (spent + verify[n]) for n in range(min(len(phi), len(verify)))]


masses = st.lists(st.integers(1, 1000), min_size=1, max_size=60).map(
    lambda ws: sorted((w / 1000 for w in ws), reverse=True)
)
steps = st.lists(st.integers(0, 30), min_size=60, max_size=60)
spent = st.integers(0, 200).map(lambda s: s / 10)


# E1


@given(masses, steps, spent, st.booleans())
def test_ratio_finds_the_best_size_on_convex_curves(ms, slopes, draft_s: float, flat: bool) -> None:
    slopes = sorted(slopes)
    if flat:
        slopes[:20] = [0] * 20
    verify = list(accumulate((s / 10 for s in slopes), initial=5.0))
    values = thetas(ms, draft_s, verify)
    assert values[len(take_ratio(stream(ms), draft_s, verify))] == pytest.approx(max(values), rel=1e-12)


@given(masses, steps, spent, st.integers(0, 40), st.integers(1, 40))
def test_a_jump_before_the_first_node_hides_nothing(ms, slopes, draft_s: float, jump: int, rate: int) -> None:
    """One slot is a vector product, cheaper than two by more than a slot: convex from n = 1 on only."""
    verify = [5.0, *accumulate((s / 10 for s in sorted(slopes)), initial=5.0 + jump / 10)]
    values = thetas(ms, draft_s, verify)
    assert values[len(take_ratio(stream(ms), draft_s, verify))] == pytest.approx(max(values), rel=1e-12)
    gain = [sum(ms[:n]) - rate / 20 * verify[n] for n in range(min(len(ms) + 1, len(verify)))]
    assert gain[len(take_lambda(stream(ms), rate / 20, verify))] == pytest.approx(max(gain), abs=1e-9)


@given(masses, steps, spent)
def test_safe_finds_the_best_size_on_every_non_decreasing_curve(ms, slopes, draft_s: float) -> None:
    verify = list(accumulate((s / 10 for s in slopes), initial=5.0))
    values = thetas(ms, draft_s, verify)
    size = len(take_safe(stream(ms), draft_s, verify, max_depth=math.ceil(sum(ms))))
    assert values[size] == pytest.approx(max(values), rel=1e-12)


def test_ratio_misses_the_optimum_on_a_staircase_and_safe_does_not() -> None:
    """A GPU pays per block of 16 slots: the node that opens a block never pays for itself, its block does."""
    verify = [1.0 + 0.5 * math.ceil(n / 16) for n in range(33)]
    ms = [0.9 * 0.95**k for k in range(32)]
    values = thetas(ms, 1.0, verify)
    greedy, safe = len(take_ratio(stream(ms), 1.0, verify)), len(take_safe(stream(ms), 1.0, verify, 32))
    assert safe == int(np.argmax(values))
    assert values[safe] > 1.05 * values[greedy]


@given(masses, steps, st.integers(1, 100))
def test_lambda_maximises_tokens_minus_priced_seconds(ms, slopes, rate: int) -> None:
    verify = list(accumulate((s / 1000 for s in sorted(slopes)), initial=0.05))
    gain = [sum(ms[:n]) - rate * verify[n] for n in range(min(len(ms) + 1, len(verify)))]
    assert gain[len(take_lambda(stream(ms), rate, verify))] == pytest.approx(max(gain), abs=1e-9)


# E3

CONFIDENT = [[0.97, 0.01, 0.01, 0.01]] * 6
UNSURE = [[0.25, 0.25, 0.25, 0.25]] * 6
MIXED = [[0.6, 0.2, 0.15, 0.05]] * 6


def size(table, model: CostModel, **options) -> int:
    """Nodes of the first tree."""
    drafter = MarginalDrafter(lambda prefix: table, 4)
    builder = CostAware(model, **{"stop": "ratio", "budget": 200, "max_depth": 6} | options)
    return builder.build(DraftSession(drafter, [1], RealClock()), 0, max_depth=99).num_nodes


def affine(slope: float, base: float = 1.0, draft_s: float = 0.5, nodes: int = 201) -> CostModel:
    return CostModel.table([base + slope * n for n in range(nodes)], draft_s)


@pytest.mark.parametrize("stop", ["ratio", "safe", "lambda", "fixed"])
def test_free_verification_fills_the_budget(stop: str) -> None:
    assert size(MIXED, affine(0.0), stop=stop) == 200


@pytest.mark.parametrize("stop", ["ratio", "safe", "lambda"])
def test_dear_verification_drafts_nothing(stop: str) -> None:
    assert size(MIXED, affine(5.0), stop=stop) == 0


@pytest.mark.parametrize("stop", ["ratio", "safe"])
def test_a_dearer_drafter_gets_a_larger_tree(stop: str) -> None:
    sizes = [size(MIXED, affine(0.05, draft_s=d), stop=stop) for d in (0.0, 0.5, 2.0, 8.0, 50.0)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


@pytest.mark.parametrize("stop", ["ratio", "safe", "lambda"])
def test_steeper_verification_gets_a_smaller_tree(stop: str) -> None:
    sizes = [size(MIXED, affine(s), stop=stop) for s in (0.001, 0.01, 0.05, 0.2, 1.0)]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] > sizes[-1]


def test_a_sure_drafter_gets_its_chain_and_an_unsure_one_nothing() -> None:
    """The budget is not monotone in confidence."""
    drafter = MarginalDrafter(lambda prefix: CONFIDENT, 4)
    tree = CostAware(affine(0.1), "ratio", max_depth=6).build(
        DraftSession(drafter, [1], RealClock()), 0, max_depth=99
    )
    assert tree.is_chain
    assert tree.num_nodes == 6
    assert size(UNSURE, affine(0.4)) == 0
    assert size(MIXED, affine(0.03)) > 6


def test_fixed_is_best_first() -> None:
    for drafter in (MarginalDrafter(lambda p: MIXED, 4), TableDrafter(random_distribution(4, 5), 4)):
        session = DraftSession(drafter, [1], RealClock())
        fixed = CostAware(affine(9.0), "fixed", budget=11, max_depth=3).build(session, 0, max_depth=99)
        session.abandon()
        assert fixed == BestFirst(11, max_depth=3).build(session, 0, max_depth=99)


# E4: drafter's own world: throughput of a rule over hard and easy rounds, computed exactly


def q_world(rounds: int, seed: int) -> list[list[float]]:
    """Node masses, descending, of rounds that range from unsure to nearly certain."""
    rng = np.random.default_rng(seed)
    table = []
    for _ in range(rounds):
        marginals = [rng.dirichlet(np.full(8, rng.choice([0.03, 0.2, 1.5]))) for _ in range(5)]
        ms = [1.0]
        every = []
        for marginal in marginals:
            ms = [m * p for m in ms for p in marginal if m * p > 1e-4]
            every += ms
        table.append(sorted(every, reverse=True)[:64])
    return table


@pytest.mark.parametrize("slope", [0.01, 0.05, 0.2])
def test_lambda_beats_ratio_and_every_fixed_budget_in_the_long_run(slope: float) -> None:
    """The fixed point of the rate maximises sum(1 + Phi) / sum(C); ratio maximises each round by itself."""
    world, draft_s, verify = q_world(80, 0), 0.5, [1.0 + slope * n for n in range(65)]

    def throughput(sizes: list[int]) -> float:
        tokens = sum(1 + sum(ms[:n]) for ms, n in zip(world, sizes, strict=True))
        return tokens / sum(draft_s + verify[n] for n in sizes)

    fixed = [throughput([min(n, len(ms)) for ms in world]) for n in range(65)]
    ratio = throughput([len(take_ratio(stream(ms), draft_s, verify)) for ms in world])
    rate = 0.0
    for _ in range(20):  # Dinkelbach
        rate = throughput([len(take_lambda(stream(ms), rate, verify)) for ms in world])
    assert rate >= ratio - 1e-12
    assert rate >= max(fixed) - 1e-12
    assert rate > 1.002 * ratio  # and the difference is not a rounding error


def test_the_learned_rate_is_the_achieved_throughput() -> None:
    distribution = random_distribution(8, 3, 3.0)
    drafter, target = TableDrafter(distribution, 8), TableTarget(distribution, 8)
    model = affine(0.02, draft_s=0.1, nodes=33)
    builder = CostAware(model, "lambda", budget=32, max_depth=4, decay=1.0)
    result = decode(target, drafter, [1], builder, max_new_tokens=60)
    seconds = sum(model.verify_s(r.nodes, 0) for r in result.rounds) + 0.1 * len(drafter.passes)
    assert builder._rate(1.0) == pytest.approx(60 / seconds)


# conditional drafters


def passes(model: CostModel, sharpness: float = 4.0, **options) -> list[int]:
    drafter = TableDrafter(random_distribution(6, 1, sharpness), 6)
    builder = CostAware(model, **{"stop": "ratio", "budget": 64, "max_depth": 8} | options)
    builder.build(DraftSession(drafter, [1], RealClock()), 0, max_depth=99)
    return drafter.passes


@pytest.mark.parametrize("stop", ["ratio", "safe", "lambda"])
def test_drafter_passes_are_bought_only_while_they_pay(stop: str) -> None:
    counts = [len(passes(affine(0.01, draft_s=d), stop=stop)) for d in (0.001, 0.3, 5.0)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 4
    assert counts[-1] == 1


def test_an_unsure_drafter_is_not_asked_again() -> None:
    assert len(passes(affine(0.05, draft_s=0.1), sharpness=0.0)) == 1


def test_the_cut_of_what_is_known_is_best_first() -> None:
    table = random_distribution(6, 1, 3.0)
    builder = CostAware(affine(0.01, draft_s=0.01), "ratio", budget=64, max_depth=3)
    session = DraftSession(TableDrafter(table, 6), [1], RealClock())
    tree = builder.build(session, 0, max_depth=99)
    session.abandon()
    exact = BestFirst(tree.num_nodes, max_depth=3).build(session, 0, max_depth=99)
    assert tree.num_nodes > 6
    assert tree.tokens == exact.tokens


@pytest.mark.parametrize("stop", ["ratio", "safe", "lambda"])
def test_a_full_budget_does_not_stop_the_drafter(stop: str) -> None:
    """The root's children alone fill the budget; deeper nodes displace the least probable of them."""
    drafter = TableDrafter(random_distribution(32, 1, 3.0), 32)
    session = DraftSession(drafter, [1], RealClock())
    free = affine(0.0, draft_s=1e-6)
    tree = CostAware(free, stop, budget=8, max_depth=5, temperature=1.0).build(session, 0, max_depth=99)
    session.abandon()
    best = BestFirst(8, max_depth=5).build(session, 0, max_depth=99)
    assert max(best.depths) > 1
    assert tree.tokens == best.tokens


@pytest.mark.parametrize("stop", ["ratio", "safe", "lambda"])
def test_a_node_that_would_displace_a_better_one_is_not_read(stop: str) -> None:
    """Five of six equal children fill the budget: theirs are six times less probable, however cheap."""
    assert len(passes(affine(0.0, draft_s=1e-6), sharpness=0.0, stop=stop, budget=5, temperature=1.0)) == 1


# calibration


def test_the_learned_temperature_makes_promises_come_true() -> None:
    """The drafter is the target with logits halved: right about the order, and too modest."""
    sharp = random_distribution(8, 3, 4.0)

    def modest(prefix: tuple[int, ...]) -> list[float]:
        roots = [p**0.5 for p in sharp(prefix)]
        return [root / sum(roots) for root in roots]

    def gap(temperature: float | None) -> tuple[float, float]:
        """Mean accepted minus mean expected over the second half of a sampled text, and tau."""
        builder = CostAware(affine(0.02, draft_s=0.05), max_depth=4, temperature=temperature)
        accept = SampleMatch(1.0, torch.Generator().manual_seed(0))
        target, drafter = TableTarget(sharp, 8), TableDrafter(modest, 8)
        result = decode(target, drafter, [1], builder, accept, max_new_tokens=1200)
        late = result.rounds[len(result.rounds) // 2 :]
        return sum(r.accepted - r.expected for r in late) / len(late), builder._learned

    assert gap(1.0)[0] > 0.3
    assert abs(gap(None)[0]) < 0.12
    assert gap(None)[1] == pytest.approx(0.5, abs=0.15)


# plain rounds


def disjoint(prefix: tuple[int, ...]) -> list[float]:
    """Sure of a token the target never says."""
    return [0.0, 0.0, 0.0, 1.0]


def useful(prefix: tuple[int, ...]) -> list[float]:
    return [1.0, 0.0, 0.0, 0.0]


def test_a_useless_drafter_is_left_alone_but_probed() -> None:
    target = TableTarget(lambda p: [0.7, 0.1, 0.1, 0.1], 4)
    drafter = TableDrafter(disjoint, 4)
    builder = CostAware(affine(0.05), "lambda", max_depth=2, probe=10)
    result = decode(target, drafter, [1], builder, max_new_tokens=100)
    drafted = [r.nodes > 0 for r in result.rounds]
    assert result.tokens == [0] * 100
    assert all(drafted[:8])
    assert sum(drafted[8:]) == pytest.approx(len(drafted[8:]) / 10, abs=1)


def test_a_drafter_that_recovers_is_used_again() -> None:
    target = TableTarget(lambda p: [0.7, 0.1, 0.1, 0.1], 4)
    drafter = TableDrafter(lambda p: disjoint(p) if len(p) < 60 else useful(p), 4)
    builder = CostAware(affine(0.05), "lambda", max_depth=4, probe=4)
    result = decode(target, drafter, [1], builder, max_new_tokens=300)
    assert [r.nodes for r in result.rounds].count(0) > 20
    assert all(r.nodes == 4 for r in result.rounds[-20:-1])


def test_fixed_and_probe_1_always_draft() -> None:
    target = TableTarget(lambda p: [0.7, 0.1, 0.1, 0.1], 4)
    for options in ({"stop": "fixed", "budget": 3}, {"stop": "safe", "probe": 1}):
        drafter = TableDrafter(disjoint, 4)
        result = decode(target, drafter, [1], CostAware(affine(0.05), **options), max_new_tokens=40)
        assert all(r.nodes for r in result.rounds[:-1])


def test_reset_forgets() -> None:
    drafter, target = TableDrafter(useful, 4), TableTarget(useful, 4)
    builder = CostAware(affine(0.05), "lambda")
    first = decode(target, drafter, [1], builder, max_new_tokens=40)
    builder.reset()
    second = decode(target, drafter, [1], builder, max_new_tokens=40)
    assert [r.nodes for r in first.rounds] == [r.nodes for r in second.rounds]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": "best"}, "ratio, lambda"),
        ({"rate": 0.0}, "rate"),
        ({"decay": 0.0}, "decay"),
        ({"probe": 0}, "probe"),
    ],
)
def test_impossible_options_are_refused(options, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CostAware(affine(0.1), **options)


# trials: a drafter too modest to be used by its own word


def flattened(distribution, temperature: float):
    def flat(prefix):
        logits = torch.tensor(distribution(prefix)).log() / temperature
        return logits.softmax(-1).tolist()

    return flat


@pytest.mark.parametrize("stop", ["lambda", "ratio", "safe"])
def test_a_modest_drafter_is_found_to_be_right(stop: str) -> None:
    """Right at every step, and never sure of it: by its own word no draft token pays."""
    sharp = random_distribution(32, 4, 6.0)
    target, drafter = TableTarget(sharp, 32), TableDrafter(flattened(sharp, 30.0), 32)
    cost = CostModel.table([1 + 0.1 * n for n in range(33)], 0.1)  # a token is worth a tenth of a plain step
    strictly = CostAware(cost, stop, max_depth=4, temperature=1.0)
    assert decode(target, drafter, [1], strictly, max_new_tokens=40).acceptance_length == 1
    builder = CostAware(cost, stop, max_depth=4)
    late = decode(target, drafter, [1], builder, max_new_tokens=160).rounds[20:]
    assert sum(r.committed for r in late) / len(late) > 1.8


def test_trials_of_a_useless_drafter_become_rare() -> None:
    target = TableTarget(random_distribution(64, 4, 6.0), 64)
    drafter = TableDrafter(flattened(random_distribution(64, 5, 6.0), 12.0), 64)
    builder = CostAware(CostModel.table([1 + 0.1 * n for n in range(33)], 0.1), max_depth=4, probe=16)
    rounds = decode(target, drafter, [1], builder, max_new_tokens=600).rounds
    tried = [index for index, r in enumerate(rounds) if r.nodes]
    assert 2 <= len(tried) < len(rounds) / 20
    assert sum(r.nodes for r in rounds) < 0.2 * len(rounds)
