"""Acceptance rules: what passes, what ties do, what constants are refused."""

import pytest
import torch
from hypothesis import given
from oracles.mathematics.certificates import accepted_set
from strategies import distributions, single_token_rules

from certdraft.certificates import (
    Additive,
    Coverage,
    Head,
    Multiplicative,
    StrictGreedy,
    TopM,
    Typical,
    entropy,
    margin,
    order_margin,
)


@given(distributions(), single_token_rules())
def test_accepted_tokens_are_those_of_the_definition(p: torch.Tensor, rule) -> None:
    expected = accepted_set(p.tolist(), rule)
    entries = set(rule.accepted_entries(p).nonzero().flatten().tolist())
    # min(ε, δ e^{−H}) may round differently in two implementations; nothing else may
    if not isinstance(rule, Typical) or (abs(p - rule.threshold(p)) > 1e-12).all():
        assert entries == expected
    for token in range(len(p)):
        assert bool(rule.accepts(p, torch.tensor(token))) == (token in entries)


@given(distributions(min_size=2), single_token_rules())
def test_a_head_accepts_only_what_the_target_accepts(p: torch.Tensor, rule) -> None:
    for kept in (1, len(p) // 2, len(p)):
        if kept == 0:
            continue
        head = Head.from_probs(p, kept)
        for token in range(len(p)):
            if bool(rule.accepts(head, torch.tensor(token))):
                assert bool(rule.accepts(p, torch.tensor(token)))
        clear = (p - rule.threshold(p)).abs() > 1e-4
        if kept == len(p) and clear.all():
            assert all(
                bool(rule.accepts(head, torch.tensor(t))) == bool(rule.accepts(p, torch.tensor(t)))
                for t in range(len(p))
            )


def test_hand_cases_and_ties() -> None:
    p = torch.tensor([0.25, 0.5, 0.25])
    cases = [
        (StrictGreedy(), [False, True, False]),
        (Additive(0.25), [False, True, False]),  # 0.25 is not above 0.25
        (Additive(0.26), [True, True, True]),
        (Additive(0.6), [True, True, True]),
        (Multiplicative(0.5), [False, True, False]),
        (Multiplicative(0.49), [True, True, True]),
        (TopM(2, t=1.0), [False, True, False]),
        (TopM(3, t=1.0), [False, True, False]),  # the third token ties with the second
        (TopM(4, t=1.0), [True, True, True]),
        (Typical(0.25, 9.0), [False, True, False]),
        (Typical(0.9, 0.5), [True, True, True]),
    ]
    for rule, expected in cases:
        assert rule.accepted_entries(p).tolist() == expected, rule
    tied = torch.tensor([0.2, 0.4, 0.4])
    assert StrictGreedy().accepted_entries(tied).tolist() == [False, True, False]


def test_top_m_refuses_the_m_th_token() -> None:
    p = torch.tensor([0.4, 0.3, 0.2, 0.1])
    assert TopM(3, alpha=0.1).accepted_entries(p).tolist() == [True, True, False, False]


def test_coverage_counts_ties_against_the_greedy_token() -> None:
    p = torch.tensor([[0.5, 0.3, 0.2]]).expand(4, 3)
    q = torch.tensor([[0.4, 0.4, 0.2], [0.4, 0.35, 0.25], [0.2, 0.4, 0.4], [0.2, 0.6, 0.2]])
    assert Coverage(1).accepts(p, q).tolist() == [False, True, False, False]
    assert Coverage(2).accepts(p, q).tolist() == [True, True, False, False]
    assert Coverage(3).accepts(p, q.log()).all(), "only the order of q matters"
    assert Coverage(2).accepts(Head.from_probs(p, 1), q).tolist() == [True, True, False, False]


def test_typical_needs_no_entropy_twice() -> None:
    p = torch.rand(5, 7).softmax(-1)
    expected = torch.minimum(torch.tensor(0.2), 0.9 * (-entropy(p)).exp())
    torch.testing.assert_close(Typical(0.2, 0.9).threshold(p), expected)
    torch.testing.assert_close(Typical(0.2, 0.9).threshold(Head.from_probs(p, 3)), expected)


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Additive(1.5), "Additive: t=1.5 must be a number, from 0 to 1"),
        (lambda: Additive(-0.1), "t=-0.1"),
        (lambda: Additive(float("nan")), "t=nan"),
        (lambda: Multiplicative("half"), "alpha='half'"),
        (lambda: TopM(0, t=0.1), "m=0 must be a whole number, 1 or more"),
        (lambda: TopM(2), "exactly one of t and alpha"),
        (lambda: TopM(2, t=0.1, alpha=0.1), "exactly one of t and alpha"),
        (lambda: TopM(2, alpha=2.0), "alpha=2.0"),
        (lambda: Typical(0.1, -1.0), "delta=-1.0 must be a number, 0 or more"),
        (lambda: Typical(0.1, float("inf")), "delta=inf"),
        (lambda: Typical(7.0, 0.1), "epsilon=7.0"),
        (lambda: Coverage(2.0), "m=2.0"),
        (lambda: Coverage(True), "m=True"),
    ],
)
def test_impossible_constants_are_refused(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_labels_are_short_and_stable() -> None:
    labels = {
        "strict": StrictGreedy(),
        "additive(t=0.1)": Additive(0.1),
        "multiplicative(alpha=0.5)": Multiplicative(0.5),
        "topm(m=4, t=0.1)": TopM(4, t=0.1),
        "topm(m=4, alpha=0.5)": TopM(4, alpha=0.5),
        "typical(epsilon=0.1, delta=0.09)": Typical(0.1, 0.09),
        "coverage(m=4)": Coverage(4),
    }
    assert {str(rule): rule for rule in labels.values()} == labels


def test_token_shape_must_be_that_of_the_steps() -> None:
    p = torch.full((2, 3, 4), 0.25)
    assert StrictGreedy().accepts(p, torch.zeros(2, 3, dtype=torch.long)).shape == (2, 3)
    with pytest.raises(ValueError, match=r"token has shape \[3\] and the steps of p have \[2, 3\]"):
        StrictGreedy().accepts(p, torch.zeros(3, dtype=torch.long))


def test_margins() -> None:
    p = torch.tensor([[0.1, 0.6, 0.3], [0.4, 0.4, 0.2]])
    torch.testing.assert_close(margin(p), torch.tensor([0.3, 0.0]))
    torch.testing.assert_close(order_margin(p, 2), torch.tensor([0.5, 0.2]))
    for kept in (2, 3):
        torch.testing.assert_close(margin(Head.from_probs(p, kept)), margin(p))
    near = Head.from_logits(torch.tensor([0.0, -1e-6, -5.0]), 3)
    assert float(margin(near)) == pytest.approx(float(near.p[0]) * 1e-6, rel=1e-5)
    with pytest.raises(ValueError, match="order margin 3 needs 4 tokens; p has 3"):
        order_margin(p, 3)
    with pytest.raises(ValueError, match="order margin 2 needs 3 tokens; the head keeps 2"):
        order_margin(Head.from_probs(p, 2), 2)
