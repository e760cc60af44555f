"""Chains of several prompts at once: one pass of each model per step for all unfinished texts.

Row by row the same texts and rounds as `decode` with `Chain` and `Strict`; what is shared is the pass. A row
leaves the batch when its text ends. Letters: N logits rows of one pass, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor
from transformers import PreTrainedModel

from certdraft.decoding.cost.cost_model import RealClock
from certdraft.decoding.loop import (
    Backoff,
    DecodeResult,
    Round,
    as_target,
    checked_prompt,
    cut,
    eos_set,
    warn_non_finite,
)
from certdraft.decoding.target_runner import TargetRunner
from certdraft.decoding.trees.builders import Chain
from certdraft.decoding.trees.ranking import NonFiniteLogits, greedy_ids, top_rows
from certdraft.decoding.trees.tree import Row
from certdraft.drafters import CachedLM, Drafter, TreeCache


@dataclass
class _Text:
    """State of one row between rounds."""

    index: int  # in the caller's order
    length: int  # of the prompt
    unread: list[int]  # committed tokens the drafter has not read; the last one is the round's root
    tokens: list[int] = field(default_factory=list)
    rounds: list[Round] = field(default_factory=list)
    backoff: Backoff = field(default_factory=Backoff)
    stopped: bool = False


@torch.inference_mode()
def decode_batch(
    target: TargetRunner | PreTrainedModel,
    drafter: Drafter,
    prompts: Sequence[Sequence[int] | Tensor],
    builder: Chain | None = None,
    max_new_tokens: int = 128,
    eos: int | Collection[int] | None = None,
) -> list[DecodeResult]:
    """Continue several prompts at once, each as `decode(…, Chain(depth), Strict())` would.

    Args:
        target: a causal LM, or a `TargetRunner` around it.
        drafter: a `CausalDrafter`.
        prompts: at least one, each of at least one token.
        builder: the chain; None is `Chain(4)`.
        max_new_tokens: tokens to add to each, >= 1.
        eos: token or tokens that end a text; its row then leaves the batch.

    Returns:
        One result per prompt, in their order. Seconds are shares: those of a pass divided by the rows in it,
        so that they add up to the seconds of the batch.

    Raises:
        ValueError: no prompts, another kind of builder, drafter or target, or what `decode` refuses, for any
            of the prompts.

    Warns:
        RuntimeWarning: once, when drafter logits are not finite; such rounds are decoded without a draft.
    """
    runner, chain = as_target(target), builder or Chain()
    if not prompts:
        raise ValueError("prompts is empty; decode_batch needs at least one")
    drafting = getattr(drafter, "causal_lm", None)
    if not (isinstance(runner, TargetRunner) and type(chain) is Chain and drafting is not None):
        raise ValueError(
            "decode_batch takes a transformers causal LM or a TargetRunner, a CausalDrafter and a Chain; got "
            f"{type(target).__name__}, {type(drafter).__name__} and {type(chain).__name__}. decode takes all."
        )
    if runner.chains_only:
        raise ValueError(
            f"{runner.lm.facts.name} has linear_attention layers, which read texts of a batch in step and "
            "take no token back; decode takes one text after the other."
        )
    ids = [checked_prompt(runner, drafter, prompt, max_new_tokens) for prompt in prompts]
    stops, clock, num = eos_set(eos), RealClock(runner.device), len(ids)
    texts = [_Text(i, len(prompt), prompt[-1:]) for i, prompt in enumerate(ids)]
    live = texts
    models = [BatchedLM(lm, [p[:-1] for p in ids]) for lm in (runner.lm, CachedLM(drafting))]
    prefill_s = clock.lap("host") / num
    while live:
        num = len(live)
        drafts = _draft(models[1], live, chain.depth, max_new_tokens)
        draft_s = clock.lap("draft") / num
        chains = [[row.ids[0] for row in rows] for rows in drafts]
        logits = models[0].extend([[t.unread[-1], *own] for t, own in zip(live, chains, strict=True)])
        greedy = iter(greedy_ids(logits))
        verify_s = clock.lap("verify") / num
        kept: tuple[list[int], list[int]] = ([], [])
        for text, rows, own in zip(live, drafts, chains, strict=True):
            choice = [next(greedy) for _ in range(len(own) + 1)]
            good = next((i for i, token in enumerate(own) if token != choice[i]), len(own))
            new, accepted, text.stopped = cut(choice[: good + 1], stops)
            context, mass = text.length - 1 + len(text.tokens), np.cumsum([row.logp[0] for row in rows])
            text.tokens += new
            size, expected = len(own), math.fsum(np.exp(mass))
            text.rounds.append(
                Round(
                    context, size, size, expected, accepted, len(new), draft_s, verify_s,
                    candidates=(1,) * min(size, len(new)),
                )
            )  # fmt: skip
            lag, path = text.unread[:-1], [text.unread[-1], *own[:good]]
            read = min(len(path), len(own))  # of the path; the chain's last token was not read
            kept[0].append(len(path))
            kept[1].append(len(lag) + read if own else 0)
            text.unread = ([] if own else lag) + path[read:] + choice[good : good + 1]
        for model, counts in zip(models, kept, strict=True):
            model.keep(counts)
        stay = [i for i, text in enumerate(live) if not text.stopped and len(text.tokens) < max_new_tokens]
        if stay:
            for model in models:
                model.select(stay)
        ended, live = live, [live[i] for i in stay]
        host_s = clock.lap("host") / num
        for text in ended:
            text.rounds[-1] = replace(text.rounds[-1], host_s=host_s)
    return [
        DecodeResult(t.tokens, t.rounds, "eos" if t.stopped else "length", prefill_s, t.backoff.fallbacks)
        for t in texts
    ]


def _draft(model: BatchedLM, texts: Sequence[_Text], depth: int, max_new_tokens: int) -> list[list[Row]]:
    """The chain of each text; empty where none is due, or where its logits are not finite."""
    left = [min(depth, max_new_tokens - len(text.tokens) - 1) for text in texts]
    feed = [t.unread if due and not t.backoff.resting() else [] for t, due in zip(texts, left, strict=True)]
    chains: list[list[Row]] = [[] for _ in texts]
    while any(feed):
        active = [i for i, tokens in enumerate(feed) if tokens]
        answers, feed = _top(model.extend(feed, last=True)), [[] for _ in texts]
        for i, answer in zip(active, answers, strict=True):
            if isinstance(answer, NonFiniteLogits):
                if not any(text.backoff.fallbacks for text in texts):
                    warn_non_finite(answer, stacklevel=4)
                texts[i].backoff.failed()
                chains[i] = []
                continue
            chains[i].append(answer)
            if len(chains[i]) < left[i]:
                feed[i] = [answer.ids[0]]
            else:
                texts[i].backoff.worked()
    return chains


def _top(logits: Float[Tensor, "N V"]) -> list[Row | NonFiniteLogits]:
    """The greedy token of each row, or why it has none."""
    try:
        return [*top_rows(logits, 1)]
    except NonFiniteLogits as error:
        return [error] if len(logits) == 1 else [answer for row in logits for answer in _top(row[None])]


_SLACK = 64  # hidden slots that are not worth a compaction


class BatchedLM:
    """A causal LM reading chains of several texts in one pass, each text with its own length.

    Args:
        lm: the model.
        ids: tokens of each row to start with, possibly none.

    Raises:
        ValueError: the model is in training mode.
    """

    def __init__(self, lm: CachedLM, ids: Sequence[Sequence[int]]) -> None:
        if lm.model.training:
            raise ValueError(f"{type(lm.model).__name__} is in training mode; call .eval() before decoding.")
        self.lm, self.cache = lm, TreeCache(lm.num_layers, max(map(len, ids)) + 256)
        self.visible = np.zeros((len(ids), 0), dtype=bool)  # [R, W] slots that hold text of the row
        self._round: list[list[int]] = [[] for _ in ids]  # slots each row read since the last `keep`
        self._dirty = False  # some slot holds NaN
        if any(ids):
            self._forward(ids)
        self.keep([len(row) for row in ids])

    def extend(self, tokens: Sequence[Sequence[int]], *, last: bool = False) -> Float[Tensor, "N V"]:
        """Each row reads a continuation of what it has read; one pass.

        Args:
            tokens: of each row, possibly none, but some in at least one row.
            last: logits after the last token of each row that reads any, not after all tokens.

        Returns:
            fp32 next-token logits, row after row.
        """
        hidden = self._forward(tokens)
        steps = [range(len(row) - 1 if last and row else 0, len(row)) for row in tokens]
        at = torch.tensor([(row, step) for row, those in enumerate(steps) for step in those])
        return self.lm.project(hidden[tuple(at.T.to(hidden.device))])

    def keep(self, counts: Sequence[int]) -> None:
        """End a round: the first tokens each row read in it are committed, the others forgotten."""
        for visible, slots, count in zip(self.visible, self._round, counts, strict=True):
            visible[slots[count:]] = False
            slots.clear()
        self._scrub()

    def select(self, rows: Sequence[int]) -> None:
        """Drop the other rows, between rounds; closes the gaps when that pays."""
        visible = self.visible[list(rows)]
        width = int(visible.sum(1).max())
        if len(rows) == len(self.visible) and visible.shape[1] <= 2 * width + _SLACK:
            return
        slots = np.argsort(~visible, axis=1, kind="stable")[:, :width]  # text first, in its order
        if visible.shape[1]:
            for layer in self.cache.layers:
                layer.rearrange(torch.tensor(rows), torch.from_numpy(slots))
        self.visible, self._round = np.take_along_axis(visible, slots, 1), [[] for _ in rows]

    def _forward(self, tokens: Sequence[Sequence[int]]) -> Float[Tensor, "R Q H"]:
        sizes, old = np.array([len(row) for row in tokens])[:, None], self.visible.shape[1]
        num, width = len(sizes), int(sizes.max())
        steps = np.arange(width)
        ids = np.zeros((num, width), dtype=np.int64)
        for row, (own, slots) in enumerate(zip(tokens, self._round, strict=True)):
            ids[row] = [*own, *[own[-1] if own else 0] * (width - len(own))]  # no token of another row
            slots += range(old, old + len(own))
        # padding repeats a position, so that none is beyond the model's context, and sees itself: a softmax
        # over nothing would be NaN
        positions = self.visible.sum(1)[:, None] + np.minimum(steps, np.maximum(sizes - 1, 0))
        hidden_slots = np.ones((num, width, old + width), dtype=bool)
        hidden_slots[:, :, :old] = ~self.visible[:, None]
        hidden_slots[:, :, old:] = ~np.tri(width, dtype=bool)
        self.visible = np.concatenate([self.visible, steps < sizes], axis=1)
        mask = torch.zeros(num, 1, width, old + width, dtype=self.lm.dtype)  # float: eager misreads booleans
        mask.masked_fill_(torch.from_numpy(hidden_slots)[:, None], torch.finfo(mask.dtype).min)
        hidden: Tensor = self.lm.body(
            input_ids=torch.from_numpy(ids).to(self.lm.device),
            position_ids=torch.from_numpy(positions).to(self.lm.device),
            attention_mask=mask.to(self.lm.device),
            past_key_values=self.cache.past,
            use_cache=True,
        ).last_hidden_state
        self._dirty = self._dirty or not bool(hidden.isfinite().all())
        self._scrub()
        return hidden

    def _scrub(self) -> None:
        """Zero hidden slots once one may hold NaN: a weight of 0 does not silence it."""
        if self._dirty:
            for layer in self.cache.layers:
                layer.erase(torch.from_numpy(~self.visible))
