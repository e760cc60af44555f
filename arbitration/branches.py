"""All texts that arbitration can write for a prompt, explored once: rollouts become table look-ups.

Greedy models are deterministic, so a prefix determines both models' next tokens and all features of a
mismatch. For short answers all prefixes that some path of decisions reaches fit in a table: one pass of both
models per prefix, after which rollouts cost no model pass. Long answers with many mismatches have too many
paths; `simulate` then runs the models.

Letters: P prompts · M prefixes · S static features · R texts · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from certdraft.arbitration.mismatch_features import NUM_STATIC, static_features

if TYPE_CHECKING:
    from certdraft.arbitration.simulator import Stepper

_PROMPTS_AT_ONCE = 64
NONE = -1


class TooManyBranches(ValueError):
    """A prompt's decisions have more paths than were to be written out."""


class Branches:
    """The table, on the CPU: for each prefix both models' tokens, features of a mismatch, and what follows.

    Args:
        target: reads every prefix.
        drafter: reads every prefix.
        max_new_tokens: length at which texts end.
        eos: tokens that end a text.
        most: unfinished branches per prompt, on average over the prompts read together.
        texts_at_once: most unfinished branches that share a pass; fewer take less memory.
    """

    def __init__(
        self,
        target: Stepper,
        drafter: Stepper,
        *,
        max_new_tokens: int,
        eos: Collection[int],
        most: int = 256,
        texts_at_once: int = 1 << 14,
    ) -> None:
        self.target, self.drafter = target, drafter
        self.max_new_tokens, self.eos, self.most = max_new_tokens, frozenset(eos), most
        self._prompts_at_once = max(1, min(_PROMPTS_AT_ONCE, texts_at_once // most))
        self._roots: dict[tuple[int, ...], int] = {}
        self._pieces: list[tuple[Tensor, ...]] = []
        self._size = 0

    def __len__(self) -> int:
        return self._size

    @torch.no_grad()
    def roots(self, prompts: Sequence[Sequence[int]]) -> Int[Tensor, " P"]:
        """The first prefix of each prompt; prompts not seen before are explored.

        Raises:
            TooManyBranches: more paths than `most` per prompt.
        """
        new = [prompt for prompt in dict.fromkeys(map(tuple, prompts)) if prompt not in self._roots]
        for start in range(0, len(new), self._prompts_at_once):
            self._explore(new[start : start + self._prompts_at_once])
        if len(self._pieces) != 1:
            self._pieces = [tuple(torch.cat(column) for column in zip(*self._pieces, strict=True))]
        return torch.tensor([self._roots[tuple(prompt)] for prompt in prompts])

    @property
    def draft(self) -> Int[Tensor, " M"]:
        """The drafter's token at each prefix."""
        return self._pieces[0][0]

    @property
    def greedy(self) -> Int[Tensor, " M"]:
        """The target's token."""
        return self._pieces[0][1]

    @property
    def static(self) -> Float[Tensor, "M S"]:
        """Features, 0 where both models agree."""
        return self._pieces[0][2]

    def following(self, nodes: Int[Tensor, " R"], tokens: Int[Tensor, " R"]) -> Int[Tensor, " R"]:
        """The prefix after one of the two tokens; `NONE` where the text ends."""
        _, greedy, _, after_greedy, after_draft = self._pieces[0]
        return torch.where(tokens == greedy[nodes], after_greedy[nodes], after_draft[nodes])

    def _explore(self, prompts: Sequence[tuple[int, ...]]) -> None:
        logits = self.target.start(prompts, 1), self.drafter.start(prompts, 1)
        for index, prompt in enumerate(prompts):
            self._roots[prompt] = self._size + index
        for length in range(1, self.max_new_tokens + 1):
            greedy, draft = (each.argmax(-1).cpu() for each in logits)
            num = len(greedy)
            where = (greedy != draft).nonzero()[:, 0]
            static = torch.zeros(num, NUM_STATIC)
            if len(where):
                rows = where.to(logits[0].device)
                static[where] = static_features(
                    logits[0][rows], logits[1].to(rows.device)[rows], draft[where].to(rows.device),
                    greedy[where].to(rows.device),
                ).cpu()  # fmt: skip
            last = length == self.max_new_tokens
            after = [torch.full((num,), NONE), torch.full((num,), NONE)]
            parents, tokens, size = [], [], self._size + num
            for side, (chosen, mine) in enumerate(((greedy, torch.arange(num)), (draft, where))):
                going = [
                    row for row in mine.tolist() if not last and int(chosen[row]) not in self.eos
                ]  # fmt: skip
                after[side][going] = torch.arange(size, size + len(going))
                size += len(going)
                parents += going
                tokens += chosen[going].tolist()
            self._pieces.append((draft, greedy, static, *after))
            self._size += num
            if not parents:
                return
            if len(parents) > self.most * len(prompts):
                raise TooManyBranches(
                    f"{len(prompts)} prompts have {len(parents)} unfinished branches after {length} tokens, "
                    f"more than {self.most} each; set texts.branches to 0, so that the models are run instead"
                )
            for model in (self.target, self.drafter):
                model.keep(torch.tensor(parents))
            logits = self.target.step(torch.tensor(tokens)), self.drafter.step(torch.tensor(tokens))
