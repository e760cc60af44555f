"""The radius against its definition: solver, 50-digit arithmetic, and what no drafter may break."""

import math

import mpmath
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from oracles.certificates import accepted_set, exact_radius, large_radius, solver_radius, width
from strategies import directions, distributions, rules, single_token_rules

from certdraft.certificates import (
    Additive,
    Coverage,
    Head,
    Multiplicative,
    StrictGreedy,
    TopM,
    Typical,
    ceiling,
    kl_divergence,
    minimiser,
    radii,
    radius,
    tv_distance,
    tv_radius,
)

DIRECTIONS = ("forward", "reverse")
RULES = (
    StrictGreedy(),
    Additive(0.1),
    Additive(0.4),
    Multiplicative(0.5),
    Multiplicative(0.05),
    TopM(4, t=0.1),
    TopM(3, alpha=0.2),
    Typical(0.1, 0.09),
    Typical(0.3, 0.6),
    Coverage(1),
    Coverage(3),
)


def dirichlet(concentration: float, size: int, count: int) -> torch.Tensor:
    alpha = torch.full((size,), concentration, dtype=torch.float64)
    return torch.distributions.Dirichlet(alpha).sample((count,))


def divergence(p: torch.Tensor, q: torch.Tensor, direction: str) -> torch.Tensor:
    return kl_divergence(p, q) if direction == "forward" else kl_divergence(q, p)


def accepted(rule, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Whether the drafter's best token is accepted, every token level with the best one being tried."""
    if isinstance(rule, Coverage):
        return rule.accepts(p, q)
    best = q >= q.amax(-1, keepdim=True)
    return (rule.accepted_entries(p) | ~best).all(-1)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_solver_agrees(direction: str) -> None:
    cases = [
        ([0.42, 0.3, 0.2, 0.08], StrictGreedy()),
        ([0.42, 0.4, 0.1, 0.08], Additive(0.1)),
        ([0.3, 0.28, 0.22, 0.2], Multiplicative(0.7)),
        ([0.3, 0.3, 0.25, 0.15], TopM(3, t=0.2)),
        ([0.4, 0.3, 0.2, 0.1], Typical(0.15, 0.9)),
        ([0.35, 0.05, 0.3, 0.3], Coverage(2)),
        ([0.5, 0.5, 0.0], Coverage(2)),
        ([0.26, 0.25, 0.25, 0.24], Coverage(3)),
    ]
    for p, rule in cases:
        if direction == "reverse" and 0.0 in p:
            continue
        expected = solver_radius(p, accepted_set(p, rule), width(rule), direction)
        value = float(radius(torch.tensor(p, dtype=torch.float64), rule, direction))
        assert value == pytest.approx(expected, abs=2e-7), (p, rule)


@given(distributions(), rules(), directions())
def test_matches_50_digits(p: torch.Tensor, rule, direction: str) -> None:
    expected = exact_radius(p.tolist(), accepted_set(p.tolist(), rule), width(rule), direction)
    assert float(radius(p, rule, direction)) == pytest.approx(expected, rel=1e-7, abs=1e-15)


@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_worst_case_attains_the_radius_and_sits_on_the_fence(rule, direction: str) -> None:
    p = torch.cat([dirichlet(c, 12, 60) for c in (0.1, 0.7, 5.0, 200.0)])
    kappa, q = radius(p, rule, direction), minimiser(p, rule, direction)
    finite = torch.isfinite(kappa) & (kappa > 1e-9)
    assert torch.isnan(q[~torch.isfinite(kappa)]).all()
    p, q, kappa = p[finite], q[finite], kappa[finite]
    torch.testing.assert_close(divergence(p, q, direction), kappa, rtol=1e-6, atol=1e-10)
    assert not accepted(rule, p, q).any(), "at the radius the drafter ties, and a tie is a rejection"
    inside = p + (1 - 1e-6) * (q - p)
    assert accepted(rule, p, inside).all(), "just inside the radius everything is accepted"
    rejected = ~rule.accepted_entries(p) if not isinstance(rule, Coverage) else p < p.amax(-1, keepdim=True)
    pushed = q * (1 + 1e-6 * rejected)
    pushed = pushed / pushed.sum(-1, keepdim=True)
    assert not accepted(rule, p, pushed).any(), "just outside it the worst drafter is rejected without a tie"
    assert (divergence(p, pushed, direction) <= kappa + 1e-5).all()


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_brute_force_finds_no_closer_failure_and_one_hardly_further(direction: str) -> None:
    """Every drafter over three tokens on a grid of 1/150."""
    cells = 150
    i, j = torch.meshgrid(*[torch.arange(1.0, cells, dtype=torch.float64)] * 2, indexing="ij")
    grid = torch.stack([i, j, cells - i - j], dim=-1)[i + j < cells] / cells
    for p in ([0.5, 0.3, 0.2], [0.42, 0.4, 0.18], [0.9, 0.07, 0.03], [1 / 3, 1 / 3, 1 / 3]):
        target = torch.tensor(p, dtype=torch.float64)
        for rule in (*RULES, Coverage(2)):
            kappa = float(radius(target, rule, direction))
            failing = ~accepted(rule, target.expand_as(grid), grid)
            if not bool(failing.any()):
                assert math.isinf(kappa), rule
                continue
            least = float(divergence(target, grid[failing], direction).min())
            assert kappa <= least + 1e-12, rule
            assert least <= kappa + 0.03, rule


def search(pairs: int, vocab_size: int = 6) -> tuple[int, int, int]:
    """Random drafters around the target and around the worst case; none within the radius is rejected.

    Returns how many were tried, how many of them were certified with less than a tenth of the radius to
    spare, and how many were rejected.
    """
    tried = close = rejected = 0
    for concentration in (0.2, 1.0, 20.0):
        p = dirichlet(concentration, vocab_size, pairs)
        for rule in RULES:
            for direction in DIRECTIONS:
                kappa = radius(p, rule, direction)
                worst = minimiser(p, rule, direction)
                near = torch.where(torch.isnan(worst), p, worst)
                share = torch.rand(pairs, 1, dtype=torch.float64) * 1.2
                noise = dirichlet(1.0, vocab_size, pairs)
                far = torch.rand(pairs, 1, dtype=torch.float64) ** 4
                q = (1 - far) * (p + share * (near - p)).clamp_min(1e-12) + far * noise
                q = q / q.sum(-1, keepdim=True)
                kl = divergence(p, q, direction)
                good = accepted(rule, p, q)
                assert good[kl < kappa].all(), (rule, direction)
                tried += pairs
                close += int(((kl < kappa) & (kl > 0.9 * kappa)).sum())
                rejected += int((~good).sum())
    return tried, close, rejected


def test_no_drafter_within_the_radius_is_rejected() -> None:
    search(pairs=400)


@pytest.mark.slow
def test_no_drafter_within_the_radius_is_rejected_in_a_long_search() -> None:
    found = []
    for seed in range(20):
        torch.manual_seed(seed)
        found.append(search(pairs=1000))
    tried, close, rejected = (sum(column) for column in zip(*found, strict=True))
    assert tried >= 1_000_000
    assert close >= 10_000, "the search comes close to the radius from inside"
    assert rejected >= 100_000, "and it crosses it"


@given(distributions(min_size=2), rules(), directions())
def test_float_error_stays_in_proportion(p: torch.Tensor, rule, direction: str) -> None:
    """Single precision in, 50 digits as the judge: ten roundings of the radius at most, wherever it lies.

    Near the far end of the reverse direction the radius is the log of a small remainder, which has fewer
    digits; where rounding moves a token across the threshold there is nothing to compare.
    """
    row = p.float()
    exact = row.double().tolist()
    inside = accepted_set(exact, rule)
    if not isinstance(rule, Coverage):
        seen = rule.accepted_entries(row).nonzero().squeeze(-1).tolist()
        if set(seen) != inside:
            return
    expected = exact_radius(exact, inside, width(rule), direction)
    value = float(radius(row, rule, direction))
    if direction == "reverse" and expected > 4:
        assert value == pytest.approx(expected, rel=1e-3)
    else:
        assert value == pytest.approx(expected, rel=2e-6, abs=1e-12)


@given(distributions(min_size=2), directions(), st.data())
def test_grows_with_tolerance(p: torch.Tensor, direction: str, data: st.DataObject) -> None:
    share = st.floats(0.0, 1.0)
    low, high = sorted([data.draw(share), data.draw(share)])
    few, many = sorted([data.draw(st.integers(1, 8)), data.draw(st.integers(1, 8))])
    ladders = [
        [StrictGreedy(), Additive(low), Additive(high)],
        [StrictGreedy(), Multiplicative(high), Multiplicative(low)],
        [StrictGreedy(), TopM(few, t=low), TopM(many, t=low), TopM(many, t=high), Additive(high)],
        [StrictGreedy(), TopM(few, alpha=high), TopM(many, alpha=high), Multiplicative(high)],
        [StrictGreedy(), Typical(high, low), Typical(low, low)],
        [StrictGreedy(), Coverage(few), Coverage(many)],
    ]
    for ladder in ladders:
        values = [float(x) for x in radii(p, ladder, direction)]
        for lower, upper, rule in zip(values, values[1:], ladder[1:], strict=False):
            assert lower <= upper * (1 + 1e-9) + 1e-12, (rule, values)


@given(distributions(), rules(), directions(), st.randoms(use_true_random=False))
def test_does_not_depend_on_the_order_of_the_vocabulary(p, rule, direction: str, random) -> None:
    order = list(range(len(p)))
    random.shuffle(order)
    value, shuffled = radius(p, rule, direction), radius(p[order], rule, direction)
    torch.testing.assert_close(shuffled, value, rtol=1e-7, atol=1e-15)


@given(distributions(), rules())
def test_stays_under_its_ceiling(p: torch.Tensor, rule) -> None:
    value = float(radius(p, rule))
    assert 0 <= value
    assert math.isinf(value) or value <= ceiling(rule) + 1e-12
    assert math.isinf(ceiling(rule, "reverse"))


def test_hand_cases() -> None:
    certain = torch.tensor([0.0, 1.0, 0.0, 0.0])
    assert float(radius(certain, StrictGreedy())) == pytest.approx(math.log(2), rel=1e-6)
    for m in (1, 2, 3):
        assert float(radius(certain, Coverage(m))) == pytest.approx(math.log(m + 1), rel=1e-6)
    assert float(radius(certain, Coverage(4))) == math.inf, "four tokens: the top-4 cannot miss one"
    assert float(radius(certain, StrictGreedy(), "reverse")) == math.inf
    assert float(radius(torch.tensor([0.5, 0.5]), StrictGreedy())) == 0.0
    assert float(radius(torch.tensor([0.5, 0.5]), Additive(0.1))) == math.inf, "both tokens pass"
    assert float(radius(torch.tensor([0.6, 0.4]), Additive(0.7))) == math.inf
    assert float(radius(torch.tensor([1.0]), StrictGreedy())) == math.inf, "one token: nothing else to draft"
    # p0 = p_g deleted is the only way past two impossible rivals
    value = radius(torch.tensor([0.75, 0.25, 0.0, 0.0]), Coverage(2), "reverse")
    assert float(value) == pytest.approx(-math.log(0.25), rel=1e-6)
    half = torch.tensor([[0.5, 0.25, 0.25], [0.4, 0.2, 0.4]], dtype=torch.float64)
    assert float(radius(half, Multiplicative(0.5))[0]) == float(radius(half[0], StrictGreedy())), "0.25 ties"


@given(distributions(min_size=2), rules(), directions())
def test_head_of_everything_is_exact_and_a_short_one_never_claims_more(p, rule, direction: str) -> None:
    exact = float(radius(p, rule, direction))
    for kept in range(1, len(p) + 1):
        if isinstance(rule, Coverage) and kept <= rule.m < len(p):
            continue
        value = float(radius(Head.from_probs(p, kept), rule, direction))
        assert value <= exact * (1 + 1e-9) + 1e-12, kept
        if isinstance(rule, (StrictGreedy, Coverage)) and kept > width(rule) or kept == len(p):
            # a token within 1e-6 of the threshold counts as rejected in a head; elsewhere the two agree
            edges = (
                []
                if isinstance(rule, Coverage)
                else [abs(x / max(float(rule.threshold(p)), 1e-300) - 1) for x in p]
            )
            if isinstance(rule, (StrictGreedy, Coverage)) or min(edges) > 1e-5:
                assert value == pytest.approx(exact, rel=1e-7, abs=1e-12)


def test_head_is_exact_once_it_holds_the_active_set() -> None:
    p = torch.cat([dirichlet(c, 60, 50) for c in (0.02, 0.1, 0.5)])
    for rule in (*RULES, Typical(0.1, 0.5)):
        exact = {d: radius(p, rule, d) for d in DIRECTIONS}
        held = (
            rule.accepted_entries(p).sum(-1) if not isinstance(rule, Coverage) else torch.tensor(rule.m)
        ) + 1
        for kept in (4, 8, 16):
            head = Head.from_probs(p, kept)
            for direction in DIRECTIONS:
                value = radius(head, rule, direction)
                assert (value <= exact[direction] * (1 + 1e-9) + 1e-12).all()
                whole = (held <= kept).expand_as(value)
                torch.testing.assert_close(value[whole], exact[direction][whole], rtol=1e-9, atol=1e-13)


def test_heads_count_rounding_at_a_threshold_as_a_tie() -> None:
    """Tokens exactly at the threshold, whose probability rebuilt from logarithms may land on either side."""
    top = torch.linspace(0.1, 0.45, 300)
    half = torch.stack([top, top / 2, top / 4, torch.zeros(300), 1 - 1.75 * top], dim=-1)
    half = torch.cat(
        [half[:, :4], (half[:, 4:] / 20).expand(300, 20)], dim=-1
    )  # p(1) is exactly half of p(0)
    for kept in (3, 24):
        head = Head.from_probs(half, kept)
        assert (radius(head, Multiplicative(0.5)) <= radius(half, Multiplicative(0.5)) * (1 + 1e-5)).all()
        for row in range(0, 300, 30):  # p(x0) − t is exactly 0, and the impossible token is rejected
            rule = Additive(float(half[row, 0]))
            exact = radius(half[row], rule)
            assert torch.isfinite(exact)
            assert float(radius(head[row], rule)) <= float(exact) * (1 + 1e-5)


def test_a_head_of_one_token_below_the_threshold_claims_nothing() -> None:
    p = torch.full((20,), 0.05, dtype=torch.float64)
    for direction in DIRECTIONS:
        assert float(radius(Head.from_probs(p, 1), Typical(0.5, 50.0), direction)) == 0.0


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_accepted_sets_larger_than_the_selection(direction: str) -> None:
    """Hundreds of accepted tokens, pooled or not: rows that leave the fast path."""
    vocab_size = 3000
    flat = torch.full((vocab_size,), 1.0, dtype=torch.float64)
    flat[:200] = 40 + torch.linspace(0, 1, 200, dtype=torch.float64)  # 200 pooled with token 200
    steep = torch.linspace(1, 30, vocab_size, dtype=torch.float64) ** 3
    noisy = torch.rand(vocab_size, dtype=torch.float64) + 0.05
    p = torch.stack([flat, steep, noisy])[:, torch.randperm(vocab_size)]
    p = p / p.sum(-1, keepdim=True)
    for rule in (
        Multiplicative(0.03),
        Multiplicative(0.4),
        Typical(0.1, 0.5),
        Additive(0.0005),
        Additive(1e-4),
    ):
        for source in (p, p.float()):
            values = radius(source, rule, direction)
            for row, value in zip(source, values, strict=True):
                row = row.tolist()
                expected = large_radius(row, accepted_set(row, rule), direction)
                assert float(value) == pytest.approx(expected, rel=2e-6 if source is not p else 1e-9), rule


@pytest.mark.parametrize("direction", DIRECTIONS)
@pytest.mark.parametrize("gap", [1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 0.1, 1.0, 8.0])
def test_float32_keeps_its_digits_near_ties(gap: float, direction: str) -> None:
    logits = torch.tensor([[0.0, -gap, -2 * gap, -3.0, -4.0]], dtype=torch.float64)
    head = Head.from_logits(logits.float(), 5)  # gaps as stored, log-probabilities recomputed from them
    stored = (-head.gap.double()).exp()[0].tolist()
    p32 = logits.softmax(-1).float()
    for rule in (StrictGreedy(), Coverage(2), TopM(3, alpha=0.0), Multiplicative(0.5)):
        for source, row in ((head, stored), (p32, p32[0].tolist())):
            expected = exact_radius(row, accepted_set(row, rule), width(rule), direction)
            value = radius(source, rule, direction)
            assert value.dtype == torch.float32
            assert float(value) == pytest.approx(expected, rel=3e-6), (rule, type(source))


def test_confident_rows_keep_their_digits_in_the_reverse_direction() -> None:
    for rest in (1e-3, 1e-8, 1e-14, 1e-18, 1e-24, 1e-31, 1e-36):
        row = [1.0 - rest, 0.75 * rest, 0.25 * rest]
        for m in (1, 2):
            expected = exact_radius(row, {0}, m, "reverse")
            for source in (torch.tensor(row), Head.from_probs(torch.tensor(row), 3)):
                assert float(radius(source, Coverage(m), "reverse")) == pytest.approx(expected, rel=1e-6)


@given(st.floats(1.0, 100.0), st.floats(1.0, 100.0), st.floats(1e-3, 1.0), rules())
def test_the_reverse_radius_is_exact_however_little_the_runner_up_has(
    first: float, second: float, share: float, rule
) -> None:
    """1 − lost keeps no digit once the drafter must give up nearly everything: the remainder is added up."""
    rest = [10**-first, 10 ** -max(first, second), share * 10**-first]
    row = [1.0 - sum(rest), *sorted(rest, reverse=True)]
    inside = accepted_set(row, rule)
    with mpmath.workdps(130):
        expected = exact_radius(row, inside, width(rule), "reverse")
    p = torch.tensor(row, dtype=torch.float64)
    if not isinstance(rule, Coverage):
        seen = rule.accepted_entries(p).nonzero().flatten().tolist()
        if set(seen) != inside:
            return
    value = float(radius(p, rule, "reverse"))
    assert value <= expected * (1 + 1e-8) + 1e-12
    if len(inside) == 1:  # otherwise what lies outside the pool is a difference, rounded up
        assert value == pytest.approx(expected, rel=1e-8, abs=1e-12)


@pytest.mark.parametrize("direction", DIRECTIONS)
def test_gradients_match_finite_differences(direction: str) -> None:
    p = torch.tensor([[0.42, 0.31, 0.17, 0.1], [0.7, 0.15, 0.1, 0.05]], dtype=torch.float64)
    logits = p.log().requires_grad_()
    for rule in (StrictGreedy(), Additive(0.2), Multiplicative(0.3), TopM(3, t=0.5), Coverage(2)):
        for of in (lambda z: Head.from_logits(z, 4), lambda z: z.softmax(-1)):
            assert torch.autograd.gradcheck(lambda z, of=of, r=rule: radius(of(z), r, direction), logits)


def test_gradient_is_log_of_target_over_worst_drafter() -> None:
    p = torch.tensor([0.35, 0.3, 0.25, 0.1], dtype=torch.float64, requires_grad=True)
    for rule in (StrictGreedy(), Additive(0.09), Coverage(2)):
        (grad,) = torch.autograd.grad(radius(p, rule), p)
        torch.testing.assert_close(grad, (p / minimiser(p, rule)).log().detach(), rtol=1e-9, atol=1e-12)


def test_gradients_are_finite_on_point_masses_and_beyond_the_selection() -> None:
    p = torch.zeros(2, 2000)
    p[0, 7] = 1.0
    p[1] = 1 / 2000
    p[1, :300] += torch.linspace(0, 1e-4, 300)
    p = (p / p.sum(-1, keepdim=True)).requires_grad_()
    for rule in (*RULES, Multiplicative(0.99), Additive(1e-5)):
        for direction in DIRECTIONS:
            value = radius(p, rule, direction)
            (grad,) = torch.autograd.grad(value[torch.isfinite(value)].sum(), p, allow_unused=True)
            assert torch.isfinite(grad).all(), (rule, direction)


def test_traces_in_one_graph() -> None:
    rules = [
        StrictGreedy(),
        Additive(0.1),
        Multiplicative(0.5),
        TopM(4, t=0.1),
        Typical(0.1, 0.09),
        Coverage(3),
    ]

    def of_probabilities(p: torch.Tensor) -> list[torch.Tensor]:
        return radii(p, rules)

    def of_head(ids, gap, lse_gap, entropy) -> list[torch.Tensor]:
        return radii(Head(ids, gap, lse_gap, 50, entropy), rules, "reverse")

    p = dirichlet(0.2, 50, 20)
    head = Head.from_probs(p, 8)
    compile_ = {"fullgraph": True, "backend": "eager"}
    torch.testing.assert_close(torch.compile(of_probabilities, **compile_)(p), of_probabilities(p))
    parts = (head.ids, head.gap, head.lse_gap, head.entropy)
    torch.testing.assert_close(torch.compile(of_head, **compile_)(*parts), of_head(*parts))


@given(distributions(min_size=2), single_token_rules())
def test_total_variation_radius(p: torch.Tensor, rule) -> None:
    kappa, tv = float(radius(p, rule)), float(tv_radius(p, rule))
    if isinstance(rule, StrictGreedy):
        top = p.sort(descending=True).values
        assert tv == pytest.approx(float(top[0] - top[1]) / 2, abs=1e-12)
    if math.isinf(kappa):
        assert math.isinf(tv)
    else:
        assert kappa >= 2 * tv**2 - 1e-12, "Pinsker"
        assert float(tv_distance(p, minimiser(p, rule))) == pytest.approx(tv, abs=1e-9)


def test_one_call_for_many_rules_equals_many_calls() -> None:
    p = dirichlet(0.3, 200, 5).reshape(5, 1, 200)
    together = radii(p, RULES)
    for rule, value in zip(RULES, together, strict=True):
        assert value.shape == (5, 1)
        torch.testing.assert_close(value, radius(p, rule), rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("p", "rule", "message"),
    [
        ([0.5, 0.4], StrictGreedy(), r"p: row \[\] does not sum to 1 \(it gives 0.9\)"),
        ([[0.5, 0.5], [1.5, -0.5]], StrictGreedy(), r"row \[1\] holds a negative probability"),
        ([[1.5, -0.2, -0.3]], StrictGreedy(), r"row \[0\] holds a negative probability"),
        ([[1.5, 0.0, -0.5]], StrictGreedy(), r"row \[0\] holds a probability above 1"),
        ([[0.5, float("nan")]], Coverage(1), r"row \[0\] does not sum to 1 \(it gives nan\)"),
    ],
)
def test_rows_that_are_no_distributions_are_named(p: list, rule, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        radius(torch.tensor(p), rule)


def test_short_heads_and_unknown_directions_are_refused() -> None:
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    with pytest.raises(ValueError, match=r"coverage\(m=3\) needs the 4 most probable .* K=3"):
        radius(Head.from_probs(p, 3), Coverage(3))
    head = Head.from_probs(p, 3)
    with pytest.raises(ValueError, match=r"typical.* needs the entropy"):
        radius(Head(head.ids, head.gap, head.lse_gap, 4), Typical(0.1, 0.1))
    with pytest.raises(ValueError, match='direction=.*"forward"'):
        radius(p, StrictGreedy(), "backward")
