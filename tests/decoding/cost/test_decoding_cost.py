"""Cost models: the fit (E2), four defects of the published method avoided, files, machines, profiles."""

import json
from dataclasses import replace
from pathlib import Path

import cvxpy
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.models.decoding_models import (
    NetworkDrafter,
    TableDrafter,
    TableTarget,
    perturbed,
    random_distribution,
    tiny_qwen3,
)

from certdraft.decoding import (
    Chain,
    CostAware,
    CostModel,
    TableClock,
    TargetRunner,
    Tree,
    decode,
    device_name,
    fingerprint,
    profile,
)
from certdraft.decoding.cost.cost_aware import take_lambda, take_ratio, take_safe
from certdraft.decoding.cost.cost_model import fit_convex
from certdraft.decoding.trees.tree import Node

# E2

latencies = st.lists(st.integers(1, 1000), min_size=9, max_size=9).map(lambda ms: [m / 1000 for m in ms])
NODES = [0, 1, 2, 4, 8, 16, 32, 64, 100]


def slopes(nodes, seconds) -> np.ndarray:
    return np.diff(seconds) / np.diff(nodes)


@given(latencies)
def test_fit_is_convex_and_non_decreasing(seconds) -> None:
    fitted = slopes(NODES, fit_convex(NODES, seconds))
    assert (fitted >= 0).all()
    assert (np.diff(fitted) >= -1e-9).all()


@settings(max_examples=10)
@given(latencies)
def test_fit_is_the_least_squares_one(seconds) -> None:
    """Against a general convex solver with the constraints written down."""
    f = cvxpy.Variable(len(NODES))
    rise = cvxpy.multiply(cvxpy.diff(f), 1 / np.diff(NODES))
    problem = cvxpy.Problem(
        cvxpy.Minimize(cvxpy.sum_squares(f - np.array(seconds))),
        [rise >= 0, cvxpy.diff(rise) >= 0, f[0] >= 0],
    )
    problem.solve(solver=cvxpy.CLARABEL)
    mine = np.sum((fit_convex(NODES, seconds) - seconds) ** 2)
    assert mine == pytest.approx(problem.value, rel=1e-4, abs=1e-7)


@given(st.lists(st.integers(0, 20), min_size=8, max_size=8), st.integers(1, 100))
def test_a_planted_convex_curve_is_recovered(steps, base: int) -> None:
    planted = np.concatenate([[base], base + np.cumsum(np.sort(steps) * np.diff(NODES))]) / 1000
    np.testing.assert_allclose(fit_convex(NODES, planted.tolist()), planted, rtol=1e-7)


def two_contexts() -> CostModel:
    return CostModel((100, 300), (0, 4, 8), ((1.0, 1.0, 3.0), (2.0, 4.0, 8.0)), ((0.5, 0.1), (0.7, 0.3)))


def test_values_between_and_beyond_the_grid() -> None:
    model = two_contexts()
    assert model.verify_curve(100, 8) == [1, 1, 1, 1, 1, 1.5, 2, 2.5, 3]
    assert model.verify_s(4, 200) == 2.5  # half way between contexts
    assert model.verify_s(4, 5) == 1.0  # nearest context outside
    assert model.verify_s(8, 9000) == 8.0
    assert model.verify_s(12, 100) == 5.0  # the last slope goes on
    assert model.draft_s(1, 200) == pytest.approx(0.6)
    assert model.draft_s(3, 300) == pytest.approx(1.3)


@given(st.integers(0, 400))
def test_interpolation_keeps_curves_convex(context: int) -> None:
    rise = np.diff(two_contexts().verify_curve(context, 20))
    assert (rise >= 0).all()
    assert (np.diff(rise) >= -1e-12).all()


# the four defects


class Timed:
    """A clock that the models below wind themselves: work done is time passed."""

    def __init__(self) -> None:
        self.now = self.last = 0.0

    def lap(self, phase: str, nodes: int = 0, context: int = 0) -> float:
        last, self.last = self.last, self.now
        return self.last - last


class TimedTarget(TableTarget):
    """1 s per pass and 0.1 s per slot read; `keep` takes 0.25 s."""

    def __init__(self, clock: Timed) -> None:
        super().__init__(random_distribution(100, 0), 100)
        self.clock, self.slots = clock, []

    def verify(self, state, tree: Tree):
        self.slots.append(len(tree.tokens))
        self.clock.now += 1.0 + 0.1 * len(tree.tokens)
        return super().verify(state, tree)

    def keep(self, state, path) -> None:
        self.clock.now += 0.25
        super().keep(state, path)


class TimedDrafter(TableDrafter):
    """0.5 s per pass and 0.02 s per node read; `commit` takes 0.125 s."""

    def __init__(self, clock: Timed) -> None:
        super().__init__(random_distribution(100, 1), 100)
        self.clock = clock

    def draft(self, state, tokens, parents):
        self.clock.now += 0.5 + 0.02 * len(tokens)
        return super().draft(state, tokens, parents)

    def commit(self, state, path) -> None:
        self.clock.now += 0.125
        super().commit(state, path)


class VectorTarget(TimedTarget):
    """A pass over the root alone is 0.5 s cheaper than the line through the others."""

    def verify(self, state, tree: Tree):
        self.clock.now -= 0.5 * (tree.num_nodes == 0)
        return super().verify(state, tree)


def test_the_plain_step_is_measured_not_fitted() -> None:
    clock = Timed()
    model = profile(VectorTarget(clock), TimedDrafter(clock), (8,), (0, 1, 5, 9), (1, 3), 2, 0, clock=clock)
    assert model.verify_s(0, 8) == pytest.approx(1.1 + 0.375 - 0.5)
    assert model.verify_s(1, 8) == pytest.approx(1.2 + 0.375)


@pytest.fixture(scope="module")
def timed_profile() -> tuple[CostModel, TimedTarget]:
    clock = Timed()
    target = TimedTarget(clock)
    return profile(
        target, TimedDrafter(clock), (8,), (0, 1, 5, 9), (1, 3), repeats=3, warm_up=1, clock=clock
    ), target


def test_the_pass_over_a_root_has_a_price_of_its_own(tmp_path: Path) -> None:
    """Profiled apart from later passes, charged once a round, kept in the file."""

    class Blockwise(TimedDrafter):
        def draft(self, state, tokens, parents):
            self.clock.now += 3.0 * (min(parents) < 0)
            return super().draft(state, tokens, parents)

    clock = Timed()
    cost = profile(TimedTarget(clock), Blockwise(clock), (8,), (0, 2), (1, 3), 2, 0, clock=clock)
    assert cost.draft[0] == pytest.approx((0.52, 0.02))
    assert cost.opening == pytest.approx((3.0,))
    cost.save(tmp_path / "cost.json")
    assert CostModel.load(tmp_path / "cost.json").opening == cost.opening
    table = TableClock(cost)
    assert table.lap("open", 1, 8) == pytest.approx(3.52)
    assert table.lap("draft", 1, 8) == pytest.approx(0.52)
    target, drafter = TimedTarget(clock), Blockwise(clock)
    rounds = decode(target, drafter, [1], Chain(3), max_new_tokens=9, clock=table).rounds
    wanted = [(3.0 + 0.52 * r.depth) * (r.depth > 0) for r in rounds]  # and a leaf read in front of the root
    assert [r.draft_s for r in rounds] == pytest.approx(wanted, abs=0.021)
    with pytest.raises(ValueError, match="opening must hold seconds"):
        replace(cost, opening=(1.0, 2.0))


def test_defect_1_a_tree_of_n_nodes_is_measured_on_n_plus_1_slots(timed_profile) -> None:
    model, target = timed_profile
    assert set(target.slots) == {1, 2, 6, 10}
    host = 0.25 + 0.125
    assert model.verify_s(0, 8) == pytest.approx(1.0 + 0.1 + host)
    assert model.verify_s(5, 8) == pytest.approx(1.0 + 0.6 + host)
    assert model.verify_s(7, 8) == pytest.approx(1.0 + 0.8 + host)


def test_defect_2_the_rest_of_the_round_is_in_the_curves(timed_profile) -> None:
    """Summed over a live text, the model's seconds are the clock's: nothing of a round is forgotten."""
    model, _ = timed_profile
    clock = Timed()
    target, drafter = TimedTarget(clock), TimedDrafter(clock)
    result = decode(target, drafter, [1, 2], Chain(3), max_new_tokens=40, clock=clock)
    assert model.draft_s(1, 8) == pytest.approx(0.52)
    assert model.draft_s(3, 8) == pytest.approx(0.56)
    predicted = sum(model.verify_s(r.nodes, 8) for r in result.rounds)
    predicted += sum(model.draft_s(read, 8) for read in drafter.passes)
    last_round_is_not_committed = 0.25 + 0.125
    assert result.seconds == pytest.approx(predicted - last_round_is_not_committed)


def nodes_of(masses) -> list[Node]:
    return [Node(float(np.log(m)), (rank,), rank, 0) for rank, m in enumerate(masses)]


def test_defect_3_a_staircase_does_not_stop_the_safe_rule() -> None:
    rng = np.random.default_rng(0)
    missed = {"ratio": 0, "safe": 0}
    for _ in range(100):
        masses = np.sort(rng.dirichlet(np.full(80, 0.5)) * 6 + 1e-6)[::-1].clip(max=1)
        verify = np.cumsum(np.where(np.arange(81) % 16 == 1, rng.uniform(0.3, 1.0), 0.0)) + 2
        theta = (1 + np.concatenate([[0], np.cumsum(masses)])) / (1 + verify)
        for name, taken in (
            ("ratio", take_ratio(nodes_of(masses), 1.0, verify)),
            ("safe", take_safe(nodes_of(masses), 1.0, verify, 6)),
        ):
            missed[name] += theta[len(taken)] < theta.max() - 1e-12
    assert missed["safe"] == 0
    assert missed["ratio"] > 30


def test_defect_4_the_ratio_of_a_round_is_not_throughput() -> None:
    """A hard and an easy round, by hand: the long-run optimum spends nothing on the first."""
    hard, easy = [0.3] * 4, [0.8] * 4
    verify = [1.0 + 0.25 * n for n in range(5)]
    ratio = [len(take_ratio(nodes_of(masses), 0.0, verify)) for masses in (hard, easy)]
    assert ratio == [4, 4]  # 1.3/1.25 > 1, so the paper's rule spends on the hard round too
    rate = 0.0
    for _ in range(10):
        price = [len(take_lambda(nodes_of(masses), rate, verify)) for masses in (hard, easy)]
        rate = (2 + 0.3 * price[0] + 0.8 * price[1]) / (2 + 0.25 * sum(price))
    assert price == [0, 4]
    assert rate == pytest.approx((2 + 3.2) / 3)
    assert rate > (2 + 1.2 + 3.2) / 4


# files and machines


def test_json_round_trip(tmp_path) -> None:
    model = two_contexts()
    model.save(tmp_path / "deep" / "cost.json")
    assert CostModel.load(tmp_path / "deep" / "cost.json") == model
    assert CostAware(str(tmp_path / "deep" / "cost.json")).cost_model == model
    assert [p.name for p in (tmp_path / "deep").iterdir()] == ["cost.json"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda r: r.update(format="else"), "format"),
        (lambda r: r.pop("verify"), "verify"),
        (lambda r: r.update(surprise=1), "surprise"),
        (lambda r: r.update(nodes=[0, 4]), "shape"),
        (lambda r: r.update(nodes=[1, 4, 8]), "start at 0"),
        (lambda r: r["verify"][0].__setitem__(2, 0.5), "non-decreasing"),
        (lambda r: r.update(contexts=[300, 100]), "ascend"),
    ],
)
def test_a_damaged_file_is_refused_by_name(tmp_path, change, message: str) -> None:
    path = tmp_path / "cost.json"
    two_contexts().save(path)
    record = json.loads(path.read_text())
    change(record)
    path.write_text(json.dumps(record))
    with pytest.raises(ValueError, match=f"cost.json.*{message}"):
        CostModel.load(path)


def test_a_missing_file_and_a_text_are_refused(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="no such cost model"):
        CostModel.load(tmp_path / "none.json")
    (tmp_path / "text.json").write_text("not json")
    with pytest.raises(ValueError, match="not JSON"):
        CostModel.load(tmp_path / "text.json")


def test_profile_speaks_for_its_own_machine_and_models_only() -> None:
    model = tiny_qwen3(vocab_size=24, layers=1)
    drafter = NetworkDrafter(perturbed(model, 0.1))
    runner = TargetRunner(model)
    cost = profile(runner, drafter, (4,), (0, 2, 6), (1, 2), repeats=2, warm_up=1)
    assert cost.device == device_name()
    assert all(s > 0 for s in cost.verify[0])
    assert cost.measured["repeats"] == 2
    result = decode(runner, drafter, [1, 2], CostAware(cost), max_new_tokens=6)
    assert len(result.tokens) == 6
    larger = TargetRunner(tiny_qwen3(vocab_size=24, layers=2))
    with pytest.raises(
        ValueError, match="measured with target 'Qwen3ForCausalLM .*', not 'Qwen3ForCausalLM "
    ):
        decode(larger, drafter, [1, 2], CostAware(cost), max_new_tokens=6)
    elsewhere = CostModel(cost.contexts, cost.nodes, cost.verify, cost.draft, "NVIDIA H100", cost.target)
    with pytest.raises(ValueError, match="device 'NVIDIA H100', not"):
        decode(runner, drafter, [1, 2], CostAware(elsewhere), max_new_tokens=6)


def test_fingerprint_ignores_weights_and_sees_shapes_and_dtype() -> None:
    model = tiny_qwen3(vocab_size=24, layers=1)
    assert fingerprint(model) == fingerprint(perturbed(model, 0.5))
    assert fingerprint(model) != fingerprint(tiny_qwen3(vocab_size=25, layers=1))
    assert fingerprint(model) != fingerprint(tiny_qwen3(vocab_size=24, layers=1, attention="eager"))
    before = fingerprint(model)
    assert before != fingerprint(model.to(torch.bfloat16))


def test_profiling_beyond_the_context_is_refused() -> None:
    model = tiny_qwen3(vocab_size=24, layers=1)
    with pytest.raises(ValueError, match="context 512 .* 160"):
        profile(model, NetworkDrafter(model), (16, 512))


def test_table_clock_charges_what_the_model_says() -> None:
    cost = CostModel.table([1.0, 1.5, 1.75, 2.0], 0.25, draft_node_s=0.125)
    distribution = random_distribution(6, 0, 3.0)
    drafter, target = TableDrafter(distribution, 6), TableTarget(distribution, 6)
    result = decode(target, drafter, [1], Chain(2), max_new_tokens=9, clock=TableClock(cost))
    first, second, third = result.rounds
    assert (first.draft_s, first.verify_s, first.host_s) == (0.5, 1.75, 0.0)
    assert second.draft_s == 0.25 + 0.125 + 0.25  # the accepted leaf is read together with the root
    assert result.seconds == pytest.approx(first.seconds + second.seconds + third.seconds)
