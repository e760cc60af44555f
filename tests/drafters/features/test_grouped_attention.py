"""Grouped attention against a dense softmax over everything, whatever the blocks it walks in."""

import pytest
import torch
from torch import Tensor

from certdraft.drafters.features import grouped_attention as module
from certdraft.drafters.features.grouped_attention import grouped_attention
from certdraft.drafters.features.visible_spans import VisibleSpans

R, HEADS, KV, A, Q, T, M, D = 2, 4, 2, 7, 3, 11, 3, 8
Parts = tuple[Tensor, tuple[Tensor, Tensor], tuple[Tensor, Tensor], VisibleSpans]
CAUSAL = torch.ones(Q, M, dtype=torch.bool).tril()


def parts(dtype: torch.dtype = torch.float64, windows: bool = False) -> Parts:
    """Groups in the order of the text, as blocks at ascending anchors; the first one sees no context.

    Windows are of four tokens, each query's starting one later, with order inside the group.
    """
    draw = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64).to(dtype).requires_grad_()

    anchors = torch.tensor([0, 1, 3, 4, 6, 7, 11])
    start = (torch.rand(R, A, 1, generator=draw) * (anchors[:, None] + 1)).long()  # sometimes the anchor
    if windows:
        start = torch.maximum(start, anchors[:, None] + torch.arange(Q) - 3)
    visible = VisibleSpans(start, anchors.expand(R, A), CAUSAL if windows else None)
    context = normal(R, KV, T, D), normal(R, KV, T, D)
    return normal(R, HEADS, A, Q, D), context, (normal(R, KV, A, M, D), normal(R, KV, A, M, D)), visible


def dense(
    queries: Tensor, context: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor] | None, visible: VisibleSpans
) -> Tensor:  # fmt: skip
    """Every query against its own copy of every key."""
    repeats = queries.shape[1] // context[0].shape[1]
    keys, values = (x.repeat_interleave(repeats, 1)[:, :, None].expand(-1, -1, A, -1, -1) for x in context)
    index = torch.arange(T)
    mask = (index >= visible.start[..., None]) & (index < visible.stop[..., None, None])
    mask = mask[:, None].expand(-1, -1, -1, queries.shape[3], -1)
    if own is not None:
        keys, values = (
            torch.cat([x, y.repeat_interleave(repeats, 1)], 3)
            for x, y in zip((keys, values), own, strict=True)
        )
        seen = torch.ones(queries.shape[3], own[0].shape[3], dtype=torch.bool)
        seen = (seen if visible.own is None else visible.own).expand(*mask.shape[:-1], -1)
        mask = torch.cat([mask, seen], -1)
    scores = (queries @ keys.transpose(-1, -2)) * queries.shape[-1] ** -0.5
    return scores.masked_fill(~mask, -torch.inf).softmax(-1) @ values


@pytest.mark.parametrize("held", [1, 1000, 1 << 20], ids=["a group at a time", "three", "all"])
@pytest.mark.parametrize(("with_own", "windows"), [(True, False), (False, False), (True, True)])
def test_values_and_gradients_are_those_of_dense_attention(
    held: int, with_own: bool, windows: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_CPU_SCORES", held)
    queries, context, own, visible = parts(windows=windows)
    if not with_own:
        visible = VisibleSpans(
            visible.start.clamp(max=T - 1),
            torch.maximum(visible.stop, visible.start[..., 0] + 1).clamp(max=T),
        )
    leaves = [queries, *context, *(own if with_own else ())]
    found, wanted = (
        f(queries, context, own if with_own else None, visible) for f in (grouped_attention, dense)
    )
    torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-12)
    weight = torch.randn_like(wanted)
    for mine, theirs in zip(
        torch.autograd.grad(found, leaves, weight), torch.autograd.grad(wanted, leaves, weight), strict=True
    ):
        torch.testing.assert_close(mine, theirs, rtol=1e-11, atol=1e-12)


def test_scores_are_not_kept() -> None:
    """What waits for the backward pass grows with the tokens, not with their product."""
    long = 512
    queries = torch.randn(R, HEADS, long, Q, D, requires_grad=True)
    context = torch.randn(2, R, KV, long, D, requires_grad=True).unbind()
    own = torch.randn(2, R, KV, long, M, D, requires_grad=True).unbind()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        past = VisibleSpans(
            torch.zeros(R, long, 1, dtype=torch.long), torch.arange(1, long + 1).expand(R, -1)
        )
        grouped_attention(queries, context, own, past)
    floats = sum(x.numel() for x in kept if x.is_floating_point())
    assert floats < 3 * (queries.numel() + 2 * context[0].numel() + 2 * own[0].numel())
    assert floats < R * HEADS * long * Q * long / 4


@pytest.mark.parametrize("autocast", [True, False])
def test_half_precision_sums_in_float32(autocast: bool) -> None:
    """bf16 from the model or from autocast, where projections and norms disagree about the dtype."""
    wanted = dense(*parts())
    queries, context, own, visible = parts(torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        found = grouped_attention(queries, (context[0].bfloat16(), context[1]), own, visible)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found.double(), wanted, rtol=2e-2, atol=2e-2)
    found.float().square().sum().backward()
    assert all(
        leaf.grad is not None and torch.isfinite(leaf.grad).all() for leaf in (queries, *context, *own)
    )
