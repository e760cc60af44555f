"""Greedy answers of the target to prompts files, as rows in memory that are read like a trace.

Answers are generated in batches (`certdraft.data.record_prompts`). A later turn of a question is asked after
the target's own answer to the earlier one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from jaxtyping import Bool, Int
from torch import Tensor

from certdraft.certificates import Head
from certdraft.data import (
    Accounting,
    Generation,
    LogitHead,
    Prompt,
    Prompts,
    RecordedRow,
    Row,
    build_prompts,
    eos_ids_of,
    record_prompts,
)
from certdraft.evaluation.prompts import Question

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase


@dataclass(frozen=True)
class WrittenMeta:
    """Metadata of generated texts, with the names of a trace's."""

    target: str
    tokenizer_fingerprint: str
    dtype: str
    num_kept: int
    vocab_size: int
    target_revision: str | None = None


@dataclass(frozen=True)
class WrittenRow:
    """One document; see `certdraft.evaluation.measure.trace_reading.TraceRowLike`."""

    input_ids: Int[Tensor, " T"]
    loss_mask: Bool[Tensor, " T"]
    head: Head
    groups: tuple[str, ...]


@dataclass(frozen=True)
class WrittenTrace:
    """Generated texts in memory; read like a trace.

    Attributes:
        rows: in the order of the files.
        meta: of the target.
        accounting: prompts read, used, and left out by reason.
    """

    rows: Sequence[WrittenRow]
    meta: WrittenMeta
    accounting: Accounting = field(default_factory=lambda: Accounting("prompts"))

    def __len__(self) -> int:
        return len(self.rows)

    def row(self, index: int) -> WrittenRow:
        """Return the document at `index`."""
        return self.rows[index]


def write_texts(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    rendering: Prompts,
    generation: Generation,
    meta: WrittenMeta,
    *,
    batch_size: int = 16,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> WrittenTrace:
    """Generate the target's greedy answers to questions.

    Args:
        target: causal LM in eval mode.
        tokenizer: its tokenizer.
        questions: from `read_questions`.
        rendering: chat template or none; which turns are measured ("all", "first", "last").
        generation: how long answers may be; prompts are cut to what is left of `max_length`.
        meta: kept with the texts.
        batch_size: prompts continued side by side.
        progress: called with a stage, prompts done and prompts in all.

    Raises:
        ValueError: no prompt is left, or the target's logits are not finite.
        CorpusError: conversations for a tokenizer without a chat template.
    """
    accounting = Accounting("prompts", read=sum(len(q.turns) for q in questions))
    chat = bool(tokenizer.chat_template) and rendering.template != "none"
    room = max(1, generation.max_length - generation.max_new_tokens)
    rendering = replace(rendering, max_prompt_tokens=min(rendering.max_prompt_tokens, room))
    talks = [_Talk(q, list(q.history)) for q in questions]
    head, eos = LogitHead(target), eos_ids_of(target, tokenizer)
    rows: list[tuple[int, int, WrittenRow]] = []
    done = 0
    for turn in range(max((len(q.turns) for q in questions), default=0)):
        going = [i for i, talk in enumerate(talks) if talk.open and turn < len(talk.question.turns)]
        ready = list(_prompts(talks, going, turn, chat, tokenizer, rendering, accounting))
        answers = record_prompts(
            target, head, [prompt for _, prompt in ready], generation,
            batch_size=batch_size, num_kept=meta.num_kept, eos_ids=eos,
        )  # fmt: skip
        for number, recorded in answers:
            index, prompt = ready[number]
            talks[index].answered(tokenizer, recorded, len(prompt.ids))
            if not recorded.loss_mask[:-1].any():
                accounting.skip("no answer", prompt.where)
            elif _wanted(rendering, turn, talks[index].question):
                accounting.used += 1
                rows.append((index, turn, _row(recorded, meta.vocab_size, talks[index].question.groups)))
            done += 1
            progress("target's own text", done, accounting.read)
    if not rows:
        reasons = "; ".join(f"{why}: {skip.count}" for why, skip in accounting.skipped.items())
        raise ValueError(f"the prompts files leave nothing to decode ({reasons or 'no rows'})")
    return WrittenTrace([row for *_, row in sorted(rows, key=lambda r: r[:2])], meta, accounting)


@dataclass
class _Talk:
    """A question and its messages so far; not open once a turn cannot be asked."""

    question: Question
    messages: list[dict[str, str]]
    open: bool = True

    def answered(self, tokenizer: PreTrainedTokenizerBase, recorded: RecordedRow, given: int) -> None:
        text = tokenizer.decode(recorded.input_ids[given:], skip_special_tokens=True)
        self.messages.append({"role": "assistant", "content": str(text)})


def _prompts(
    talks: Sequence[_Talk],
    going: Sequence[int],
    turn: int,
    chat: bool,
    tokenizer: PreTrainedTokenizerBase,
    rendering: Prompts,
    accounting: Accounting,
) -> Iterator[tuple[int, Prompt]]:
    """Yield (question, prompt) of one turn; close and count questions that cannot be asked."""
    for index in going:
        talk = talks[index]
        where = f"{talk.question.where}, turn {turn + 1}" if turn else talk.question.where
        talk.messages.append({"role": "user", "content": talk.question.turns[turn]})
        if turn and not chat:
            talk.open = False
            accounting.skip("later turn without a chat template", where)
            continue
        row = (
            Row(where, "messages", tuple(talk.messages), b"")
            if chat or talk.question.history
            else Row(where, "prompt", talk.question.bare, b"")
        )
        tried = Accounting("prompts")
        found = list(build_prompts([row], tokenizer, replace(rendering, turns="last"), tried))
        if found:
            yield index, found[0]
        else:
            talk.open = False
            left = len(talk.question.turns) - turn
            accounting.skip(next(iter(tried.skipped), "no tokens"), where, left)


def _wanted(rendering: Prompts, turn: int, question: Question) -> bool:
    last = len(question.turns) - 1
    return {"all": True, "first": turn == 0, "last": turn == last}[rendering.turns]


def _row(recorded: RecordedRow, vocab_size: int, groups: tuple[str, ...]) -> WrittenRow:
    head = Head(
        torch.from_numpy(recorded.top_ids.astype(np.int64)),
        torch.from_numpy(recorded.top_gap.astype(np.float32)),
        torch.from_numpy(recorded.lse_gap),
        vocab_size,
        torch.from_numpy(recorded.entropy),
    )
    ids = torch.from_numpy(recorded.input_ids.astype(np.int64))
    return WrittenRow(ids, torch.from_numpy(recorded.loss_mask), head, groups)
