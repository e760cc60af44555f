"""The most probable next tokens of a logits row, in a fixed order, and the check that rows
are finite.

Order: by logit, then by id, the lowest first, so that rank 0 is the greedy token and a rank means the same in
the live loop, in replay and on every machine (`torch.topk` does not order equal values). Letters: K
rows, V vocabulary.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float, Int
from torch import Tensor

from certdraft.decoding.trees.tree import Row


class NonFiniteLogits(ValueError):
    """Drafter logits hold NaN or +inf, or nothing but -inf; the loop decodes such a round without a draft."""


def top_rows(
    logits: Float[Tensor, "K V"],
    width: int,
    temperature: float = 1.0,
    draft_ids: Int[Tensor, " D"] | None = None,
) -> list[Row]:
    """Return the `width` most probable tokens of each row with their log-probabilities, nats, <= 0.

    Args:
        logits: fp32 next-token logits.
        width: tokens to keep per row, >= 1; clipped to V.
        temperature: divides the logits before the softmax, > 0; does not change the order.
        draft_ids: the tokens that the drafter can propose, ascending; all others are left out. The logits may
            be of these only, [K, D].

    Raises:
        NonFiniteLogits: a row holds NaN or +inf, or is -inf everywhere.
    """
    if draft_ids is not None and logits.shape[-1] != len(draft_ids):
        logits = logits[:, draft_ids]
    size = logits.shape[-1]
    width = min(width, size)
    if width == 1:
        values, ids = logits.max(dim=-1, keepdim=True)  # the first maximum, hence the lowest id
    else:
        values, ids = logits.topk(min(width + 1, size), dim=-1)
        tied = (values[:, 1:] == values[:, :-1]).any(-1) & values[:, 0].isfinite()
        values, ids = values[:, :width], ids[:, :width]
        if bool(tied.any()):
            ids = ids.index_put((tied,), _first_of_ties(logits[tied], values[tied]))
    if temperature != 1.0:
        values, logits = values / temperature, logits / temperature
    logp = (values - logits.logsumexp(dim=-1, keepdim=True)).clamp_max_(0.0).tolist()
    for index, row in enumerate(logp):
        if not math.isfinite(row[0]):
            raise NonFiniteLogits(
                f"row {index} of {len(logp)} drafter logits is not finite: its maximum is {values[index, 0]}"
            )
    if draft_ids is not None:
        ids = draft_ids[ids]
    return [Row(*pair) for pair in zip(logp, ids.tolist(), strict=True)]


def _first_of_ties(logits: Float[Tensor, "K V"], values: Float[Tensor, "K W"]) -> Int[Tensor, "K W"]:
    """Return the ids of the W largest logits, `values`, the lowest ids first among equal ones."""
    least = values[:, -1:]
    level = logits == least
    room = (values == least).sum(-1, keepdim=True)  # places left for tokens level with the last one
    chosen = (logits > least) | (level & (level.cumsum(-1) <= room))
    ids = chosen.nonzero()[:, 1].view(values.shape)  # ascending
    order = logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True).indices
    return ids.gather(-1, order)


def greedy_ids(logits: Float[Tensor, "K V"]) -> list[int]:
    """The target's greedy token of each row, the lowest id at exact ties.

    Raises:
        ValueError: a row's maximum is NaN or infinite.
    """
    values, ids = logits.max(dim=-1)  # the first maximum
    for index, value in enumerate(values.tolist()):
        if not math.isfinite(value):
            raise ValueError(
                f"target logits are not finite (row {index} of this pass has maximum {value}), so it has no "
                "greedy token. Check the target's weights and dtype (float16 overflows early)."
            )
    return ids.tolist()


def rank_of(logits: Float[Tensor, "K V"], tokens: Int[Tensor, " K"]) -> Int[Tensor, " K"]:
    """Rank of each token in its row, in the order above; 0 is the greedy token.

    Raises:
        NonFiniteLogits: as `top_rows`.
    """
    best = logits.amax(dim=-1)
    if not bool(best.isfinite().all()):
        raise NonFiniteLogits(
            f"{int((~best.isfinite()).sum())} of {len(best)} rows of drafter logits are not finite"
        )
    own = logits.gather(-1, tokens[:, None])
    lower = torch.arange(logits.shape[-1], device=logits.device) < tokens[:, None]
    return (logits > own).sum(-1) + ((logits == own) & lower).sum(-1)
