"""Greedy continuations by the target, with its top-k logits at learned positions; every token is read once.

Greedy and top-k ids come from the same fp32 logits: `top_ids[t, 0]` is the greedy token, the lowest id at an
exact tie, and the token fed next.

Axis letters: N positions or texts · T tokens of a document · K top-k entries · C = 2 K + 2 numbers recorded
of a position · L layers whose outputs are kept · H hidden · V vocabulary.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import BFloat16, Float, Float32, Int
from numpy import ndarray
from torch import Tensor, nn

from certdraft.certificates import Head
from certdraft.data.corpus.chat import Prompt
from certdraft.data.record.learned_positions import Generation, first_learned, loop_onset, with_loss_mask
from certdraft.data.record.running_batch import RunningBatch
from certdraft.data.trace.recorded_row import Finish, RecordedRow
from certdraft.support import (
    HiddenStates,
    OutputLayer,
    bits_of,
    facts_of,
    pack_linears,
    text_body,
    text_config,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

_LOGIT_ENTRIES = 1 << 25  # fp32 logits held at once while a prompt is read: 128 MiB
_LOOP_CHECK_TOKENS = 32


class TargetError(ValueError):
    """The target cannot be recorded; the message names row and position where there is one."""


class LogitHead:
    """hidden [N, H] → logits [N, V] in fp32, whatever the target's dtype. On a CPU the target is packed.

    Raises:
        TargetError: the target does more than a matrix product there (soft-capped or scaled logits).
    """

    def __init__(self, target: PreTrainedModel) -> None:
        layer = target.get_output_embeddings()
        if not isinstance(layer, nn.Linear):
            raise TargetError(
                f"{type(target).__name__} has no linear output layer; its logits cannot be recorded"
            )
        pack_linears(target)
        self.weight, self.bias = layer.weight.detach(), layer.bias
        self._layer, self._project = layer, OutputLayer()
        # some classes leave logit changes of their config to engines
        if changes := facts_of(target).logit_changes:
            raise TargetError(
                f"{type(target).__name__} scales or soft-caps its logits ({', '.join(changes)} in its "
                "config); recording such targets is not supported, because its margins would be wrong"
            )
        self._check(target)

    def __call__(self, hidden: Float[Tensor, "N H"]) -> Float[Tensor, "N V"]:
        return self._project(hidden, self.weight, self.bias, self._layer)

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
def record_prompts(
    target: PreTrainedModel,
    head: LogitHead,
    prompts: Sequence[Prompt],
    settings: Generation,
    *,
    batch_size: int,
    num_kept: int,
    eos_ids: frozenset[int],
    feature_layers: Sequence[int] = (),
) -> Iterator[tuple[int, RecordedRow]]:
    """Continue prompts greedily and keep the target's top-k logits at the positions of the loss mask.

    Texts that end make room in the batch for the next prompts, longest first. Which text is continued beside
    which depends on the arguments alone, so the same call gives the same bits.

    Args:
        target: causal language model in eval mode.
        head: its output projection.
        prompts: each with at least one token and at most `settings.max_length`.
        settings: how long, and which positions are learned.
        batch_size: prompts continued side by side.
        num_kept: K.
        eos_ids: a text ends with the first of these, which belongs to it.
        feature_layers: 0-based layers whose outputs are kept too.

    Yields:
        The index of a prompt and its row, as soon as that is complete. Position t holds the distribution of
        token t + 1; where the prompt goes on and is not learned, and at the last position, it holds a uniform
        placeholder. The last token of a continuation is never read: its features are zeros.

    Raises:
        TargetError: NaN or +inf among the logits, naming row and position.
    """
    recording = _Recording(target, head, prompts, settings, batch_size, num_kept, eos_ids, feature_layers)
    with recording.hidden_states.recorded():
        yield from recording.texts()


class _Text:
    """A prompt, its continuation so far, and what is recorded of it.

    Args:
        index: of the prompt.
        prompt: what it begins with.
        settings: how long it may become, and which positions are learned.
        nothing: what `packed` holds where nothing is recorded.
        features: number and size of the layers kept, L and H; None keeps none.

    Attributes:
        ids: its tokens so far.
        finish: how it ended; None while it goes on.
        packed: [T, 2 K + 2], the bits of K ids, K gaps, lse_gap and entropy: one copy from the device.
        hidden: [T, L, H], bits of bf16 numbers.
    """

    def __init__(
        self,
        index: int,
        prompt: Prompt,
        settings: Generation,
        nothing: Float32[ndarray, " C"],
        features: tuple[int, int] | None,
    ) -> None:
        self.index, self.prompt, self.settings = index, prompt, settings
        self.ids: list[int] = prompt.ids.tolist()
        self.budget = max(0, min(settings.max_new_tokens, settings.max_length - len(self.ids)))
        self.finish: Finish | None = None if self.budget else "given"
        length = len(self.ids) + self.budget
        self.packed = np.tile(nothing, (length, 1))
        self.hidden = np.zeros((length, *features), np.uint16) if features else None

    @property
    def in_prompt(self) -> range:
        """Positions of the prompt whose distributions are recorded."""
        end = len(self.prompt.ids) - (self.finish is not None)  # nothing follows a text that is given whole
        return range(max(0, first_learned(self.prompt, self.settings) - 1), end)

    def append_greedy(self, eos_ids: frozenset[int]) -> None:
        """Append the most probable token after the last one."""
        token = int(self.packed[len(self.ids) - 1, :1].view(np.int32)[0])
        self.ids.append(token)
        written = len(self.ids) - len(self.prompt.ids)
        if token in eos_ids:
            self.finish = "eos"
        elif written >= self.budget:
            self.finish = "length"
        elif self.settings.loops == "cut" and written % _LOOP_CHECK_TOKENS == 0:
            if loop_onset(np.array(self.ids[-written:])) is not None:
                self.finish = "loop"  # `with_loss_mask` cuts it, wherever it was noticed

    def row(self) -> RecordedRow:
        length, num_kept = len(self.ids), self.packed.shape[1] // 2 - 1
        packed = self.packed[:length]
        with np.errstate(over="ignore"):  # a gap above 65504 nats is probability zero in any dtype
            gap = packed[:, num_kept:-2].astype(np.float16)
        assert self.finish is not None
        whole = RecordedRow(
            np.array(self.ids, np.int32),
            np.zeros(length, np.bool_),
            packed[:, :num_kept].view(np.int32),
            gap,
            packed[:, -2],
            packed[:, -1],
            finish=self.finish,
            where=self.prompt.where,
            hidden=None if self.hidden is None else self.hidden[:length],
        )
        return with_loss_mask(whole, self.prompt, self.settings)


class _Recording:
    """Texts in a running batch: a pass reads the newest token of each, and what is to follow is recorded.

    On an accelerator the host waits once in a pass that no text joins or leaves, for what is recorded
    (`_record`). With `sdpa` attention transformers makes it wait once more, before the pass: it looks whether
    the padding mask hides anything.
    """

    def __init__(
        self,
        target: PreTrainedModel,
        head: LogitHead,
        prompts: Sequence[Prompt],
        settings: Generation,
        batch_size: int,
        num_kept: int,
        eos_ids: frozenset[int],
        feature_layers: Sequence[int],
    ) -> None:
        self.target, self.head, self.prompts, self.settings = target, head, prompts, settings
        self.num_kept, self.eos_ids = num_kept, eos_ids
        body = text_body(target)
        self.hidden_states = HiddenStates(body, feature_layers)
        self.features = (len(feature_layers), head.weight.shape[1]) if feature_layers else None
        longest = max((len(prompt.ids) for prompt in prompts), default=0)
        new = min(settings.max_new_tokens, settings.max_length - 1)
        room = longest + new if new else 0
        self.batch = RunningBatch(body, target.config, head.weight.device, batch_size, room)
        self.nothing = np.zeros(2 * num_kept + 2, np.float32)  # uniform: what a server does not return, too
        self.nothing[:num_kept] = np.arange(num_kept, dtype=np.int32).view(np.float32)
        self.nothing[-2:] = np.log(head.vocab_size)

    def texts(self) -> Iterator[tuple[int, RecordedRow]]:
        """Run to the end; yields texts as they end."""
        order = sorted(range(len(self.prompts)), key=lambda index: -len(self.prompts[index].ids))
        waiting, live = deque(order), list[_Text]()
        tokens = torch.zeros(0, dtype=torch.long, device=self.head.weight.device)  # that come next in each
        while waiting or live:
            new = [self._text(waiting.popleft()) for _ in range(min(self.batch.free, len(waiting)))]
            if new:
                tokens = torch.cat([tokens, self._begin(new)])
                live += new
            else:
                tokens = self._go_on(live, tokens)
            for text in new or live:
                if text.finish is None:
                    text.append_greedy(self.eos_ids)
            stay = [row for row, text in enumerate(live) if text.finish is None]
            if len(stay) < len(live):
                yield from ((text.index, text.row()) for text in live if text.finish is not None)
                self.batch.keep(stay)
                tokens, live = tokens[stay], [live[row] for row in stay]

    def _text(self, index: int) -> _Text:
        return _Text(index, self.prompts[index], self.settings, self.nothing, self.features)

    def _begin(self, new: list[_Text]) -> Int[Tensor, " N"]:
        """Read and record prompts; returns the tokens that come next."""
        hidden = self.batch.join([text.prompt.ids for text in new]).last_hidden_state
        width = hidden.shape[1]
        if self.features is not None:  # of every token, learned or not: too many to travel with the rest
            bits = bits_of(self.hidden_states.take().bfloat16())
            for text, features in zip(new, bits, strict=True):
                assert text.hidden is not None
                text.hidden[: len(text.ids)] = features[width - len(text.ids) :]
        spans = [text.in_prompt for text in new]
        recorded = np.zeros(hidden.shape[:2], np.bool_)
        for row, (text, span) in enumerate(zip(new, spans, strict=True)):
            start = width - len(text.ids)  # padding
            recorded[row, start + span.start : start + span.stop] = True
        places = torch.from_numpy(np.flatnonzero(recorded)).to(hidden.device, non_blocking=True)
        greedy = self._record(hidden.flatten(0, 1)[places], new, spans)
        last = np.cumsum([len(span) for span in spans]) - 1  # of each text; any where nothing follows
        return greedy[last.clip(0)] if len(greedy) else greedy.new_zeros(len(new))

    def _go_on(self, live: list[_Text], tokens: Int[Tensor, " L"]) -> Int[Tensor, " L"]:
        """Read and record the last token of each text; returns the tokens that come next."""
        hidden = self.batch.step(tokens).last_hidden_state[self.batch.rows, 0]
        features = None
        if self.features is not None:
            features = self.hidden_states.take()[self.batch.rows, 0].bfloat16()
        spans = [range(len(text.ids) - 1, len(text.ids)) for text in live]
        return self._record(hidden, live, spans, features)

    def _record(
        self,
        hidden: Float[Tensor, "N H"],
        texts: list[_Text],
        spans: list[range],
        features: BFloat16[Tensor, "N L H"] | None = None,
    ) -> Int[Tensor, " N"]:
        """Keep the top-k logits, and features, at these positions of texts.

        What the host stores and what it checks is one copy, and the only one that it waits for.

        Returns:
            The greedy tokens, on the device.

        Raises:
            TargetError: NaN or +inf among the logits.
        """
        if not len(hidden):
            return torch.zeros(0, dtype=torch.long, device=hidden.device)
        size = max(1, _LOGIT_ENTRIES // self.head.vocab_size)
        packed = torch.cat([packed_head(self.head(part), self.num_kept) for part in hidden.split(size)])
        bits = packed.view(torch.int16)  # [N, 2 C]
        width = bits.shape[1]
        if features is not None:
            bits = torch.cat([bits, features.flatten(1).view(torch.int16)], dim=1)
        on_host = bits.cpu().numpy()
        heads, kept = on_host[:, :width].view(np.float32), on_host[:, width:].view(np.uint16)
        if not np.isfinite(heads[:, -2]).all():
            raise self._not_finite(hidden, texts, spans)
        end = 0
        for text, span in zip(texts, spans, strict=True):
            place, rows = slice(span.start, span.stop), slice(end, end + len(span))
            end = rows.stop
            text.packed[place] = heads[rows]
            if features is not None:
                assert text.hidden is not None
                text.hidden[place] = kept[rows].reshape(-1, *features.shape[1:])
        return packed[:, 0].view(torch.int32).long()

    def _not_finite(
        self, hidden: Float[Tensor, "N H"], texts: list[_Text], spans: list[range]
    ) -> TargetError:
        where = [(text, position) for text, span in zip(texts, spans, strict=True) for position in span]
        fine = [bool(torch.isfinite(self.head(state).logsumexp(-1))) for state in hidden]
        text, position = where[fine.index(False)]
        position = _first_bad_position(self.target, self.head, np.array(text.ids), position)
        return TargetError(
            f"{text.prompt.where}: the target's logits after token {position} of the document hold NaN or "
            "+inf; nothing of this shard was written. Check the checkpoint, or try dtype=float32."
        )


def packed_head(logits: Float32[Tensor, "N V"], num_kept: int) -> Float32[Tensor, "N C"]:
    """Ids (their bits), gaps, lse_gap and entropy of every position, side by side: one copy to the host."""
    head = Head.from_logits(logits, num_kept, check=False)
    assert head.entropy is not None
    bits = head.ids.int().view(torch.float32)
    return torch.cat([bits, head.gap, head.lse_gap[:, None], head.entropy[:, None]], dim=-1)


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
