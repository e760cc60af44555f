"""Prompts files as benchmarks publish them: Spec-Bench and MT-Bench, GSM8K, HumanEval, MBPP, and plain rows.

The keys of the first row determine the format; every other row must have the same keys. Questions to a chat
target are worded as DFlash and DDTree word them, so that acceptance lengths can be compared; without a chat
template the target continues the bare text.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from certdraft.data import Corpus, CorpusError, read_records
from certdraft.evaluation.measure.trace_reading import evenly_spaced

Record = Mapping[str, Any]


@dataclass(frozen=True)
class Question:
    """One row of a prompts file, turn by turn.

    Attributes:
        where: file and row, as in "question.jsonl:12".
        file: name of the file, without its endings.
        category: task within the file, "" where rows have none.
        turns: user turns for a chat target, at least one.
        bare: the text that a target without a chat template continues.
        history: messages before the first turn.
    """

    where: str
    file: str
    category: str
    turns: tuple[str, ...]
    bare: str
    history: tuple[dict[str, Any], ...] = ()

    @property
    def groups(self) -> tuple[str, ...]:
        """Groups that numbers are also pooled by: the file, and the category in it."""
        return (self.file, f"{self.file}: {self.category}") if self.category else (self.file,)


@dataclass(frozen=True)
class PromptFormat:
    """A published shape of rows: the keys it is recognised by, and the (turns, bare text) of a row."""

    name: str
    keys: tuple[str, ...]
    read: Callable[[Record], tuple[tuple[str, ...], str]]


def _code(record: Record) -> tuple[tuple[str, ...], str]:
    asked = "Write a solution to the following problem and make sure that it passes the tests:"
    return (f"{asked}\n```python\n{record['prompt'].rstrip()}\n```",), record["prompt"]


def _problem(record: Record) -> tuple[tuple[str, ...], str]:
    asked = f"{record['question']}\nPlease reason step by step, and put your final answer within \\boxed{{}}."
    return (asked,), f"Question: {record['question']}\nAnswer:"


def _program(record: Record) -> tuple[tuple[str, ...], str]:
    tests = "\n".join(record["test_list"])
    return (f"{record['text']}\nYour code should pass these tests:\n\n{tests}",), f"# {record['text']}\n"


def _asked(messages: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], ...]:
    """The conversation up to the user's last turn."""
    last = max(index for index, message in enumerate(messages) if message["role"] == "user")
    return tuple(messages[: last + 1])


FORMATS = (
    PromptFormat("Spec-Bench, MT-Bench", ("turns",), lambda r: (tuple(r["turns"]), r["turns"][0])),
    PromptFormat("GSM8K", ("question", "answer"), _problem),
    PromptFormat("HumanEval", ("prompt", "entry_point"), _code),
    PromptFormat("MBPP", ("text", "test_list"), _program),
    PromptFormat("prompts", ("prompt",), lambda r: ((r["prompt"],), r["prompt"])),
    PromptFormat("conversations", ("messages",), lambda r: ((_asked(r["messages"])[-1]["content"],), "")),
)
_TEXTS, _LISTS = ("prompt", "question", "answer", "text", "entry_point"), ("turns", "test_list")


def read_questions(path: str, limit: int | None = None) -> list[Question]:
    """Read the questions of a prompts file.

    Args:
        path: jsonl or json file, also with .gz, in one of `FORMATS`.
        limit: keep so many, evenly spread over the file, so that every category is met; None = all.

    Raises:
        CorpusError: a row of another shape; the message names file, row and key.
        FileNotFoundError: no such file.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise FileNotFoundError(f"prompts file {path}: no such file")
    name = file.name.split(".")[0]
    found: list[Question] = []
    form: PromptFormat | None = None
    for where, record in read_records(Corpus(str(file), split="all")):
        if isinstance(record, CorpusError):
            raise record
        if not isinstance(record, dict):
            raise CorpusError(f"{where}: expected an object with keys, got {type(record).__name__}")
        form = form or _format_of(where, record)
        _check(where, record, form)
        turns, bare = form.read(record)
        history = _asked(record["messages"])[:-1] if form.name == "conversations" else ()
        found.append(Question(where, name, str(record.get("category") or ""), turns, bare, history))
    return [found[index] for index in evenly_spaced(len(found), limit)]


def _format_of(where: str, record: Record) -> PromptFormat:
    for form in FORMATS:
        if all(record.get(key) is not None for key in form.keys):
            return form
    known = "; ".join(f"{f.name}: {' and '.join(f'`{k}`' for k in f.keys)}" for f in FORMATS)
    raise CorpusError(f"{where}: no prompts file has rows with {_keys(record)}. Known are {known}.")


def _check(where: str, record: Record, form: PromptFormat) -> None:
    for key in form.keys:
        if record.get(key) is None:
            raise CorpusError(
                f"{where}: no key `{key}`, which the file's first row has ({form.name}); this one has "
                f"{_keys(record)}. Put rows of one shape into one file."
            )
        value = record[key]
        if key in _TEXTS and not (isinstance(value, str) and value.strip()):
            raise CorpusError(f"{where}: `{key}`: expected a text, got {_shown(value)}")
        if key in _LISTS and not _is_texts(value):
            raise CorpusError(f"{where}: `{key}`: expected a list of at least one text, got {_shown(value)}")
        if key == "messages":
            _check_messages(where, value)


def _check_messages(where: str, value: Any) -> None:
    good = isinstance(value, list) and value and all(isinstance(m, dict) for m in value)
    if not good or not all(isinstance(m.get("content"), str) and m.get("role") for m in value):
        raise CorpusError(
            f"{where}: `messages`: expected objects with `role` and `content`, got {_shown(value)}"
        )
    if not any(message["role"] == "user" for message in value):
        raise CorpusError(f"{where}: `messages`: no turn of a user, so nothing is asked")


def _is_texts(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(v, str) and v.strip() for v in value)


def _keys(record: Record) -> str:
    shown = ", ".join(f"`{key}`" for key in islice(record, 8))
    return shown + (", …" if len(record) > 8 else "") if record else "no keys"


def _shown(value: Any) -> str:
    if value in ("", [], {}):
        return f"an empty {type(value).__name__}"
    return type(value).__name__ if not isinstance(value, str) else "blank text"
