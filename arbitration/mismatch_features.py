"""Features of a mismatch for an arbitration policy: scalars of logits that verification has computed anyway.

At a mismatch the drafter's token x differs from the target's greedy token y. Both distributions there are
known: the target's from its verifying pass, the drafter's from its proposal of x.

Letters: N mismatches · V vocabulary · F features.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from certdraft.certificates import Head, StrictGreedy, coarse_kl, margin, radius

# Order of the F axis; a saved policy names the features it was trained on.
FEATURES = (
    "target_logp",  # log p(y)
    "target_log_ratio",  # log p(y) − log p(x), ≥ 0
    "target_margin",  # p(y) − p(second), the certificate's margin
    "target_entropy",  # H(p)
    "target_rank",  # log(1 + rank of x under p), ≥ log 2
    "drafter_logp",  # log q(x)
    "drafter_log_ratio",  # log q(x) − log q(y), ≥ 0
    "drafter_entropy",  # H(q)
    "kl",  # KL(p‖q) with the target's tail beyond its 64 best tokens as one bucket
    "radius",  # KL radius of strict greedy acceptance: below it there is no mismatch
    "depth",  # draft tokens of this round in front of x
    "overrides",  # log(1 + draft tokens taken at mismatches so far)
    "committed",  # log(1 + tokens of the text so far)
)
NUM_STATIC = 10  # the first ones; the others depend on the decisions before
_HEAD = 64
_FLOOR = -20.0  # nats; log-probabilities are clamped here
_ENTRIES_AT_ONCE = 1 << 24  # logits of each model: a large vocabulary times thousands of texts is gigabytes


def static_features(
    target_logits: Float[Tensor, "N V"],
    drafter_logits: Float[Tensor, "N V"],
    draft: Int[Tensor, " N"],
    target: Int[Tensor, " N"],
) -> Float[Tensor, "N S"]:
    """Return the features of a mismatch that depend on its two distributions alone.

    Args:
        target_logits: the target's, fp32.
        drafter_logits: the drafter's at the same place, fp32.
        draft: x, the draft token.
        target: y, the target's greedy token.

    Returns:
        fp32, finite; the first `NUM_STATIC` entries of `FEATURES`, in nats except for the margin.
    """
    size = max(1, _ENTRIES_AT_ONCE // target_logits.shape[-1])
    if len(target_logits) > size:
        parts = zip(
            *(each.split(size) for each in (target_logits, drafter_logits, draft, target)), strict=True
        )
        return torch.cat([static_features(*part) for part in parts])
    head = Head.from_logits(target_logits, min(_HEAD, target_logits.shape[-1]))
    logp, logq = target_logits.log_softmax(-1), drafter_logits.log_softmax(-1)
    x, y = draft[:, None], target[:, None]
    target_x, target_y = (logp.gather(-1, token)[:, 0].clamp_min(_FLOOR) for token in (x, y))
    drafter_x, drafter_y = (logq.gather(-1, token)[:, 0].clamp_min(_FLOOR) for token in (x, y))
    rank = (target_logits > target_logits.gather(-1, x)).sum(-1)
    columns = [
        target_y,
        target_y - target_x,
        margin(head),
        _entropy(logp),
        torch.log1p(rank.float()),
        drafter_x,
        drafter_x - drafter_y,
        _entropy(logq),
        coarse_kl(head, logq.clamp_min(-1e4)).clamp_max(-_FLOOR),
        radius(head, StrictGreedy()).clamp_max(-_FLOOR),
    ]
    return torch.stack([column.float() for column in columns], dim=-1)


def with_history(
    static: Float[Tensor, "N S"],
    depth: Int[Tensor, " N"],
    overrides: Int[Tensor, " N"],
    committed: Int[Tensor, " N"],
) -> Float[Tensor, "N F"]:
    """Return all features: the static ones, and the position of the mismatch in round and text.

    Args:
        static: from `static_features`.
        depth: draft tokens of this round in front of x.
        overrides: draft tokens taken at mismatches of this text so far.
        committed: new tokens of this text in front of x.
    """
    history = (depth.float(), overrides.float().log1p(), committed.float().log1p())
    return torch.cat([static, torch.stack(history, dim=-1).to(static.device)], dim=-1)


def _entropy(logp: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
    """Nats, ≥ 0; a token of probability 0 adds nothing."""
    return -(logp.exp() * logp.clamp_min(-1e4)).sum(-1)
