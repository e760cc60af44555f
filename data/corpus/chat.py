"""Rows to prompts: chat templates, thinking on or off, windows of long texts.

A template builds prompts only. What is learned are token ids: the target's own continuation, or,
teacher-forced, the tokens that follow the prompt. Text is never rendered, generated and then tokenised again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Int32
from numpy import ndarray

from certdraft.data.corpus.accounting import Accounting
from certdraft.data.corpus.corpora import CorpusError, Message, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GROUP = 256  # rows tokenised in one call
_CHARS_PER_TOKEN = 32  # text cut for a window; no tokenizer in use averages more
_CHARS_AHEAD = 6  # per token of a window, left between its start and the end of the text
_LONGEST_LINE = 1000  # characters; a text without line ends is cut at words


@dataclass(frozen=True)
class Prompts:
    """How rows become token ids.

    Args:
        template: "chat" renders `prompt` and `messages` rows with the tokenizer's chat template, "none" takes
            `prompt` as it is, "auto" is "chat" where the tokenizer has a template. `text` rows are never
            rendered.
        thinking: value of `enable_thinking` for the template.
        turns: which user turns of a conversation become prompts; each carries the turns before it.
        prompt_tokens: length of the window cut from a `text` row to be continued.
        prompts_per_document: windows per `text` row, at places fixed by its content.
        max_prompt_tokens: longer prompts are skipped and counted; teacher-forced text is cut into pieces.
        min_prompt_tokens: shorter prompts are skipped and counted.
    """

    template: Literal["auto", "chat", "none"] = "auto"
    thinking: bool = False
    turns: Literal["last", "first", "all"] = "last"
    prompt_tokens: int = 64
    prompts_per_document: int = 1
    max_prompt_tokens: int = 2048
    min_prompt_tokens: int = 1

    def __post_init__(self) -> None:
        for name in ("prompt_tokens", "prompts_per_document", "max_prompt_tokens", "min_prompt_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}; give at least 1")
        if self.min_prompt_tokens > self.max_prompt_tokens:
            raise ValueError(
                f"min_prompt_tokens {self.min_prompt_tokens} exceeds max_prompt_tokens "
                f"{self.max_prompt_tokens}"
            )


@dataclass(frozen=True)
class Prompt:
    """Given token ids. Tokens from index `first_learned` on are to be learned, the continuation always."""

    ids: Int32[ndarray, " P"]
    first_learned: int
    where: str


class PromptSet(Sequence[Prompt]):
    """All prompts of a corpus in one flat array: a million of them are a gigabyte, not ten."""

    def __init__(self, prompts: Iterable[Prompt]) -> None:
        ids, starts, learned, self._where = [np.empty(0, np.int32)], [0], [], []
        for prompt in prompts:
            ids.append(prompt.ids)
            starts.append(starts[-1] + len(prompt.ids))
            learned.append(prompt.first_learned)
            self._where.append(prompt.where)
        self._ids = np.concatenate(ids)
        self._starts = np.asarray(starts, np.int64)
        self._learned = np.asarray(learned, np.int64)

    def __len__(self) -> int:
        return len(self._where)

    def __getitem__(self, index: int) -> Prompt:  # type: ignore[override]
        start, stop = self._starts[index], self._starts[index + 1]
        return Prompt(self._ids[start:stop], int(self._learned[index]), self._where[index])

    @property
    def lengths(self) -> Int32[ndarray, " n"]:
        return np.diff(self._starts)

    @property
    def max_id(self) -> int:
        return int(self._ids.max(initial=0))

    def sha256(self) -> str:
        """Hash of ids, lengths and what is learned: two runs over the same prompts agree."""
        digest = hashlib.sha256()
        for array in (self._ids, self._starts, self._learned):
            digest.update(array.tobytes())
        return digest.hexdigest()


def build_prompts(
    rows: Iterable[Row],
    tokenizer: PreTrainedTokenizerBase,
    settings: Prompts,
    accounting: Accounting,
    *,
    teacher_forced: bool = False,
) -> Iterator[Prompt]:
    """Prompts of all rows, without duplicates, in order.

    Args:
        rows: checked rows.
        tokenizer: the target's.
        settings: how rows become ids.
        accounting: receives used and skipped rows; a row is used when at least one prompt comes of it.
        teacher_forced: take the corpus' own text as what is learned: every token of `text` rows, the
            assistant's tokens of `messages` rows.

    Raises:
        CorpusError: the tokenizer has no chat template, or the template refuses a conversation.
    """
    leading = _leading_ids(tokenizer)
    seen: set[bytes] = set()
    iterator = iter(rows)
    while group := list(islice(iterator, _GROUP)):
        pieces = [
            (row, piece) for row in group for piece in _render(row, tokenizer, settings, teacher_forced)
        ]
        texts = [text for _, piece in pieces for text in (piece.prompt, piece.completion)]
        ids = tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []
        made: dict[int, int] = {}
        reasons: dict[int, str] = {}
        for number, (row, piece) in enumerate(pieces):
            prompt, completion = (np.asarray(part, np.int32) for part in ids[2 * number : 2 * number + 2])
            if not piece.rendered:
                prompt = np.concatenate([leading, prompt])
            for result in _cut(row, piece, prompt, completion, settings):
                if isinstance(result, str):
                    reasons[id(row)] = result
                    continue
                key = hashlib.sha256(result.ids.tobytes() + bytes([teacher_forced])).digest()
                if key in seen:
                    reasons[id(row)] = "duplicate prompt"
                    continue
                seen.add(key)
                made[id(row)] = made.get(id(row), 0) + 1
                yield result
        for row in group:
            if made.get(id(row)):
                accounting.used += 1
            else:
                accounting.skip(reasons.get(id(row), "no assistant turn to learn from"), row.where)


@dataclass(frozen=True)
class _Piece:
    """Text to tokenise. `rendered`: the template wrote the special tokens already."""

    prompt: str
    completion: str
    rendered: bool
    window: bool = False


def _render(
    row: Row, tokenizer: PreTrainedTokenizerBase, settings: Prompts, teacher_forced: bool
) -> Iterator[_Piece]:
    if isinstance(row.content, str) and row.kind == "text":
        if teacher_forced:
            yield _Piece(row.content, "", rendered=False)
            return
        for number in range(settings.prompts_per_document):
            window = _window(row.content, row.digest, number, settings.prompt_tokens)
            yield _Piece(window, "", rendered=False, window=True)
    elif isinstance(row.content, str) and not _uses_template(tokenizer, settings, row):
        yield _Piece(row.content, "", rendered=False)
    else:
        messages = (
            [{"role": "user", "content": row.content}] if isinstance(row.content, str) else list(row.content)
        )
        yield from _render_chat(row, messages, tokenizer, settings, teacher_forced)


def _render_chat(
    row: Row,
    messages: list[Message],
    tokenizer: PreTrainedTokenizerBase,
    settings: Prompts,
    teacher_forced: bool,
) -> Iterator[_Piece]:
    _uses_template(tokenizer, settings, row)
    wanted = "assistant" if teacher_forced else "user"
    turns = [index for index, message in enumerate(messages) if message["role"] == wanted]
    turns = {"all": turns, "first": turns[:1], "last": turns[-1:]}[settings.turns]
    for turn in turns:
        if not teacher_forced:
            yield _Piece(_templated(row, messages[: turn + 1], tokenizer, settings, True), "", rendered=True)
            continue
        if turn == 0:  # nothing was asked: no prompt to answer
            continue
        prompt = _templated(row, messages[:turn], tokenizer, settings, True)
        whole = _templated(row, messages[: turn + 1], tokenizer, settings, False)
        if not whole.startswith(prompt):
            raise CorpusError(
                f"{row.where}: the chat template changes the prompt once the answer follows, so the answer's "
                "tokens cannot be told apart; let the target write its own answer (max_new_tokens > 0) "
                "instead"
            )
        yield _Piece(prompt, whole[len(prompt) :], rendered=True)


def _templated(
    row: Row, messages: list[Message], tokenizer: PreTrainedTokenizerBase, settings: Prompts, prompt: bool
) -> str:
    """The rendered text. Asking for text, not ids, keeps transformers 5's BatchEncoding out of the way."""
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=prompt, enable_thinking=settings.thinking
        )
    except TemplateError as error:
        raise CorpusError(f"{row.where}: the chat template refuses this conversation: {error}") from error
    assert isinstance(text, str)
    return text


def _uses_template(tokenizer: PreTrainedTokenizerBase, settings: Prompts, row: Row) -> bool:
    has_one = bool(tokenizer.chat_template)
    if not has_one and (settings.template == "chat" or row.kind == "messages"):
        raise CorpusError(
            f"{row.where}: `{row.kind}` rows need a chat template and the tokenizer has none; use the "
            "instruct model's tokenizer, or `prompt` rows with template=none"
        )
    return has_one and settings.template != "none"


def _cut(
    row: Row,
    piece: _Piece,
    prompt: Int32[ndarray, " p"],
    completion: Int32[ndarray, " c"],
    settings: Prompts,
) -> Iterator[Prompt | str]:
    """Prompts of one piece, or the reason why there is none."""
    limit = settings.max_prompt_tokens
    if piece.window:
        if len(prompt) < settings.prompt_tokens:
            yield f"text shorter than prompt_tokens={settings.prompt_tokens}"
        else:
            ids = prompt[: min(settings.prompt_tokens, limit)]
            yield Prompt(ids, len(ids), row.where)
    elif row.kind == "text":
        for start in range(0, len(prompt), limit):
            ids = prompt[start : start + limit]
            yield Prompt(ids, 1, row.where) if len(ids) > 1 else "single token left"
    elif len(prompt) + len(completion) > limit:
        yield f"longer than max_prompt_tokens={limit}"
    elif not len(prompt):
        yield "no tokens"
    elif len(prompt) < settings.min_prompt_tokens:
        yield f"shorter than min_prompt_tokens={settings.min_prompt_tokens}"
    else:
        yield Prompt(np.concatenate([prompt, completion]), len(prompt), row.where)


def _window(text: str, digest: bytes, number: int, tokens: int) -> str:
    """A slice of `text` that starts with a line, or else a word, at a place chosen by the text's hash."""
    room = max(0, len(text) - tokens * _CHARS_AHEAD)
    draw = hashlib.sha256(digest + number.to_bytes(4, "big")).digest()
    place = int.from_bytes(draw[:8], "big") % (room + 1)
    start = text.rfind("\n", max(0, place - _LONGEST_LINE), place) + 1
    if not start and place > _LONGEST_LINE:
        start = text.rfind(" ", place - _LONGEST_LINE, place) + 1 or place
    return text[start : start + tokens * _CHARS_PER_TOKEN]


def _leading_ids(tokenizer: PreTrainedTokenizerBase) -> Int32[ndarray, " b"]:
    """What the tokenizer puts before plain text: a beginning-of-sequence id for some, nothing for Qwen."""
    ids = tokenizer("", add_special_tokens=True)["input_ids"]
    return np.asarray(
        [i for i in ids if i == tokenizer.bos_token_id and tokenizer.bos_token_id is not None], np.int32
    )
