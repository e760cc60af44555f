"""The target of a loss: the top-k at every token position, and the full distribution where it is known.

A `TargetBatch` has its steps flattened to one axis and everything in fp32 (float64 stays float64). It is
data: no gradient flows into it.
Axes: N steps · V vocabulary · K kept head entries · C = K + 1 coarse classes.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from certdraft.certificates import Head, margin
from certdraft.losses.coarse_logits import ABSENT, work_dtype
from certdraft.support import project_fp32

# A tail lighter than this cannot be told from rounding: it is one minus a sum of K fp32 probabilities.
MIN_TAIL_LOGP = -18.0
BY_STEP = ("next_ids", "depths", "rejected")  # what both kinds of target know of a step, or None


def _at(values: Tensor | None, index: Any) -> Tensor | None:
    return None if values is None else values[index]


@dataclass(frozen=True)
class TargetBatch:
    """The target at N steps.

    Args:
        head: the K most probable tokens of each step, steps on one axis:
            `TargetBatch(batch.head[batch.loss_mask])`.
        logp: log-probabilities over the full vocabulary, nats; None when only the head was stored.
        next_ids: the token that follows in the data, −1 where none does; only `TokenCE` needs it.
        num_absent: how many of the last classes the drafter has no logit for; see `DraftVocabulary`.
        depths: draft depth of each step, from 1; None where a step lies at several, as in the training of
            causal drafters.
        rejected: draft tokens since the first one that the target rejected, 0 at that one, −1 before it and
            in text that the drafter did not write; None where there is no round of its own.

    Raises:
        ValueError: steps not on one axis, or `logp`, `next_ids`, `depths` or `rejected` of another shape than
            the head.
    """

    head: Head
    logp: Float[Tensor, "N V"] | None = None
    next_ids: Int[Tensor, " N"] | None = None
    num_absent: int = 0
    depths: Int[Tensor, " N"] | None = None
    rejected: Int[Tensor, " N"] | None = None

    def __post_init__(self) -> None:
        if self.head.ids.dim() != 2:
            shape = list(self.head.ids.shape)
            raise ValueError(
                f"TargetBatch: the head has shape {shape}; losses see steps on one axis [N, K]. "
                "Select the counted steps first: TargetBatch(head[loss_mask])."
            )
        dtype = work_dtype(self.head.gap.dtype)
        head = replace(
            self.head,
            ids=self.head.ids.long(),
            gap=self.head.gap.detach().to(dtype),
            lse_gap=self.head.lse_gap.detach().to(dtype),
        )
        object.__setattr__(self, "head", head)
        if self.logp is not None:
            expected = (len(head.ids), head.vocab_size)
            if tuple(self.logp.shape) != expected:
                raise ValueError(
                    f"TargetBatch: logp has shape {list(self.logp.shape)}, expected {list(expected)}."
                )
            object.__setattr__(self, "logp", self.logp.detach().to(dtype))
        for name in BY_STEP:
            values: Tensor | None = getattr(self, name)
            if values is not None and tuple(values.shape) != (len(head.ids),):
                raise ValueError(
                    f"TargetBatch: {name} has shape {list(values.shape)}, expected [{len(head.ids)}]."
                )

    @classmethod
    def from_logits(
        cls,
        logits: Float[Tensor, "N V"],
        k: int,
        full: bool = True,
        next_ids: Int[Tensor, " N"] | None = None,
    ) -> TargetBatch:
        """The target from its own logits.

        Args:
            logits: target logits; fp32 where a margin matters.
            k: head entries to keep, at most V.
            full: keep the full log-probabilities as well ([N, V] in memory).
            next_ids: the token that follows in the data, −1 where none does.

        Raises:
            ValueError: NaN or infinite logits, with the row.
        """
        logits = logits.detach()
        head = Head.from_logits(logits, min(k, logits.shape[-1]))
        logp = logits.to(work_dtype(logits.dtype)).log_softmax(-1) if full else None
        return cls(head, logp, next_ids)

    def __len__(self) -> int:
        return len(self.head.ids)

    def __getitem__(self, index: Any) -> TargetBatch:
        """The steps of a slice, a mask or an index tensor."""
        by_step = {name: _at(getattr(self, name), index) for name in BY_STEP}
        return TargetBatch(self.head[index], _at(self.logp, index), num_absent=self.num_absent, **by_step)

    def pad(self, logits: Float[Tensor, "N D"]) -> Float[Tensor, "N V"]:
        """The drafter's logits over all V classes, far below any other for those it cannot propose."""
        return functional.pad(logits, (0, self.num_absent), value=ABSENT) if self.num_absent else logits

    def select(self, mask: Bool[Tensor, " N"]) -> TargetBatch:
        """The steps where the mask is True."""
        return self[mask]

    def to(self, device: torch.device | str) -> TargetBatch:
        """The same target on another device."""
        found = {name: getattr(self, name) for name in ("logp", *BY_STEP)}
        moved = {name: None if values is None else values.to(device) for name, values in found.items()}
        return TargetBatch(self.head.to(device), num_absent=self.num_absent, **moved)

    @property
    def has_full(self) -> bool:
        """The full distribution is at hand."""
        return self.logp is not None

    @property
    def vocab_size(self) -> int:
        """V."""
        return self.head.vocab_size

    @property
    def num_kept(self) -> int:
        """K."""
        return self.head.ids.shape[-1]

    @property
    def greedy(self) -> Int[Tensor, " N"]:
        """The greedy token x0."""
        return self.head.ids[:, 0]

    @property
    def top_ids(self) -> Int[Tensor, "N K"]:
        """The K most probable tokens, descending."""
        return self.head.ids

    @property
    def top_logp(self) -> Float[Tensor, "N K"]:
        """Their log-probabilities, nats."""
        return -self.head.gap - self.head.lse_gap[:, None]

    @property
    def tail_logp(self) -> Float[Tensor, " N"]:
        """Log of the mass outside the head, nats; −inf when that mass rounds to nothing."""
        return self.head.tail_logp

    @property
    def margin(self) -> Float[Tensor, " N"]:
        """p(x0) − p(x1), in [0, 1]; needs K ≥ 2."""
        return margin(self.head)

    @property
    def coarse_logp(self) -> Float[Tensor, "N C"]:
        """Log-probabilities of (head, everything else), nats, summing to one.

        The bucket weighs at least e^−18 = 1.5e-8, so that divergences towards the target stay finite where
        the stored head rounds to a total of one. No bucket when the head is the whole vocabulary.
        """
        top = self.top_logp
        if self.num_kept == self.vocab_size:
            return top.log_softmax(-1)
        tail = self.tail_logp.to(top.dtype).clamp(min=MIN_TAIL_LOGP)
        return torch.cat([top, tail[:, None]], -1).log_softmax(-1)


@dataclass(frozen=True)
class OnlineTarget:
    """A target whose output layer has not been applied: indexing computes the logits of those positions.

    `Chunked` indexes it one chunk at a time, so neither [N, V] of a two-head distillation ever exists.

    Args:
        hidden: the target's last hidden states at the steps, [N, H].
        weight: its output embedding, [V, H].
        k: head entries to keep.
        full: keep full log-probabilities in every chunk; needed by full-vocabulary divergences.
        next_ids: the token that follows in the data, −1 where none does; only `TokenCE` needs it.
        bias: of the target's output layer, [V]; None where it has none.
        depths: see `TargetBatch`.
        rejected: see `TargetBatch`.
    """

    hidden: Float[Tensor, "N H"]
    weight: Float[Tensor, "V H"]
    k: int = 32
    full: bool = True
    next_ids: Int[Tensor, " N"] | None = None
    bias: Float[Tensor, " V"] | None = None
    depths: Int[Tensor, " N"] | None = None
    rejected: Int[Tensor, " N"] | None = None
    num_absent: ClassVar[int] = 0

    def __len__(self) -> int:
        return len(self.hidden)

    @torch.no_grad()
    def __getitem__(self, index: Any) -> TargetBatch:
        """The target at these steps, logits in fp32."""
        logits = project_fp32(self.hidden[index], self.weight, self.bias)
        found = TargetBatch.from_logits(logits, self.k, self.full)
        return replace(found, **self.by_step(index))

    def select(self, mask: Bool[Tensor, " N"]) -> OnlineTarget:
        """The steps where the mask is True, still without logits."""
        return replace(self, hidden=self.hidden[mask], **self.by_step(mask))

    def by_step(self, index: Any) -> dict[str, Any]:
        """What is known of these steps beside the distribution, by the names of `TargetBatch`."""
        return {name: _at(getattr(self, name), index) for name in BY_STEP}

    @property
    def has_full(self) -> bool:
        """The full distribution comes with every chunk."""
        return self.full

    @property
    def vocab_size(self) -> int:
        """V."""
        return len(self.weight)
