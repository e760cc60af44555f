"""Rows to prompts: chat templates, thinking on or off, windows of long texts.

A template builds prompts only. What is learned are token ids: the target's own continuation, or,
teacher-forced, the tokens that follow the prompt. Text is never rendered, generated and then tokenised again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
from jaxtyping import Int32
from numpy import ndarray

from certdraft.data.corpus.accounting import Accounting
from certdraft.data.corpus.corpora import CorpusError
from certdraft.data.corpus.rows import Message, Row

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_GROUP = 256  # rows tokenised in one call
_CHARS_PER_TOKEN = 32  # text cut for a window; no tokenizer in use averages more
_CHARS_AHEAD = 6  # per token of a window, left between its start and the end of the text
_LITTLE = 0.01  # share of a text that its windows take, below which this is told
_UNREAD = "less than 1 % of the text is used: prompts.prompts_per_document takes more windows of it"
_LONGEST_LINE = 1000  # characters; a text without line ends is cut at words
_MOST_CHARS_PER_TOKEN = 256  # longer text than this cannot be within a limit of tokens, and is not tokenised
_LONGEST_WORD = 1_000_000  # characters; tokenizers take minutes and gigabytes for longer ones


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
        """Hash of ids, lengths and what is learned; equal for two runs over the same prompts."""
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
    bad_rows: Literal["error", "skip"] = "error",
) -> Iterator[Prompt]:
    """Prompts of all rows, without duplicates, in order.

    Args:
        rows: checked rows.
        tokenizer: the target's.
        settings: how rows become ids.
        accounting: receives used and skipped rows; a row is used when at least one prompt comes of it.
        teacher_forced: take the corpus' own text as what is learned: every token of `text` rows, the
            assistant's tokens of `messages` rows.
        bad_rows: "error" stops at the first row that the template rejects; "skip" counts it and goes on, as
            does the row's own `bad_rows`.

    Raises:
        CorpusError: the tokenizer has no chat template, or the template rejects a conversation.
    """
    renderer = _Renderer(tokenizer, settings, teacher_forced)
    seen: set[bytes] = set()
    iterator = iter(rows)
    while group := list(islice(iterator, _GROUP)):
        pieces: list[tuple[int, _Piece]] = []
        reasons = [("no assistant turn to learn from", row.where) for row in group]
        for number, row in enumerate(group):
            renderer.check_template(row)
            try:
                pieces += [(number, piece) for piece in renderer.pieces(row)]
            except CorpusError as error:
                if "skip" not in (bad_rows, row.bad_rows):
                    raise
                reasons[number] = ("malformed", str(error))
        for number, piece in pieces:
            if len(piece) > renderer.most_chars:
                too_long = f"longer than max_prompt_tokens={settings.max_prompt_tokens}"
                reasons[number] = (too_long, group[number].where)
        short = [(number, piece) for number, piece in pieces if len(piece) <= renderer.most_chars]
        texts = [text for _, piece in short for text in (piece.prompt, piece.completion)]
        ids = iter(tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else [])
        used: set[int] = set()
        windowed = [0.0] * len(group)  # characters of each row that its windows take
        for number, piece in short:
            prompt, completion = (np.asarray(next(ids), np.int32) for _ in range(2))
            for result in renderer.cut(group[number], piece, prompt, completion):
                if isinstance(result, Prompt):
                    key = hashlib.sha256(result.ids.tobytes() + bytes([teacher_forced])).digest()
                    if key not in seen:
                        seen.add(key)
                        used.add(number)
                        if piece.window:
                            windowed[number] += len(piece.prompt) * len(result.ids) / len(prompt)
                        yield result
                        continue
                    result = "duplicate prompt"
                reasons[number] = (result, group[number].where)
        for number, reason in enumerate(reasons):
            account = accounting.part(group[number].part)
            if number in used:
                account.used += 1
                if 0 < windowed[number] < _LITTLE * len(group[number].content):
                    account.note(_UNREAD, group[number].where)
            else:
                account.skip(*reason)


@dataclass(frozen=True)
class _Piece:
    """Text to tokenise. `rendered`: by the template, which wrote the special tokens already."""

    prompt: str
    completion: str = ""
    rendered: bool = False
    window: bool = False
    document: bool = False

    def __len__(self) -> int:
        """Characters, where `max_prompt_tokens` limits them; other text is cut rather than left out."""
        return 0 if self.window or self.document else len(self.prompt) + len(self.completion)


class _Renderer:
    """Rows as text, and its token ids as prompts."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: Prompts, teacher_forced: bool) -> None:
        self.tokenizer, self.settings, self.teacher_forced = tokenizer, settings, teacher_forced
        self.most_chars = settings.max_prompt_tokens * _MOST_CHARS_PER_TOKEN
        self.markers = tuple(str(token) for token in tokenizer.added_tokens_decoder.values())
        # What the tokenizer puts before plain text: a beginning-of-sequence id for some, nothing for Qwen.
        ids, bos = tokenizer("", add_special_tokens=True)["input_ids"], tokenizer.bos_token_id
        self.leading = np.asarray([i for i in ids if bos is not None and i == bos], np.int32)

    def check_template(self, row: Row) -> None:
        """Raise if the row needs a chat template and the tokenizer has none."""
        chat = row.kind == "messages" or (row.kind == "prompt" and self.settings.template == "chat")
        if chat and not self.tokenizer.chat_template:
            raise CorpusError(
                f"{row.where}: `{row.kind}` rows need a chat template and the tokenizer has none; use the "
                "instruct model's tokenizer, or `prompt` rows with template=none"
            )

    def pieces(self, row: Row) -> Iterator[_Piece]:
        settings, content = self.settings, row.content
        if not isinstance(content, str):
            yield from self._chat(row, list(content))
        elif row.kind == "text" and self.teacher_forced:
            longest = max(map(len, content.split()), default=0) if len(content) > _LONGEST_WORD else 0
            if longest > _LONGEST_WORD:
                raise CorpusError(
                    f"{row.where}: text holds a word of {longest:,} characters, which no tokenizer can take; "
                    "remove encoded data from the corpus"
                )
            yield _Piece(content, document=True)
        elif row.kind == "text":
            for number in range(settings.prompts_per_document):
                yield _Piece(_window(content, row.digest, number, settings.prompt_tokens), window=True)
        elif self.tokenizer.chat_template and settings.template != "none":
            yield from self._chat(row, [{"role": "user", "content": content}])
        else:
            yield _Piece(content)

    def cut(
        self, row: Row, piece: _Piece, prompt: Int32[ndarray, " p"], completion: Int32[ndarray, " c"]
    ) -> Iterator[Prompt | str]:
        """Prompts of one piece, or the reason why there is none."""
        settings, limit, leading = self.settings, self.settings.max_prompt_tokens, self.leading
        if not piece.rendered and not np.array_equal(prompt[: len(leading)], leading):
            prompt = np.concatenate([leading, prompt])
        if piece.window:
            if len(prompt) < settings.prompt_tokens:
                yield f"text shorter than prompt_tokens={settings.prompt_tokens}"
            else:
                ids = prompt[: min(settings.prompt_tokens, limit)]
                yield Prompt(ids, len(ids), row.where)
        elif piece.document:
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

    def _chat(self, row: Row, messages: list[Message]) -> Iterator[_Piece]:
        wanted = "assistant" if self.teacher_forced else "user"
        turns = [index for index, message in enumerate(messages) if message["role"] == wanted]
        turns = {"all": turns, "first": turns[:1], "last": turns[-1:]}[self.settings.turns]
        for turn in turns:
            if not self.teacher_forced:
                yield _Piece(self._templated(row, messages[: turn + 1], prompt=True), rendered=True)
                continue
            if turn == 0:  # nothing was asked: no prompt to answer
                continue
            prompt = self._templated(row, messages[:turn], prompt=True)
            whole = self._templated(row, messages[: turn + 1], prompt=False)
            if not whole.startswith(prompt):
                raise CorpusError(
                    f"{row.where}: the chat template changes the prompt once the answer follows, so the "
                    "answer's tokens cannot be told apart; let the target write its own answer "
                    "(max_new_tokens > 0) instead"
                )
            answer = whole[len(prompt) :]
            if answer.rstrip().endswith(
                self.markers
            ):  # a target stops at the end of its turn: the template's
                answer = answer.rstrip()  # line end after it is not generated
            yield _Piece(prompt, answer, rendered=True)

    def _templated(self, row: Row, messages: list[Message], *, prompt: bool) -> str:
        return render_chat(
            self.tokenizer, messages, row.where, thinking=self.settings.thinking, prompt=prompt,
            tools=row.tools,
        )  # fmt: skip


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    where: str,
    *,
    thinking: bool = False,
    prompt: bool = True,
    tools: Sequence[Any] = (),
    name: str = "conversation",
) -> str:
    """Return a chat as text; ids would come as transformers 5's BatchEncoding.

    Args:
        tokenizer: has a chat template.
        messages: turns with `role` and `content`.
        where: place of the chat, for the error.
        thinking: value of `enable_thinking` for the template.
        prompt: end with the opening of the assistant's turn.
        tools: tools that the template describes.
        name: what the chat is called in the error.

    Raises:
        CorpusError: the template rejects the turns.
    """
    from jinja2 import TemplateError

    try:
        text = tokenizer.apply_chat_template(
            list(messages), tools=list(tools) or None, tokenize=False, add_generation_prompt=prompt,
            enable_thinking=thinking,
        )  # fmt: skip
    except (TemplateError, TypeError, ValueError, LookupError, AttributeError) as error:
        raise CorpusError(f"{where}: the chat template rejects this {name}: {error}") from error
    assert isinstance(text, str)
    return text


def _window(text: str, digest: bytes, number: int, tokens: int) -> str:
    """A slice of `text` that starts with a line, or else a word, at a place chosen by the text's hash."""
    room = max(0, len(text) - tokens * _CHARS_AHEAD)
    draw = hashlib.sha256(digest + number.to_bytes(4, "big")).digest()
    place = int.from_bytes(draw[:8], "big") % (room + 1)
    start = text.rfind("\n", max(0, place - _LONGEST_LINE), place) + 1
    if not start and place > _LONGEST_LINE:
        start = text.rfind(" ", place - _LONGEST_LINE, place) + 1 or place
    return text[start : start + tokens * _CHARS_PER_TOKEN]
