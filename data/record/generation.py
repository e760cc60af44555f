"""Greedy continuations by the target, with its top-k logits at every position, in one pass over each token.

Prompts of different lengths are padded on the left with their own positions and mask, so that a batch gives
what each prompt gives by itself. Greedy and top-k ids come from the same fp32 logits: `top_ids[t, 0]` is the
greedy token, the lowest id at an exact tie, and the token fed next.

Axis letters: R rows of a batch · P prompt tokens · T tokens of a document · K top-k entries · L layers whose
outputs are kept · H hidden · V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor, nn

from certdraft.certificates import Head
from certdraft.data.corpus.chat import Prompt
from certdraft.data.record.interruption import Stopped
from certdraft.data.record.learned_positions import Generation, loop_onset, with_loss_mask
from certdraft.data.trace.recorded_row import Finish, RecordedRow
from certdraft.support import (
    HiddenStates,
    bits_of,
    can_drop_rows,
    facts_of,
    growing_cache,
    project_fp32,
    text_body,
    text_config,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.cache_utils import DynamicCache

_LOGIT_ENTRIES = 1 << 25  # fp32 logits held at once while a prompt is read: 128 MiB
_LOOP_CHECK_TOKENS = 32


class TargetError(ValueError):
    """The target cannot be recorded; the message names row and position where there is one."""


class LogitHead:
    """hidden [N, H] → logits [N, V] in fp32, whatever the target's dtype.

    Raises:
        TargetError: the target does more than a matrix product there (soft-capped or scaled logits).
    """

    def __init__(self, target: PreTrainedModel) -> None:
        layer = target.get_output_embeddings()
        if not isinstance(layer, nn.Linear):
            raise TargetError(
                f"{type(target).__name__} has no linear output layer; its logits cannot be recorded"
            )
        self.weight, self.bias = layer.weight.detach(), layer.bias
        # some classes leave logit changes of their config to engines
        if changes := facts_of(target).logit_changes:
            raise TargetError(
                f"{type(target).__name__} scales or soft-caps its logits ({', '.join(changes)} in its "
                "config); recording such targets is not supported, because its margins would be wrong"
            )
        self._check(target)

    def __call__(self, hidden: Float[Tensor, "N H"]) -> Float[Tensor, "N V"]:
        return project_fp32(hidden, self.weight, self.bias)

    @property
    def vocab_size(self) -> int:
        return self.weight.shape[0]

    def _check(self, target: PreTrainedModel) -> None:
        probe = torch.arange(min(4, self.vocab_size), device=self.weight.device).unsqueeze(0)
        with torch.inference_mode():
            expected = target(input_ids=probe, use_cache=False).logits[0].float()
            projected = self(text_body(target)(input_ids=probe, use_cache=False).last_hidden_state[0])
        tolerance = 1e-4 if self.weight.dtype == torch.float32 else 2**-5  # bf16 keeps 8 bits
        # non-finite logits are reported by the recording itself, with row and position
        off = (expected - projected).abs().nan_to_num(0.0, 0.0, 0.0) > tolerance * (1 + expected.abs())
        if off.any():
            raise TargetError(
                f"{type(target).__name__} scales or soft-caps its logits; recording such targets is not "
                "supported, because its margins would be wrong"
            )


def eos_ids_of(target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Ids that end a text: the generation config's, else the model config's, and the tokenizer's."""
    return eos_ids_of_configs((target.generation_config, target.config), tokenizer)


def eos_ids_of_configs(configs: Iterable[object], tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The same from the configs only; None: that config does not exist."""
    found: set[int] = set()
    parts = [part for config in configs for part in (config, text_config(config))]
    for ids in (*(getattr(part, "eos_token_id", None) for part in parts), tokenizer.eos_token_id):
        found.update([ids] if isinstance(ids, int) else ids or [])
    return frozenset(found)


@torch.inference_mode()
def record_batch(
    target: PreTrainedModel,
    head: LogitHead,
    prompts: Sequence[Prompt],
    settings: Generation,
    *,
    num_kept: int,
    eos_ids: frozenset[int],
    feature_layers: Sequence[int] = (),
) -> list[RecordedRow]:
    """Continue a batch of prompts greedily and keep the target's top-k logits at every token position.

    Args:
        target: causal language model in eval mode.
        head: its output projection.
        prompts: each with at least one token and at most `settings.max_length`.
        settings: how long, and which positions are learned.
        num_kept: K.
        eos_ids: a row ends with the first of these, which belongs to it.
        feature_layers: 0-based layers whose outputs are kept too.

    Returns:
        One row per prompt, in order. Position t holds the distribution of token t + 1; the last one is never
        in the loss mask.

    Raises:
        TargetError: NaN or +inf among the logits, naming row and position.
        Stopped: a signal ended it; the exception has the rows that were finished.
    """
    recording = _Recording(target, head, prompts, settings, num_kept, feature_layers)
    try:
        with recording.hidden_states.recorded():
            cache = recording.prefill()
            if not settings.teacher_forced:
                _decode(recording, cache, eos_ids)
    except Stopped as stop:
        stop.rows = {index: recording.row(index) for index in recording.done.nonzero()[0].tolist()}
        raise
    return [recording.row(index) for index in range(len(prompts))]


class _Recording:
    """Buffers of one batch on the host, [R, T, …], filled position by position."""

    def __init__(
        self,
        target: PreTrainedModel,
        head: LogitHead,
        prompts: Sequence[Prompt],
        settings: Generation,
        num_kept: int,
        feature_layers: Sequence[int] = (),
    ) -> None:
        self.body = text_body(target)
        self.hidden_states = HiddenStates(self.body, feature_layers)
        self.target, self.head, self.prompts, self.settings = target, head, prompts, settings
        self.given = np.array([len(prompt.ids) for prompt in prompts])
        self.budget = np.minimum(settings.max_new_tokens, settings.max_length - self.given).clip(0)
        self.lengths = self.given.copy()
        self.done = np.zeros(len(prompts), np.bool_)  # rows that get no further token
        self.finish: list[Finish] = ["given"] * len(prompts)
        steps = (len(prompts), int((self.given + self.budget).max()))
        self.input_ids = np.zeros(steps, np.int32)
        self.top_ids = np.zeros((*steps, num_kept), np.int32)
        self.top_gap = np.zeros((*steps, num_kept), np.float16)
        self.lse_gap = np.zeros(steps, np.float32)
        self.entropy = np.zeros(steps, np.float32)
        shape = (*steps, len(self.hidden_states.layers), head.weight.shape[1])
        self.hidden = np.zeros(shape, np.uint16) if feature_layers else None
        for row, prompt in enumerate(prompts):
            self.input_ids[row, : self.given[row]] = prompt.ids

    def prefill(self) -> DynamicCache | None:
        """Record all prompt positions and return their cache, or None when nothing is generated."""
        device, width = self.head.weight.device, int(self.given.max())
        mask = np.arange(width) >= width - self.given[:, None]  # [R, P], padding on the left
        ids = np.zeros((len(self.prompts), width), np.int64)
        ids[mask] = np.concatenate([prompt.ids for prompt in self.prompts])
        positions = (mask.cumsum(1) - 1).clip(0)
        self.mask = torch.from_numpy(mask).to(device)
        room = width + int(self.budget.max())
        cache = growing_cache(self.target.config, room) if self.budget.any() else None
        hidden = self.body(
            input_ids=torch.from_numpy(ids).to(device),
            attention_mask=None if mask.all() else self.mask.long(),  # None is the cheaper causal one
            position_ids=torch.from_numpy(positions).to(device),
            past_key_values=cache,
            use_cache=cache is not None,
        ).last_hidden_state
        rows, columns = mask.nonzero()
        flat = hidden[self.mask]  # [ΣP, H]
        if self.hidden is not None:
            self.hidden[rows, positions[rows, columns]] = bits_of(
                self.hidden_states.take()[self.mask].bfloat16()
            )
        size = max(1, _LOGIT_ENTRIES // self.head.vocab_size)
        for start in range(0, len(rows), size):
            part = slice(start, start + size)
            self.keep(flat[part], rows[part], positions[rows[part], columns[part]])
        self.done = self.budget == 0 if cache is not None else np.ones_like(self.done)
        return cache

    def keep(self, hidden: Float[Tensor, "N H"], rows: ndarray, positions: ndarray) -> Int[Tensor, " N"]:
        """Store the top-k logits of these positions; return the greedy tokens, on the target's device."""
        logits = self.head(hidden)
        try:
            head = Head.from_logits(logits, self.top_ids.shape[-1])
        except ValueError as error:
            bad = int((~torch.isfinite(logits.logsumexp(-1))).nonzero()[0])
            row, position = int(rows[bad]), int(positions[bad])
            known = self.input_ids[row, : max(position + 1, int(self.given[row]))]
            raise TargetError(
                f"{self.prompts[row].where}: the target's logits after token "
                f"{_first_bad_position(self.target, self.head, known, position)} of the document hold NaN or "
                "+inf; nothing of this shard was written. Check the checkpoint, or try dtype=float32."
            ) from error
        assert head.entropy is not None
        columns = [head.ids.int().view(torch.float32), head.gap, head.lse_gap[:, None], head.entropy[:, None]]
        found = torch.cat(columns, -1).cpu().numpy()  # one copy, so one synchronisation
        num = self.top_ids.shape[-1]
        self.top_ids[rows, positions] = found[:, :num].view(np.int32)
        with np.errstate(over="ignore"):  # a gap above 65504 nats is probability zero in any dtype
            self.top_gap[rows, positions] = found[:, num : 2 * num].astype(np.float16)
        self.lse_gap[rows, positions], self.entropy[rows, positions] = found[:, -2], found[:, -1]
        return head.greedy

    def row(self, index: int) -> RecordedRow:
        length = int(self.lengths[index])
        whole = RecordedRow(
            self.input_ids[index, :length],
            np.zeros(length, np.bool_),
            self.top_ids[index, :length],
            self.top_gap[index, :length],
            self.lse_gap[index, :length],
            self.entropy[index, :length],
            finish=self.finish[index],
            where=self.prompts[index].where,
            hidden=None if self.hidden is None else self.hidden[index, :length],
        )
        return with_loss_mask(whole, self.prompts[index], self.settings)


def _decode(recording: _Recording, cache: DynamicCache | None, eos_ids: frozenset[int]) -> None:
    device = recording.head.weight.device
    slots = np.arange(len(recording.prompts))  # rows the cache still holds
    mask = recording.mask
    removable = cache is not None and can_drop_rows(cache)
    last = recording.lengths - 1
    tokens = torch.from_numpy(recording.top_ids[slots, last, 0].astype(np.int64)).to(device)
    places = torch.from_numpy(recording.lengths.astype(np.int64)).to(device)  # of these tokens
    while not recording.done.all():
        assert cache is not None
        alive = ~recording.done
        if removable and alive[slots].mean() <= 0.75:  # finished rows leave the batch
            stay = torch.from_numpy(alive[slots].nonzero()[0]).to(device)
            cache.batch_select_indices(stay)
            mask, tokens, places, slots = mask[stay], tokens[stay], places[stay], slots[alive[slots]]
        mask = torch.cat([mask, mask.new_ones(len(slots), 1)], dim=1)
        hidden = recording.body(
            input_ids=tokens[:, None],
            attention_mask=mask.long(),
            position_ids=places[:, None],
            past_key_values=cache,
            use_cache=True,
        ).last_hidden_state[:, 0]
        rows = slots[alive[slots]]
        kept: Any = slice(None) if len(rows) == len(slots) else torch.from_numpy(alive[slots]).to(device)
        positions = recording.lengths[rows]
        written_ids = recording.top_ids[rows, positions - 1, 0]
        recording.input_ids[rows, positions] = written_ids
        tokens[kept] = recording.keep(hidden[kept], rows, positions)
        places[kept] += 1
        if recording.hidden is not None:
            recording.hidden[rows, positions] = bits_of(recording.hidden_states.take()[kept, 0].bfloat16())
        recording.lengths[rows] += 1
        for row, token in zip(rows.tolist(), written_ids.tolist(), strict=True):
            written = int(recording.lengths[row] - recording.given[row])
            if token in eos_ids:
                recording.finish[row] = "eos"
            elif written >= recording.budget[row]:
                recording.finish[row] = "length"
            elif not _looping(recording, row, written):
                continue
            recording.done[row] = True


def _looping(recording: _Recording, row: int, written: int) -> bool:
    """Whether a row loops and can stop early; where it is cut does not depend on when it is noticed."""
    if recording.settings.loops != "cut" or written % _LOOP_CHECK_TOKENS:
        return False
    return loop_onset(recording.input_ids[row, recording.given[row] : recording.lengths[row]]) is not None


def _first_bad_position(target: PreTrainedModel, head: LogitHead, ids: ndarray, position: int) -> int:
    """The first position without finite logits; `position` when the row on its own has none.

    One NaN value reaches every position of its row through the attention's 0 · NaN, so the position where it
    shows is not the one it comes from: prefixes are tried.
    """
    tokens = torch.from_numpy(ids.astype(np.int64)).to(head.weight.device).unsqueeze(0)

    def is_fine(length: int) -> bool:
        hidden = text_body(target)(input_ids=tokens[:, :length], use_cache=False).last_hidden_state[0]
        return bool(torch.isfinite(head(hidden).logsumexp(-1)).all())

    fine, bad = 0, len(ids)
    if is_fine(bad):
        return position
    while bad - fine > 1:
        middle = (fine + bad) // 2
        fine, bad = (middle, bad) if is_fine(middle) else (fine, middle)
    return bad - 1
