"""The target distribution renormalised over the draft vocabulary of a drafter.

A trace keeps K entries of every step, some of them outside the draft vocabulary. They become K classes behind
the D draft tokens, of target probability zero, and the drafter has no logit for them
(`TargetBatch.num_absent`). So every loss and its chunked evaluation run as they are, on D + K classes instead
of V. The tail of a recorded head is not known token by token: all of its mass counts as proposable. An online
target is renormalised exactly.

Axis letters: N steps · K head entries · V target vocabulary · D draft vocabulary.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn import functional

from certdraft.certificates import Head, coarse_kl
from certdraft.drafters import ABSENT
from certdraft.losses import OnlineTarget, TargetBatch
from certdraft.support import project_fp32

_ENTRIES = 1 << 24  # of target logits held at once on a CPU
_DEVICE_ENTRIES = 1 << 27  # elsewhere, 512 MiB: 110 rows of 151,936 leave a GPU idle
_NOTHING = 60.0  # nats below the greedy token: e^-60 is zero to every sum, and 0 · log 0 needs no care


class DraftVocabulary:
    """Restricts targets to a draft vocabulary.

    Args:
        ids: target ids of the draft tokens, ascending.
        vocab_size: V.
    """

    def __init__(self, ids: Int[Tensor, " D"], vocab_size: int) -> None:
        self.ids = ids
        self.places = torch.full((vocab_size,), -1, device=ids.device)  # [V] draft id of a target token
        self.places[ids] = torch.arange(len(ids), device=ids.device)

    def holds(self, tokens: Int[Tensor, "*step"]) -> Tensor:
        """Whether tokens are in the draft vocabulary; a step whose greedy token is not is always rejected."""
        return self.places[tokens] >= 0

    @torch.no_grad()
    def proposable(
        self, target: TargetBatch | OnlineTarget, positions: Int[Tensor, " N"] | None = None
    ) -> Bool[Tensor, " N"]:
        """Whether the target's greedy token of each step is in the draft vocabulary.

        Args:
            target: at the steps.
            positions: of the steps. Rounds overlap, so that most positions are steps of several; with this,
                an online target's logits are computed once for each.
        """
        if isinstance(target, TargetBatch):
            return self.holds(target.greedy)
        if not len(target):
            return self.places.new_zeros(0, dtype=torch.bool)
        hidden = target.hidden
        if positions is not None:
            once, place = positions.unique(return_inverse=True)
            # steps of one position hold the same states: whichever is written last will do
            row = place.new_empty(len(once)).scatter_(0, place, torch.arange(len(place), device=place.device))
            hidden = hidden[row]
        entries = _ENTRIES if hidden.device.type == "cpu" else _DEVICE_ENTRIES
        size = max(1, entries // target.vocab_size)
        parts = [project_fp32(part, target.weight, target.bias).argmax(-1) for part in hidden.split(size)]
        held = self.holds(torch.cat(parts))
        return held if positions is None else held[place]

    def target(self, target: TargetBatch | OnlineTarget) -> TargetBatch | OnlineTarget:
        """The target renormalised over the draft tokens; `next_ids` outside become −1."""
        next_ids = target.next_ids
        if next_ids is not None:
            next_ids = torch.where(next_ids >= 0, self.places[next_ids.clamp(min=0)], -1)
        if isinstance(target, OnlineTarget):
            bias = None if target.bias is None else target.bias[self.ids]
            return replace(target, weight=target.weight[self.ids], next_ids=next_ids, bias=bias)
        head = self._head(target.head)
        logp = target.logp
        if logp is not None:
            known = functional.pad(logp[:, self.ids], (0, head.num_kept), value=-_NOTHING)
            logp = known.log_softmax(-1)
        return TargetBatch(head, logp, next_ids, head.num_kept, target.depths)

    def _head(self, head: Head) -> Head:
        num, kept = len(self.ids), head.num_kept
        places = self.places[head.ids]  # [N, K]
        absent = places < 0
        places = torch.where(absent, num + torch.arange(kept, device=places.device), places)
        order = (
            absent.to(torch.int8).sort(stable=True, dim=-1).indices
        )  # what can be proposed first, as ranked
        gap = head.gap.masked_fill(absent, torch.inf).gather(-1, order)
        first = gap[:, :1].nan_to_num(posinf=0.0)
        gap = (gap - first).clamp(max=_NOTHING)  # gaps to the best token that can be proposed
        lost = (head.p * absent).sum(-1).clamp(max=1 - 1e-6)
        lse_gap = head.lse_gap + first[:, 0] + torch.log1p(-lost)
        return Head(places.gather(-1, order), gap, lse_gap.clamp(min=0.0), num + kept)

    def kl(self, head: Head, logits: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        """KL of the renormalised target to the drafter, of head and one bucket, nats."""
        drafted = functional.pad(logits[:, self.ids], (0, head.num_kept), value=ABSENT)
        return coarse_kl(self._head(head), drafted.log_softmax(-1))
