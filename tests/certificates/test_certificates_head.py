"""Heads and the selection under them: right tokens, right masses, right complaints."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from strategies import distributions

from certdraft.certificates import Head, entropy, kl_divergence, kl_divergence_logp
from certdraft.certificates.selection import largest


@pytest.mark.parametrize("vocab_size", [1, 2, 31, 1000, 1024, 4099, 40_001])
@pytest.mark.parametrize("levels", [3, 50, 10**9])
def test_largest_equals_a_sort(vocab_size: int, levels: int) -> None:
    x = torch.randint(levels, (6, vocab_size)).float()  # few levels: ties everywhere, also between columns
    for k in (1, 2, 9, 33):
        if k > vocab_size:
            continue
        values, ids = largest(x, k)
        expected = x.sort(-1, descending=True).values[:, :k]
        torch.testing.assert_close(values, expected, rtol=0, atol=0)
        torch.testing.assert_close(x.gather(-1, ids), values, rtol=0, atol=0)
        assert all(len(set(row)) == k for row in ids.tolist()), "no token twice"
        first = [row.index(max(row)) for row in x.tolist()]
        assert ids[:, 0].tolist() == first, "the greedy token is the lowest index of the maximum"


def test_largest_finds_the_first_of_more_ties_than_columns() -> None:
    x = torch.zeros(1, 8192)
    x[0, 5000:] = 1.0  # every column of the selection holds the maximum
    assert int(largest(x, 2)[1][0, 0]) == 5000


def test_largest_refuses_the_impossible() -> None:
    with pytest.raises(ValueError, match="asked for the 5 largest of 3 entries"):
        largest(torch.zeros(3), 5)


@pytest.mark.parametrize("vocab_size", [5, 3000])
def test_from_logits_against_float64(vocab_size: int) -> None:
    z = 4 * torch.randn(3, 4, vocab_size)
    head = Head.from_logits(z, 4)
    logp = z.double().log_softmax(-1)
    expected, ids = logp.topk(4, dim=-1)
    assert torch.equal(head.ids, ids)
    torch.testing.assert_close(head.logp.double(), expected, rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(head.entropy.double(), -(logp.exp() * logp).sum(-1), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(head.tail_mass.double(), 1 - expected.exp().sum(-1), rtol=1e-4, atol=1e-6)
    shifted = Head.from_logits(z + 64.0, 4)
    assert torch.equal(shifted.ids, ids), "a shift of all logits changes nothing"


def test_confident_steps_keep_their_tail() -> None:
    z = torch.tensor([0.0, -30.0, -31.0, -32.0])
    head = Head.from_logits(z, 2)
    others = math.exp(-30) + math.exp(-31) + math.exp(-32)
    assert float(head.lse_gap) == pytest.approx(others, rel=1e-6)
    assert float(head.tail_mass) == pytest.approx(math.exp(-31) + math.exp(-32), rel=1e-5)
    assert float(Head.from_logits(z, 4).tail_mass) == 0.0
    assert float(Head.from_logits(z, 9).tail_logp) == -math.inf
    assert float(head.entropy) == pytest.approx(others * 31, rel=0.1)


@given(distributions(min_size=1), st.integers(1, 12))
def test_from_probs_agrees_with_the_distribution(p: torch.Tensor, kept: int) -> None:
    head = Head.from_probs(p, kept)
    assert head.num_kept == min(kept, len(p))
    assert head.vocab_size == len(p)
    torch.testing.assert_close(head.p, p.sort(descending=True).values[:kept], rtol=1e-12, atol=1e-300)
    torch.testing.assert_close(p[head.ids], head.p, rtol=1e-12, atol=1e-300)
    assert int(head.greedy) == int(p.argmax())
    assert float(head.gap[0]) == 0.0
    assert (head.gap >= 0).all()
    assert float(head.tail_mass) == pytest.approx(max(0.0, 1 - float(head.p.sum())), abs=1e-12)
    torch.testing.assert_close(head.entropy, torch.special.entr(p).sum(), rtol=1e-9, atol=1e-12)


def test_masked_tokens_have_probability_zero() -> None:
    z = torch.tensor([[1.0, -torch.inf, 0.0, -torch.inf]])
    head = Head.from_logits(z, 4)
    assert head.p[0, 2:].tolist() == [0.0, 0.0]
    assert float(head.entropy) == pytest.approx(float(entropy(z.softmax(-1))), rel=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("vocab_size", [8, 5000])
def test_undefined_logits_name_their_row(bad: float, vocab_size: int) -> None:
    z = torch.zeros(3, 2, vocab_size)
    z[1, 1, 3] = bad
    with pytest.raises(
        ValueError, match=r"logits: row \[1, 1\] holds NaN, \+inf or nothing finite.* 1 of 6 rows"
    ):
        Head.from_logits(z, 2)
    with pytest.raises(ValueError, match=r"row \[\] holds"):
        Head.from_logits(torch.full((4,), -torch.inf), 2)


def test_half_precision_logits_are_read_in_float32() -> None:
    z = torch.randn(2, 50).bfloat16()
    head = Head.from_logits(z, 5)
    assert head.gap.dtype == torch.float32
    torch.testing.assert_close(head.lse_gap, Head.from_logits(z.float(), 5).lse_gap, rtol=0, atol=0)


def test_indexing_moves_along_the_steps_only() -> None:
    head = Head.from_logits(torch.randn(3, 5, 20), 4)
    mask = torch.rand(3, 5) > 0.5
    for index, shape in [(1, (5,)), ((slice(None), 2), (3,)), ((..., 0), (3,)), (mask, (int(mask.sum()),))]:
        part = head[index]
        assert part.shape == shape
        assert part.gap.shape == (*shape, 4)
        assert torch.equal(part.lse_gap, head.lse_gap[index])
        assert torch.equal(part.greedy, head.greedy[index])
        assert torch.equal(part.entropy, head.entropy[index])
    assert torch.equal(head.truncate(2).ids, head.ids[..., :2])
    torch.testing.assert_close(
        head.truncate(2).tail_mass, head.tail_mass + head.p[..., 2:].sum(-1), rtol=1e-5, atol=1e-6
    )
    assert head.to("cpu").vocab_size == 20
    assert Head.from_logits(torch.zeros(0, 20), 4).shape == (0,)


def test_shapes_that_do_not_fit_are_refused() -> None:
    ids, gap = torch.zeros(2, 3, dtype=torch.long), torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"got \[2, 3\], \[2, 3\] and \[3\]"):
        Head(ids, gap, torch.zeros(3), 9)
    with pytest.raises(ValueError, match="a head of 3 entries does not fit a vocabulary of 2"):
        Head(ids, gap, torch.zeros(2), 2)
    with pytest.raises(ValueError, match=r"entropy has shape \[1\], lse_gap \[2\]"):
        Head(ids, gap, torch.zeros(2), 9, torch.zeros(1))
    with pytest.raises(ValueError, match="cannot cut a head of 3 entries to 4"):
        Head(ids, gap, torch.zeros(2), 9).truncate(4)


@given(distributions(min_size=2), st.data())
def test_kl_is_zero_only_at_equality_and_knows_its_support(p: torch.Tensor, data: st.DataObject) -> None:
    q = data.draw(distributions(min_size=len(p), max_size=len(p)))
    value = float(kl_divergence(p, q))
    assert float(kl_divergence(p, p)) == 0.0
    assert value >= 0.5 * float((p - q).abs().sum()) ** 2 - 1e-12, "Pinsker"
    assert math.isinf(value) == bool(((q == 0) & (p > 0)).any())
    torch.testing.assert_close(kl_divergence_logp(p.log(), q.log()), kl_divergence(p, q))
