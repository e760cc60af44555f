"""A target as a drafter with a draft vocabulary can imitate it: renormalised over the tokens it can propose.

A trace keeps K entries of every step, some of them outside the draft vocabulary. They get K places of their
own behind the D draft tokens, with probability zero on the target's side and a logit of `ABSENT` on the
drafter's. So every loss and its chunked evaluation run as they are, on D + K classes instead of V.

Axis letters: N steps · K head entries · V target vocabulary · D draft vocabulary · H hidden.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional

from certdraft.certificates import Head, coarse_kl
from certdraft.drafters import ABSENT
from certdraft.losses import OnlineTarget, TargetBatch

_NOTHING = 60.0  # nats below the greedy token: e^-60 is zero to every sum, and 0 · log 0 needs no care


class DraftVocabulary:
    """Both sides of a training step over a draft vocabulary.

    Args:
        ids: target ids of the draft tokens, ascending.
        vocab_size: V.
    """

    def __init__(self, ids: Int[Tensor, " D"], vocab_size: int) -> None:
        self.ids = ids
        self.places = torch.full((vocab_size,), -1, device=ids.device)  # [V] where a target token stands
        self.places[ids] = torch.arange(len(ids), device=ids.device)

    def holds(self, tokens: Int[Tensor, "*step"]) -> Tensor:
        """Whether tokens can be proposed; a step whose greedy token cannot is a sure rejection."""
        return self.places[tokens] >= 0

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
        return TargetBatch(head, logp, next_ids)

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

    def drafter(
        self, hidden: Float[Tensor, "N H"], weight: Float[Tensor, "D H"], target: TargetBatch | OnlineTarget
    ) -> tuple[Tensor, Tensor]:
        """Hidden states and weight whose product are the drafter's logits over the target's classes."""
        extra = target.vocab_size - len(weight)
        if extra == 0:
            return hidden, weight
        bias = torch.cat([weight.new_zeros(len(weight), 1), weight.new_full((extra, 1), ABSENT)])
        wide = torch.cat([torch.cat([weight, weight.new_zeros(extra, weight.shape[1])]), bias], 1)
        return torch.cat([hidden, hidden.new_ones(len(hidden), 1)], 1), wide

    def kl(self, head: Head, logits: Float[Tensor, "N V"]) -> Float[Tensor, " N"]:
        """KL of the renormalised target to the drafter, of head and one bucket, nats."""
        drafted = functional.pad(logits[:, self.ids], (0, head.num_kept), value=ABSENT)
        return coarse_kl(self._head(head), drafted.log_softmax(-1))
