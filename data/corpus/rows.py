"""Checked rows: `{"messages": [...]}`, `{"prompt": ...}`, `{"text": ...}` or ShareGPT's `conversations`.

Splits are by content hash: the same row is in the same split on every machine, in any order of files.
"""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from certdraft.data.corpus.accounting import Accounting
from certdraft.data.corpus.corpora import EMBEDDED_CORPUS, Corpus, CorpusError, Kind, Source, read_records

Message = dict[str, Any]

_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHARE_GPT = {"human": "user", "gpt": "assistant", "function_call": "assistant", "observation": "tool"}


@dataclass(frozen=True)
class Row:
    """One checked row: `content` is text, or messages; `where` names it, as in "chats.jsonl:12".

    `tools` are the functions that a conversation may call, as the chat template takes them. `part` names the
    source in a mixture; `bad_rows` is that of its source.
    """

    where: str
    kind: Kind
    content: str | tuple[Message, ...]
    digest: bytes
    tools: tuple[dict[str, Any], ...] = ()
    part: str = ""
    bad_rows: Literal["error", "skip"] = "error"


def read_rows(corpus: Corpus, accounting: Accounting) -> Iterator[Row]:
    """Checked rows without duplicates, of the wanted split; those of a mixture in the order of its draw.

    Args:
        corpus: which rows.
        accounting: receives what is read and skipped, in a part for each source of a mixture; a row that is
            yielded is left for the caller to count.

    Raises:
        CorpusError: malformed row (unless `bad_rows` is "skip"), empty file, nothing readable in the folder.
        FileNotFoundError: no such file or folder, or the hub does not answer.
    """
    seen: set[bytes] = set()
    if not corpus.sources:
        yield from _source_rows(corpus, accounting, seen)
        return
    parts = [f"sources[{index}] {source.source}" for index, source in enumerate(corpus.sources)]
    waiting = [
        (source.share, _part_rows(source, part, accounting.part(part), seen))
        for source, part in zip(corpus.sources, parts, strict=True)
    ]
    draw, yielded = random.Random(corpus.mix_seed), 0
    while waiting and (corpus.max_rows is None or yielded < corpus.max_rows):
        [drawn] = draw.choices(range(len(waiting)), [share for share, _ in waiting])
        row = next(waiting[drawn][1], None)
        if row is None:
            del waiting[drawn]
        else:
            yielded += 1
            yield row


def _part_rows(source: Source, part: str, accounting: Accounting, seen: set[bytes]) -> Iterator[Row]:
    """Rows of one source of a mixture; places and errors name it."""
    try:
        for row in _source_rows(source, accounting, seen):
            yield replace(row, where=f"{part}, {row.where}", part=part)
    except (CorpusError, FileNotFoundError) as error:
        kind = CorpusError if isinstance(error, CorpusError) else FileNotFoundError
        raise kind(f"corpus.{part}: {error}") from error


def _source_rows(corpus: Source, accounting: Accounting, seen: set[bytes]) -> Iterator[Row]:
    yielded = 0
    for where, record in read_records(corpus):
        if corpus.max_rows is not None and yielded >= corpus.max_rows:
            return
        accounting.read += 1
        try:
            row = _check(where, record, corpus)
        except CorpusError as error:
            if corpus.bad_rows == "error":
                raise
            accounting.skip("malformed", str(error))
            continue
        if row.digest in seen:
            accounting.skip("duplicate", where)
        elif corpus.source != EMBEDDED_CORPUS and corpus.split not in ("all", split_of_content(row, corpus)):
            accounting.skip(f"not in split {corpus.split}", where)
        else:
            seen.add(row.digest)
            yielded += 1
            yield row


def split_of_content(row: Row, corpus: Source) -> Literal["train", "validation", "test"]:
    """Return the split of a row, which depends only on its content."""
    part = int.from_bytes(hashlib.sha256(b"certdraft-split" + row.digest).digest()[:8], "big") / 2**64
    if part < corpus.validation_fraction:
        return "validation"
    return "test" if part < corpus.validation_fraction + corpus.test_fraction else "train"


def _check(where: str, record: Any, corpus: Source) -> Row:
    if isinstance(record, CorpusError):
        raise record
    if not isinstance(record, dict):
        raise CorpusError(f"{where}: expected an object with a key, got {type(record).__name__}")
    key, kind = _content_key(where, record, corpus)
    value = record[key]
    if kind == "prompt" and isinstance(value, list):
        kind = "messages"  # a prompt may itself be a conversation
    if kind == "messages":
        content: str | tuple[Message, ...] = _checked_messages(f"{where}: {key}", value)
    elif not isinstance(value, str):
        raise CorpusError(f"{where}: {key}: expected a string, got {type(value).__name__}")
    elif not value.strip():
        raise CorpusError(f"{where}: {key} is empty")
    else:
        content = value
    tools = _checked_tools(f"{where}: tools", record.get("tools")) if kind == "messages" else ()
    try:
        data = content.encode() if isinstance(content, str) else _canonical(content)
        data += b"tools" + _canonical(tools) if tools else b""
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{where}: {key} holds a lone surrogate (U+{ord(error.object[error.start]):04X}), which no UTF-8 "
            "text has"
        ) from error
    except RecursionError:
        raise CorpusError(f"{where}: {key} is nested too deep") from None
    return Row(
        where, kind, content, hashlib.sha256(kind.encode() + data).digest(), tools, bad_rows=corpus.bad_rows
    )


def _content_key(where: str, record: dict[str, Any], corpus: Source) -> tuple[str, Kind]:
    keys = ", ".join(f"`{key}`" for key in record) or "no keys"
    if corpus.column is not None:
        if corpus.column not in record:
            raise CorpusError(f"{where}: no key {corpus.column!r}; the row has {keys}")
        return corpus.column, corpus.kind
    kinds: dict[str, Kind] = {kind: kind for kind in get_args(Kind)} | {"conversations": "messages"}
    for key, kind in kinds.items():
        if record.get(key) is not None:  # parquet rows carry the missing keys of other rows as nulls
            return key, kind
    raise CorpusError(
        f"{where}: a row needs `messages`, `prompt` or `text`, this one has {keys}; "
        "if another column holds it, name it with column= and kind="
    )


def _checked_messages(where: str, value: Any) -> tuple[Message, ...]:
    """Messages in the form that chat templates read.

    ShareGPT's from and value become role and content. Keys without a value are left out, and `tool_calls: []`
    too, since templates ask whether they are there; content that is null beside tool calls becomes "".
    """
    if not isinstance(value, list) or not value:
        raise CorpusError(f"{where}: expected a list of messages, got {_shown(value)}")
    messages = []
    for index, given in enumerate(value):
        at = f"{where}[{index}]"
        if not isinstance(given, dict):
            raise CorpusError(f"{at}: expected an object with `role` and `content`, got {_shown(given)}")
        message = {key: part for key, part in given.items() if part is not None}
        if "from" in message and "role" not in message:
            role = message.pop("from")
            message["role"] = _SHARE_GPT.get(role, role) if isinstance(role, str) else role
            message["content"] = message.pop("value", None)
        if not message.get("tool_calls", True):
            del message["tool_calls"]
        if message.get("role") not in _ROLES:
            raise CorpusError(f"{at}.role: expected one of {', '.join(_ROLES)}, got {message.get('role')!r}")
        if "tool_calls" in message:
            message.setdefault("content", "")
            if not isinstance(message["tool_calls"], list):
                raise CorpusError(f"{at}.tool_calls: expected a list, got {_shown(message['tool_calls'])}")
        if not isinstance(message.get("content"), str):
            raise CorpusError(f"{at}.content: expected a string, got {_shown(message.get('content'))}")
        messages.append(message)
    if not any(message["role"] == "user" for message in messages):
        raise CorpusError(f"{where}: no user turn, so nothing to answer")
    return tuple(messages)


def _checked_tools(where: str, value: Any) -> tuple[dict[str, Any], ...]:
    if isinstance(value, str):  # hub datasets often store them as JSON text
        try:
            value = json.loads(value or "[]")
        except (ValueError, RecursionError) as error:
            raise CorpusError(f"{where}: not valid JSON ({error})") from error
    value = value or []
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise CorpusError(f"{where}: expected a list of objects, got {_shown(value)}")
    return tuple(value)


def _shown(value: Any) -> str:
    return "an empty list" if value == [] else type(value).__name__


def _canonical(content: tuple[dict[str, Any], ...]) -> bytes:
    return json.dumps(list(content), sort_keys=True, ensure_ascii=False, default=str).encode()
