"""A loss and step weights tried on two made-up draft tokens, before anything is recorded or loaded."""

from __future__ import annotations

import copy

import torch

from certdraft.losses import Loss, OnlineTarget, StepWeights, TargetBatch
from certdraft.train.target_outputs import TargetSettings


def check_loss(
    loss: Loss,
    step_weights: StepWeights | None,
    *,
    paths: bool,
    num_kept: int | None,
    online: TargetSettings | None = None,
    on_policy: bool = False,
) -> None:
    """Refuse what the first training step would refuse, in the same words.

    Args:
        loss: of the config.
        step_weights: of the config.
        paths: the drafter is trained along draft paths, so that draft tokens have a depth.
        num_kept: K of the trace; not known when None.
        online: of a target that runs beside the drafter and gives the distributions; the trace's when None.
        on_policy: the drafter writes text itself.

    Raises:
        ValueError: the loss needs more of the target than there is, or depths where there are none.
    """
    judged_online = online is not None and online.logits
    kept = online.num_kept if online is not None and judged_online else num_kept
    if kept is None:
        return
    logits = torch.linspace(0.0, -1.0, 1 + max(kept, loss.min_head)).repeat(2, 1)
    labels = torch.zeros(2, dtype=torch.long)
    depths = torch.tensor([1, 2]) if paths else None
    rejected = torch.tensor([-1, 0]) if on_policy else None
    target: TargetBatch | OnlineTarget
    if online is not None and judged_online:
        hidden, weight = torch.ones(2, 1), logits[0, :, None]
        target = OnlineTarget(hidden, weight, kept, online.full, labels, None, depths, rejected)
    else:
        head = TargetBatch.from_logits(logits, kept, full=False).head
        target = TargetBatch(head, None, labels, 0, depths, rejected)
    loss = copy.deepcopy(loss)  # some measure as they go
    with torch.no_grad():
        loss(logits.clone(), target[:])
        if step_weights is None:
            return
        nll = step_weights.nll_loss(logits.clone(), target[:]) if step_weights.needs_nll else None
        mask, documents = torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.long)
        if paths:
            step_weights.on_drafts(target, mask, nll)
        else:
            step_weights(target, mask, documents, nll)
