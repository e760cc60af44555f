"""The joined view: certified steps are accepted, counts are those of a plain loop, rounds by hand."""

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from certdraft.certificates import Additive, Coverage, Head, Multiplicative, StrictGreedy, TopM, Typical
from certdraft.decoding import Round
from certdraft.evaluation.measure import joined_steps as views
from certdraft.evaluation.measure.acceptance import MARGIN_EDGES, CertificateViolation, measure_acceptance
from certdraft.evaluation.measure.acceptance_lengths import Lengths
from certdraft.evaluation.measure.distributions import Calibration
from certdraft.evaluation.measure.joined_steps import JoinedSteps
from certdraft.evaluation.measure.trace_reading import greedy_documents, greedy_tail, tie_gap_of

SINGLE = (StrictGreedy(), Additive(0.1), Multiplicative(0.5), TopM(3, t=0.2), Typical(0.1, 0.09))
RULES = (*SINGLE, Coverage(2), Coverage(3))


@dataclass
class Row:
    input_ids: Tensor
    loss_mask: Tensor
    head: Head


class Rows(list):
    """An in-memory trace."""

    def row(self, index: int) -> Row:
        return self[index]


class Bigram(nn.Module):
    """A model that looks at the last token only: a table of logits, as drafter and as target."""

    kind = "conditional"

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table, requires_grad=False)

    def hidden(self, input_ids: Tensor, position_ids: Tensor, document_ids: Tensor) -> Tensor:
        return self.table[input_ids]

    def head(self, hidden: Tensor) -> Tensor:
        return hidden


def trace_of(target: Tensor, k: int, documents: int = 6, length: int = 30, greedy: float = 1.0) -> Rows:
    """Texts of a bigram target; with probability 1 − greedy a token is drawn at random."""
    rows = Rows()
    for d in range(documents):
        ids = torch.randint(len(target), (4,)).tolist()
        while len(ids) < length + d:
            follow = torch.rand(()) < greedy
            ids.append(int(target[ids[-1]].argmax() if follow else torch.randint(len(target), ())))
        mask = torch.arange(len(ids)) >= 3
        mask[-1] = False
        rows.append(Row(torch.tensor(ids), mask, Head.from_logits(target[ids], k)))
    return rows


@settings(max_examples=25)
@given(
    seed=st.integers(0, 2**20),
    sharp=st.sampled_from([0.3, 1.5, 5.0]),
    noise=st.sampled_from([0.0, 0.02, 0.3, 1.0, 4.0]),
    k=st.sampled_from([4, 8, 25]),
    ties=st.booleans(),
)
def test_certified_steps_are_accepted_whatever_the_drafter(
    seed: int, sharp: float, noise: float, k: int, ties: bool
) -> None:
    torch.manual_seed(seed)
    target = sharp * torch.randn(25, 25)
    if ties:
        target = target.round()
    drafter = Bigram(target + noise * torch.randn(25, 25))
    found = measure_acceptance(drafter, trace_of(target, k, greedy=0.6), rules=RULES, widths=(1, 2, 3))
    assert (found.certified <= found.realised).all()  # a single certified rejection would have raised
    if noise == 0.02 and not ties:
        assert found.certified[..., 0].sum() > 0  # and the certificates are not empty


@settings(max_examples=30)
@given(seed=st.integers(0, 2**20), k=st.sampled_from([4, 8, 12]), sharp=st.sampled_from([1.0, 4.0]))
def test_rounded_heads_stay_sound_next_to_the_radius(seed: int, k: int, sharp: float) -> None:
    """Drafters that fail as cheaply as possible; heads rounded as a trace stores them, whole ones too."""
    torch.manual_seed(seed)
    exact = Head.from_logits(sharp * torch.randn(300, 12), k)
    head = Head(exact.ids, exact.gap.half().float(), exact.lse_gap, 12, exact.entropy)
    q = torch.full((300, 12), 0.0).scatter(-1, head.ids, head.p) + 1e-12
    outside = torch.ones_like(q).scatter(-1, head.ids, 0.0)
    q += outside * (head.tail_mass / outside.sum(-1).clamp_min(1)).unsqueeze(-1)
    pair = head.ids[:, :2]
    q.scatter_(
        -1, pair, q.gather(-1, pair).mean(-1, keepdim=True).expand(-1, 2)
    )  # the worst drafter of strict greedy
    q.scatter_add_(-1, pair[:, 1:], 1e-6 * q.gather(-1, pair[:, 1:]))
    seen = JoinedSteps.from_logits(q.log(), head)
    for rule in RULES:
        sure, _ = seen.certified(rule)
        accepted, unknown = seen.accepted(rule)
        assert not (sure & ~accepted & ~unknown).any(), rule
    wrong = seen.kl / seen.certified(StrictGreedy())[1]
    assert (wrong[seen.margin > 0.01] > 1 - 1e-3).all()  # they really sit at the radius


@settings(max_examples=40)
@given(seed=st.integers(0, 2**20), k=st.sampled_from([4, 6, 30]), spread=st.sampled_from([0.1, 0.5, 2.0]))
def test_the_head_never_certifies_what_the_whole_distribution_rejects(
    seed: int, k: int, spread: float
) -> None:
    """Truth from all 30 tokens, certificates from k; some drafters put their mass into the tail."""
    torch.manual_seed(seed)
    p = torch.randn(200, 30) * 2
    q = p + spread * torch.randn(200, 30)
    outside = torch.randint(30, (200, 2))
    q.scatter_add_(1, outside, 3 * torch.rand(200, 2))  # lift tokens the head may not hold
    seen = JoinedSteps.from_logits(q, Head.from_logits(p, k))
    whole = JoinedSteps.from_logits(q, p)
    assert (seen.kl <= whole.kl + 1e-6).all()  # the head is float32
    for rule in RULES:
        sure, _ = seen.certified(rule)
        assert not (sure & ~whole.accepted(rule)[0]).any(), rule
        accepted, unknown = seen.accepted(rule)
        assert (accepted | unknown)[whole.accepted(rule)[0]].all(), rule
        assert not (accepted & ~whole.accepted(rule)[0]).any(), rule


def test_seeing_the_tail_certifies_more_coverage_than_the_full_kl() -> None:
    torch.manual_seed(0)
    p = torch.randn(3000, 200) * 2.0
    q = p + 0.6 * torch.randn(3000, 200)
    seen = JoinedSteps.from_logits(q, Head.from_logits(p, 8)).certified(Coverage(4))[0]
    full = JoinedSteps.from_logits(q, p).certified(Coverage(4))[0]
    assert seen.float().mean() > full.float().mean() + 0.05


def test_a_step_with_one_unseen_token_above_the_greedy_one_can_be_certified() -> None:
    """By hand: g = .24 and a tail of .10; q swaps them by a hair. Coverage(4) over failures through that one
    token:

    pool {.24, .10, .16}, level 1/6, radius .02989; the divergence is .02970; the full radius is only .0211.
    """
    p = torch.tensor([[0.24, 0.20, 0.18, 0.16, 0.12, 0.10]])
    q = torch.tensor([[0.1699, 0.20, 0.18, 0.16, 0.12, 0.1701]])
    seen = JoinedSteps.from_logits(q.log(), Head.from_probs(p, 5))
    sure, bound = seen.certified(Coverage(4))
    assert float(bound) == pytest.approx(
        0.24 * np.log(1.44) + 0.10 * np.log(0.6) + 0.16 * np.log(0.96), abs=1e-6
    )
    assert bool(sure)
    assert not bool(JoinedSteps.from_logits(q.log(), p.log()).certified(Coverage(4))[0])
    assert bool(seen.accepted(Coverage(4))[0])


@pytest.mark.parametrize("factor", [4.0, float("inf")])
def test_a_wrong_certificate_stops_the_report_and_names_the_step(
    monkeypatch: pytest.MonkeyPatch, factor: float
) -> None:
    torch.manual_seed(0)
    target = 2 * torch.randn(25, 25)
    drafter, trace = Bigram(target + 0.8 * torch.randn(25, 25)), trace_of(target, 8)
    measure_acceptance(drafter, trace, rules=RULES)
    right = views.radius
    monkeypatch.setattr(views, "radius", lambda *a, **k: right(*a, **k).clamp_min(1e-3) * factor)
    with pytest.raises(CertificateViolation, match=r"document \d+, step \d+, rule \w+.*KL [\d.e-]+ nats"):
        measure_acceptance(drafter, trace, rules=RULES)


def test_counts_are_those_of_a_plain_loop() -> None:
    torch.manual_seed(1)
    target = 2 * torch.randn(25, 25)
    table = target + torch.randn(25, 25)
    trace = trace_of(target, 25, greedy=0.5)
    found = measure_acceptance(Bigram(table), trace, rules=RULES, widths=(1, 3), tokens_per_batch=70)
    p, q = target.double().softmax(-1), table.double().softmax(-1)
    steps = np.zeros(len(MARGIN_EDGES) - 1, dtype=int)
    accepted = dict.fromkeys(RULES, 0)
    covered = {1: 0, 3: 0}
    kl = []
    for row in trace:
        for t in torch.nonzero(row.loss_mask)[:, 0].tolist():
            token = int(row.input_ids[t])
            order = p[token].sort(descending=True).values
            steps[int(np.searchsorted(MARGIN_EDGES, float(order[0] - order[1]), "right")) - 1] += 1
            best, greedy = int(q[token].argmax()), int(p[token].argmax())
            for rule in RULES:
                if isinstance(rule, Coverage):
                    accepted[rule] += greedy in q[token].topk(rule.m).indices.tolist()
                else:
                    accepted[rule] += bool(best == greedy or p[token, best] > rule.threshold(p[token]))
            for m in covered:
                covered[m] += greedy in q[token].topk(m).indices.tolist()
            kl.append(float((p[token] * (p[token] / q[token]).log()).sum()))
    assert found.steps.sum(0).tolist() == steps.tolist()
    assert found.realised.sum((0, 1)).tolist() == [accepted[r] for r in RULES]
    assert found.covered.sum((0, 1)).tolist() == list(covered.values())
    assert found.kl.mean() == pytest.approx(np.mean(kl), rel=1e-6)
    rejected = sum(len(r.loss_mask.nonzero()) for r in trace) - covered[1]
    causes = found.rejections
    assert causes["rejected"] == rejected
    assert causes["not_in_top_m"] + causes["in_top_m"] + causes["numerical_tie"] == rejected
    summary = found.summary()
    assert summary["coverage"][0]["all"]["value"] == pytest.approx(covered[1] / len(kl))
    assert summary["rules"][0]["buckets"][0]["low"] == 0.0


def test_a_step_the_head_cannot_judge_is_unknown_not_rejected_for_sure() -> None:
    p = torch.linspace(1.5, 1.0, 12).unsqueeze(0)
    p /= p.sum()
    q = torch.zeros(1, 12)
    q[0, 9] = 5.0
    seen = JoinedSteps.from_logits(q, Head.from_probs(p, 3))
    accepted, unknown = seen.accepted(Multiplicative(0.1))
    assert (bool(accepted), bool(unknown)) == (False, True)
    accepted, unknown = seen.accepted(StrictGreedy())
    assert (bool(accepted), bool(unknown)) == (False, False)


def test_other_vocabularies_and_nan_are_refused() -> None:
    with pytest.raises(ValueError, match="do not share a vocabulary"):
        JoinedSteps.from_logits(torch.zeros(2, 9), torch.zeros(2, 8))
    bad = torch.zeros(3, 8)
    bad[1, 2] = float("nan")
    with pytest.raises(ValueError, match="NaN at step 1 of 3"):
        JoinedSteps.from_logits(bad, torch.zeros(3, 8))


def test_calibration_by_hand() -> None:
    found = Calibration(bins=2)
    found.add(np.array([0.1, 0.3, 0.9, 0.7, 1.0]), np.array([False, True, True, True, False]))
    # lower bin: confidence .2, frequency .5; upper: .8667, .6667 → (2·.3 + 3·.2) / 5
    assert found.expected_error() == pytest.approx((2 * 0.3 + 3 * 0.2) / 5)
    assert found.summary()["steps"] == [2, 3]
    assert found.summary()["frequency"] == [0.5, pytest.approx(2 / 3)]


def test_the_greedy_text_starts_after_the_last_token_the_target_would_not_have_said() -> None:
    target = torch.eye(6).roll(1, 1) * 9  # token i is followed by i + 1
    ids = torch.tensor([3, 0, 1, 4, 5, 0, 1])
    head = Head.from_logits(target[ids], 6)
    counted = torch.tensor([False, True, True, True, True, True, False])
    row = Row(ids, counted, head)
    assert greedy_tail(row) == (3, 6)  # 1 → 4 is not greedy; from 4 on all is
    document = greedy_documents(Rows([row]))[0]
    assert (document.prompt, document.text) == ([3, 0, 1, 4], [5, 0, 1])
    assert document.lead == pytest.approx([9.0] * 3)
    assert greedy_documents(Rows([row]), max_new_tokens=2)[0].text == [5, 0]
    nothing = Row(ids, torch.zeros(7, dtype=torch.bool), head)
    assert greedy_tail(nothing) is None
    with pytest.raises(ValueError, match="greedy continuation"):
        greedy_documents(Rows([nothing]))


def test_depths_and_causes_by_hand() -> None:
    def of(depth: int, accepted: int, committed: int | None = None) -> Round:
        committed = accepted + 1 if committed is None else committed
        offered = tuple(range(4, 4 - min(committed, depth), -1))
        return Round(0, depth, depth, None, accepted, committed, candidates=offered)

    found = Lengths()
    # tokens: [a b c!] [d!] [e! ] [f g]; "!" is the bonus that replaced a rejected token
    rounds = [of(3, 2), of(3, 0), of(3, 0), of(1, 1)]
    ranks = [0, 0, 2, 9, 1, 0, 0]
    lead = [1.0, 1.0, 1.0, 1.0, 1e-4, 1.0, 1.0]
    found.add(rounds, ranks, lead, top_m=4, tie_gap=1e-3)
    assert found.reached == [4, 1, 1]
    assert found.accepted == [2, 1, 0]
    assert found.candidates == [4 * 4, 3, 2]
    assert found.rejections == {
        "rounds": 4, "rejected": 3, "numerical_tie": 1, "not_in_tree": 1, "not_in_top_m": 1, "unknown": 0
    }  # fmt: skip
    blind = Lengths()
    blind.add(rounds, [], lead, top_m=4, tie_gap=1e-3)  # a drafter whose ranks nobody knows
    assert (blind.rejections["rejected"], blind.rejections["unknown"]) == (3, 2)
    knows = [replace(r, bonus_rank=rank) for r, rank in zip(rounds, (9, 0, 0, None), strict=True)]
    blind.add(knows, [], lead, top_m=4, tie_gap=1e-3)
    assert (blind.rejections["unknown"], blind.rejections["not_in_top_m"]) == (2, 1)
    summary = found.summary()
    assert summary["tau"]["value"] == pytest.approx(7 / 4)
    assert summary["nodes_per_pass"] == pytest.approx(10 / 4)


def test_a_tie_is_wider_for_a_target_recorded_in_half_precision() -> None:
    traces: Any = [SimpleNamespace(meta=SimpleNamespace(dtype=d)) for d in ("float32", "bfloat16", "float16")]
    assert [tie_gap_of(trace) for trace in traces] == [1e-3, 0.1, 0.1]
    assert tie_gap_of([]) == 1e-3
