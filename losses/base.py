"""The interface of all losses: drafter logits and a target in, one number per token position out.

A loss has one of four views of a position. "head": K + 1 classes on both sides, the target's top-k and one
bucket (`on_coarse`). "token": the same with the data's next token in place of the top-k. "picked": a few
of the drafter's logits (`on_picked`). "full": the whole vocabulary (`on_full`). Masks, weights and reduction
are in `losses.reduction`. Axes: N token positions · V vocabulary · C coarse classes.
"""

from __future__ import annotations

from typing import Literal

from jaxtyping import Float, Int
from torch import Tensor, nn

from certdraft.losses.coarse_logits import coarsen, work_dtype
from certdraft.losses.target import OnlineTarget, TargetBatch

View = Literal["head", "token", "picked", "full"]


def classes(view: View, target: TargetBatch) -> Int[Tensor, "N K"]:
    """Return the tokens that a view keeps apart; all others are one bucket."""
    if view == "head":
        return target.top_ids
    assert view == "token"
    assert target.next_ids is not None
    return target.next_ids.clamp(min=0)[:, None]


class Loss(nn.Module):
    """Base of every loss: `loss(logits [N, V], target) -> [N]`.

    Attributes:
        requires: "full" when the loss cannot be computed from the target's head, "token" when it needs the
            data's next token.
        min_head: head entries K it needs at every step (or the whole vocabulary, if that is smaller).
    """

    requires: View = "head"
    min_head: int = 1

    def forward(self, logits: Float[Tensor, "N V"], target: TargetBatch) -> Float[Tensor, " N"]:
        """Per-step loss, at least fp32, no reduction.

        Raises:
            ValueError: shapes disagree, or the target lacks what the loss `requires`.
        """
        self.check(logits, target)
        view = self.view(target)
        if view == "full":
            return self.on_full(logits.to(work_dtype(logits.dtype)), target)
        if view == "picked":
            picked = logits.gather(-1, self.pick(logits.detach(), target))
            return self.on_picked(picked.to(work_dtype(logits.dtype)), target)
        return self.on_coarse(coarsen(logits, classes(view, target)), target)

    def view(self, target: TargetBatch | OnlineTarget) -> View:
        """Return the view that this loss takes of this target."""
        return self.requires

    @property
    def overrides_forward(self) -> bool:
        """Whether a subclass has its own `forward`, which evaluation in chunks and mixtures must call."""
        return type(self).forward is not Loss.forward

    def at(self, progress: float) -> None:
        """Set the share of the training that is done, in [0, 1]; read by schedules (`Ramp`)."""
        for part in self.modules():
            if part is not self and isinstance(part, Loss):
                part.at(progress)

    def settle(self) -> None:
        """End an optimiser step, once its gradients are there; parts that measure while they train go on."""
        for part in self.modules():
            if isinstance(part, Loss):
                part.take_up()

    def take_up(self) -> None:
        """Take up what this loss, without its parts, measured in the optimiser step; nothing by default."""

    def on_coarse(self, coarse_logits: Float[Tensor, "N C"], target: TargetBatch) -> Float[Tensor, " N"]:
        """Per-step loss from the drafter's coarse logits (`losses.coarse_logits`)."""
        raise NotImplementedError(f"{self!r} does not work on the head of the target")

    def on_full(self, logits: Float[Tensor, "N V"], target: TargetBatch) -> Float[Tensor, " N"]:
        """Per-step loss from the drafter's logits over the whole vocabulary, fp32 or float64."""
        raise NotImplementedError(f"{self!r} does not work on the full vocabulary")

    def pick(self, logits: Float[Tensor, "N V"], target: TargetBatch) -> Int[Tensor, "N S"]:
        """The tokens whose logits matter, given all of them; no gradient flows through the choice."""
        raise NotImplementedError(f"{self!r} is not a loss of a few logits")

    def on_picked(self, picked: Float[Tensor, "N S"], target: TargetBatch) -> Float[Tensor, " N"]:
        """Per-step loss from the picked logits."""
        raise NotImplementedError(f"{self!r} is not a loss of a few logits")

    def check(self, logits: Tensor, target: TargetBatch) -> None:
        """Raise ValueError for logits and a target that do not fit."""
        if logits.dim() != 2 or logits.shape[0] != len(target):
            raise ValueError(
                f"{self!r}: logits have shape {list(logits.shape)}, expected [{len(target)}, V] for a target "
                f"of {len(target)} steps. Flatten both over the counted steps: logits[mask], head[mask]."
            )
        if logits.shape[1] != target.vocab_size:
            raise ValueError(
                f"{self!r}: the drafter has {logits.shape[1]} tokens in its vocabulary, the target "
                f"{target.vocab_size}. Both must use the same tokenizer and padding of the output layer."
            )
        self.check_target(target)

    def check_target(self, target: TargetBatch) -> None:
        """Raise ValueError for a target that keeps too little for this loss."""
        if target.num_kept < min(self.min_head, target.vocab_size):
            raise ValueError(
                f"{self!r} needs the {self.min_head} most probable target tokens at every step; this "
                f"target keeps K = {target.num_kept}. Record the trace with K >= {self.min_head}, or set "
                "the loss to fewer."
            )
        if self.requires == "token" and target.next_ids is None:
            raise ValueError(
                f"{self!r} needs the data's next token at every step; give the target its next_ids, "
                "e.g. TargetBatch(head, next_ids=...), or take HardCE, whose label is the target's own."
            )
        if self.requires == "full" and target.logp is None:
            raise ValueError(
                f"{self!r} needs the target's full distribution; this target keeps only its K = "
                f"{target.num_kept} most probable tokens. Use vocabulary=auto (head and one bucket for the "
                "tail), or an online target."
            )
