"""A loss and step weights tried on two made-up draft tokens, before anything is recorded or loaded."""

from __future__ import annotations

import copy

import torch
from torch import nn

from certdraft.losses import Loss, OnlineTarget, StepWeights, TargetBatch
from certdraft.train.target_outputs import TargetSettings


def check_loss(
    loss: Loss,
    step_weights: StepWeights | None,
    *,
    paths: bool,
    num_kept: int | None,
    vocab_size: int | None = None,
    online: TargetSettings | None = None,
    on_policy: bool = False,
) -> None:
    """Refuse what a training step would refuse, at any point of a schedule and in the same words.

    Losses and weights of other packages are not tried: they may expect a real vocabulary, or a GPU.

    Args:
        loss: of the config.
        step_weights: of the config.
        paths: the drafter is trained along draft paths, so that draft tokens have a depth.
        num_kept: K of the trace; not known when None.
        vocab_size: V of the trace; large when not known.
        online: of a target that runs beside the drafter and gives the distributions; the trace's when None.
        on_policy: the drafter writes text itself.

    Raises:
        ValueError: the loss needs more of the target than there is, or depths where there are none.
    """
    judge = online if online is not None and online.logits else None
    kept = num_kept if judge is None else judge.num_kept
    if kept is None or not _ours(loss) or not (step_weights is None or _ours(step_weights)):
        return
    loss, step_weights = copy.deepcopy(loss), copy.deepcopy(step_weights)  # some measure as they go
    logits = torch.linspace(0.0, -1.0, vocab_size or 1 + max(kept, loss.min_head)).repeat(2, 1)
    labels = torch.zeros(2, dtype=torch.long)
    depths = torch.tensor([1, 2]) if paths else None
    rejected = torch.tensor([-1, 0]) if on_policy else None
    target: TargetBatch | OnlineTarget
    if judge is not None:
        hidden, weight = torch.ones(2, 1), logits[0, :, None]
        target = OnlineTarget(hidden, weight, kept, judge.full, labels, None, depths, rejected)
    else:
        head = TargetBatch.from_logits(logits, kept, full=False).head
        target = TargetBatch(head, None, labels, 0, depths, rejected)
    with torch.no_grad():
        for progress in (0.0, 0.25, 0.5, 0.75, 1.0):
            loss.at(progress)
            loss(logits.clone(), target[:])
        if step_weights is None:
            return
        nll = step_weights.nll_loss(logits.clone(), target[:]) if step_weights.needs_nll else None
        mask, documents = torch.ones(1, 2, dtype=torch.bool), torch.zeros(1, 2, dtype=torch.long)
        if paths:
            step_weights.on_drafts(target, mask, nll)
        else:
            step_weights(target, mask, documents, nll)


def _ours(module: nn.Module) -> bool:
    """Whether a loss or weights, and all their parts, are those of `certdraft.losses`."""
    return all(type(part).__module__.startswith(("certdraft.losses.", "torch.")) for part in module.modules())
