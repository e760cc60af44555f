"""Three-token models whose rounds fit on paper: who accepts what, and what tau must come out."""

import pytest
from oracles.models.decoding_models import MarginalDrafter, TableDrafter, TableTarget

from certdraft.certificates import Multiplicative
from certdraft.decoding import (
    BestFirst,
    Chain,
    CostAware,
    CostModel,
    StaticTree,
    TableClock,
    acceptance_length,
    decode,
)


def cycle(prefix: tuple[int, ...]) -> list[float]:
    """The target counts: 0 -> 1 -> 2 -> 0, sure of itself by 0.8."""
    p = [0.05, 0.05, 0.05]
    p[(prefix[-1] + 1) % 3] = 0.8
    p[prefix[-1]] = 0.15
    return p


def stutter(prefix: tuple[int, ...]) -> list[float]:
    """A drafter that counts too, but says 0 again after a 0, with the right token second."""
    return [0.6, 0.3, 0.1] if prefix[-1] == 0 else cycle(prefix)


TARGET = TableTarget(cycle, 3)


def rounds(drafter, builder, tokens: int, start: int = 0, acceptor=None) -> list[tuple[int, int, int]]:
    """(nodes, accepted, committed) of each round."""
    result = decode(TARGET, drafter, [start], builder, acceptor, max_new_tokens=tokens)
    if acceptor is None:
        assert result.tokens == [(start + 1 + i) % 3 for i in range(tokens)]
    return [(r.nodes, r.accepted, r.committed) for r in result.rounds]


def test_always_right() -> None:
    """Chain of 3: every round commits 4 tokens. 12 tokens, 3 passes, tau = 4."""
    assert rounds(TableDrafter(cycle, 3), Chain(3), 12) == [(3, 3, 4)] * 3


def test_never_right() -> None:
    """Every round commits the bonus alone: tau = 1; the last round has nothing left to draft for."""
    wrong = TableDrafter(lambda p: [1.0 * (token == p[-1]) for token in range(3)], 3)
    assert rounds(wrong, Chain(3), 6) == [(3, 0, 1)] * 3 + [(2, 0, 1), (1, 0, 1), (0, 0, 1)]


def test_right_until_the_next_zero() -> None:
    """From root 0 the draft is 0 0 0: nothing accepted, bonus 1. From root 1: 2 0 0, two accepted, bonus 1.

    So: 1 | 2 0 1 | 2 0 1 | ... tau = (1 + 3 + 3 + 3) / 4 = 2.5 over 10 tokens.
    """
    assert rounds(TableDrafter(stutter, 3), Chain(3), 10) == [(3, 0, 1), (3, 2, 3), (3, 2, 3), (2, 2, 3)]


def test_two_children_heal_the_stutter() -> None:
    """Width 2 at every depth holds the right token: all three depths accepted."""
    assert rounds(TableDrafter(stutter, 3), StaticTree((2, 2, 2)), 8) == [(14, 3, 4)] * 2


def test_two_children_at_the_first_depth_only() -> None:
    """Root 0: 1 (second child), then 2, then 0: three accepted. Root 1: 2, 0, then 0 where 1 is right: two.

    So: 1 2 0 1 | 2 0 1 | 2 0 1: tau = 10 / 3.
    """
    assert rounds(TableDrafter(stutter, 3), StaticTree((2, 1, 1)), 10) == [(6, 3, 4), (6, 2, 3), (4, 2, 3)]


def test_best_first_on_paper() -> None:
    """Root 0, masses: (0) .6, (0 0) .36, (1) .3, (1 2) .24; budget 4 takes these: 1 2 accepted, bonus 0."""
    drafter = TableDrafter(stutter, 3)
    result = decode(TARGET, drafter, [0], BestFirst(4, max_depth=2), max_new_tokens=3)
    assert result.tokens == [1, 2, 0]
    (only,) = result.rounds
    assert (only.nodes, only.depth, only.accepted) == (4, 2, 2)
    assert only.expected == pytest.approx(0.6 + 0.36 + 0.3 + 0.24)
    assert drafter.passes == [1, 3]  # the root; then budget - 1 nodes of depth 1: all three


def test_a_parallel_drafter() -> None:
    """Marginals of a drafter that knows the phase: same rounds as the chain that is always right."""
    drafter = MarginalDrafter(lambda p: [cycle(((p[-1] + d) % 3,)) for d in range(3)], 3)
    assert rounds(drafter, Chain(3), 12) == [(3, 3, 4)] * 3
    assert drafter.passes == [1, 4, 4]  # one pass a round; accepted tokens it never read come first


def test_a_rule_that_forgives() -> None:
    """The draft 0 after 0 has p = 0.15 > 0.1 * 0.8: accepted, and the text is no longer the target's own."""
    drafter = TableDrafter(stutter, 3)
    assert rounds(drafter, Chain(3), 8, acceptor=Multiplicative(0.1)) == [(3, 3, 4)] * 2
    text = decode(TARGET, drafter, [0], Chain(3), Multiplicative(0.1), max_new_tokens=8).tokens
    assert text == [0, 0, 0, 1, 2, 0, 0, 1]


def test_tau_pools_rounds_not_texts() -> None:
    """12 tokens in 3 passes and 2 tokens in 2 passes: 14 / 5, not the mean of 4 and 1."""
    sure = decode(TARGET, TableDrafter(cycle, 3), [0], Chain(3), max_new_tokens=12)
    never = decode(
        TARGET, TableDrafter(lambda p: [1.0 * (t == p[-1]) for t in range(3)], 3), [0], max_new_tokens=2
    )
    assert (sure.acceptance_length, never.acceptance_length) == (4, 1)
    assert acceptance_length([sure, never]) == 14 / 5
    assert [r.accepted for r in sure.rounds] == [3, 3, 3]


def test_cost_aware_on_paper() -> None:
    """Free drafter, 0.5 s per node on 1 s, right with 0.8: theta(n) = 1, 1.8 / 1.5, 2.44 / 2, ...

    Masses .8, .64, .512, ...; theta(3) = 2.952 / 2.5 < theta(2), so two nodes a round, three tokens in 2 s.
    """
    model = CostModel.table([1 + 0.5 * n for n in range(9)], 0.0)
    result = decode(
        TARGET,
        TableDrafter(cycle, 3),
        [0],
        CostAware(model, "ratio", temperature=1.0),
        max_new_tokens=9,
        clock=TableClock(model),
    )
    assert [(r.nodes, r.committed, r.seconds) for r in result.rounds] == [(2, 3, 2.0)] * 3
