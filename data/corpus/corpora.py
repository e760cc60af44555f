"""Rows from files, folders, the hub or the embedded corpus, each checked before anything is built on it.

json, jsonl and text are read here rather than through `datasets`, whose errors name neither the line nor the
key; parquet, saved `datasets` folders and hub names go through `datasets`. A row is `{"messages": [...]}`,
`{"prompt": ...}` or `{"text": ...}`. Splits are by content hash: the same row lies in the same split on every
machine and however the files are ordered.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from certdraft.data.corpus.accounting import Accounting
from certdraft.data.corpus.hub import hub_rows
from certdraft.data.corpus.standard_library import standard_library

EMBEDDED_CORPUS = "embedded"
Kind = Literal["messages", "prompt", "text"]
Message = dict[str, Any]

_JSON = (".jsonl", ".ndjson", ".json")
_TEXT = (".txt", ".md")
_SUFFIXES = (*_JSON, *(s + ".gz" for s in _JSON), *_TEXT, ".parquet")
_ROLES = ("system", "developer", "user", "assistant", "tool")


class CorpusError(ValueError):
    """A corpus that cannot be read; the message names the file, the row and the key."""


@dataclass(frozen=True)
class Corpus:
    """Which rows to read.

    Args:
        source: "embedded" (the standard library of the running Python), a jsonl, json, parquet or text file,
            a folder of such files, a folder saved by `datasets`, or a hub name such as "owner/name". A text
            file is one document.
        split: part of the rows, chosen by content hash; "all" when the file is a split already.
        column: column that holds the messages, prompt or text, when it is not called so.
        kind: what `column` holds.
        hub_config: configuration of a hub dataset that has several.
        hub_split: split of a hub dataset or of a saved `DatasetDict` to read; `split` applies on top.
        streaming: read a hub dataset row by row, without downloading all of it first; with `max_rows` only
            its beginning.
        validation_fraction: share of the rows in split "validation", in [0, 1).
        test_fraction: share of the rows in split "test", in [0, 1).
        max_rows: stop after this many rows that are neither duplicates nor of another split.
        bad_rows: "error" stops at the first malformed row; "skip" counts it and goes on.
    """

    source: str = EMBEDDED_CORPUS
    split: Literal["all", "train", "validation", "test"] = "train"
    column: str | None = None
    kind: Kind = "prompt"
    hub_config: str | None = None
    hub_split: str = "train"
    streaming: bool = False
    validation_fraction: float = 0.05
    test_fraction: float = 0.05
    max_rows: int | None = None
    bad_rows: Literal["error", "skip"] = "error"

    def __post_init__(self) -> None:
        validation, test = self.validation_fraction, self.test_fraction
        if min(validation, test) < 0 or validation + test >= 1:
            raise ValueError(
                f"validation_fraction {validation} and test_fraction {test} must be ≥ 0 and "
                "sum to less than 1"
            )
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"max_rows is {self.max_rows}; give at least 1, or leave it out for all rows")


@dataclass(frozen=True)
class Row:
    """One checked row: `content` is text, or messages; `where` names it, as in "chats.jsonl:12"."""

    where: str
    kind: Kind
    content: str | tuple[Message, ...]
    digest: bytes


def read_rows(corpus: Corpus, accounting: Accounting) -> Iterator[Row]:
    """Checked rows without duplicates, of the wanted split.

    Args:
        corpus: which rows.
        accounting: receives what is read and skipped; a row that is yielded is left for the caller to count.

    Raises:
        CorpusError: malformed row (unless `bad_rows` is "skip"), empty file, nothing readable in the folder.
        FileNotFoundError: no such file or folder, or the hub does not answer.
    """
    seen: set[bytes] = set()
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


def split_of_content(row: Row, corpus: Corpus) -> Literal["train", "validation", "test"]:
    """The split a row belongs to, by its content alone."""
    part = int.from_bytes(hashlib.sha256(b"certdraft-split" + row.digest).digest()[:8], "big") / 2**64
    if part < corpus.validation_fraction:
        return "validation"
    return "test" if part < corpus.validation_fraction + corpus.test_fraction else "train"


# ---- reading: (where, record), or (where, CorpusError) for a row that cannot even be parsed


def read_records(corpus: Corpus) -> Iterator[tuple[str, Any]]:
    """Rows as they stand in the source, unchecked, each with where it is from.

    A row that cannot be parsed comes as the `CorpusError` that `read_rows` would raise for it. Only `source`,
    `hub_config` and `hub_split` matter, and `split` for the embedded corpus.

    Raises:
        CorpusError: empty file, nothing readable in the folder.
        FileNotFoundError: no such file or folder, or the hub does not answer.
    """
    if corpus.source == EMBEDDED_CORPUS:
        documents = standard_library(None if corpus.split == "all" else corpus.split)
        # By content hash, so that the first `max_rows` are a fair sample and not the letter A.
        documents.sort(key=lambda document: hashlib.sha256(document.text.encode()).digest())
        yield from ((f"standard library {d.name}", {"text": d.text}) for d in documents)
        return
    path = Path(corpus.source).expanduser()
    if path.is_file():
        yield from _file_records(path, path.name)
    elif path.is_dir():
        yield from _folder_records(path, corpus)
    elif _looks_like_a_path(corpus.source):
        names = sorted(p.name for p in path.parent.glob("*")) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=5, cutoff=0.0)
        listed = f"{path.parent} holds {', '.join(near)}" if near else f"there is no folder {path.parent}"
        raise FileNotFoundError(f"corpus {corpus.source}: no such file or folder; {listed}")
    else:
        yield from hub_rows(corpus.source, corpus.hub_config, corpus.hub_split, corpus.streaming)


def _looks_like_a_path(source: str) -> bool:
    return source.startswith((".", "/", "~")) or source.endswith(_SUFFIXES) or source.count("/") > 1


def _folder_records(folder: Path, corpus: Corpus) -> Iterator[tuple[str, Any]]:
    if (folder / "trace.json").exists():
        raise CorpusError(
            f"{folder} is a trace, not a corpus; train from it directly, or give the prompts' files"
        )
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        yield from _saved_records(folder, corpus)
        return
    visible = (
        p for p in folder.rglob("*") if not any(s.startswith(".") for s in p.relative_to(folder).parts)
    )
    files = sorted(p for p in visible if p.is_file() and p.name.endswith(_SUFFIXES))
    if not files:
        raise CorpusError(
            f"{folder} holds no file ending in {', '.join(_SUFFIXES)}; give another folder or a file"
        )
    for file in files:
        yield from _file_records(file, str(file.relative_to(folder)))


def _saved_records(folder: Path, corpus: Corpus) -> Iterator[tuple[str, Any]]:
    from datasets import DatasetDict, load_from_disk

    dataset = load_from_disk(str(folder))
    if isinstance(dataset, DatasetDict):
        if corpus.hub_split not in dataset:
            raise CorpusError(
                f"{folder} has splits {', '.join(dataset)}; none is hub_split={corpus.hub_split!r}"
            )
        dataset = dataset[corpus.hub_split]
    yield from ((f"{folder.name} row {index}", record) for index, record in enumerate(dataset))


def _file_records(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    if path.stat().st_size == 0:
        raise CorpusError(f"{name} is empty; give a file with at least one row")
    if path.name.endswith(_TEXT):
        yield f"{name}:1", _decoded(path.read_bytes(), f"{name}:1", lambda text: {"text": text})
    elif path.suffix == ".parquet":
        yield from _parquet_records(path, name)
    elif path.name.endswith((".json", ".json.gz")):
        yield from _json_records(path, name)
    elif path.name.endswith(_SUFFIXES):
        yield from _line_records(path, name)
    else:
        raise CorpusError(f"{name}: unknown kind of file; the name must end in {', '.join(_SUFFIXES)}")


def _line_records(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    num_rows = 0
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    num_rows += 1
                    yield f"{name}:{number}", _decoded(line, f"{name}:{number}", json.loads)
    except (gzip.BadGzipFile, EOFError) as error:
        raise CorpusError(f"{name}: broken gzip file ({error}); copy or download it again") from error
    if not num_rows:
        raise CorpusError(f"{name} holds only blank lines; give a file with at least one row")


def _json_records(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    try:
        content = json.loads(data.decode())
    except UnicodeDecodeError as error:
        raise CorpusError(_not_utf8(name, error)) from error
    except (
        json.JSONDecodeError
    ):  # one object a line under the wrong suffix; a really broken file fails by line
        yield from _line_records(path, name)
        return
    if not isinstance(content, list):
        content = [content]
    if not content:
        raise CorpusError(f"{name} holds an empty list; give a file with at least one row")
    yield from ((f"{name}[{index}]", record) for index, record in enumerate(content))


def _parquet_records(path: Path, name: str) -> Iterator[tuple[str, Any]]:
    from datasets import load_dataset

    try:
        dataset = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        yield from ((f"{name} row {index}", record) for index, record in enumerate(dataset))
    except CorpusError:
        raise
    except Exception as error:
        reason = str(error).strip().splitlines()[:1] or [type(error).__name__]
        raise CorpusError(f"{name}: not a readable parquet file ({reason[0]}); write it again") from error


def _decoded(line: bytes, where: str, parse: Any) -> Any:
    try:
        return parse(line.decode())
    except UnicodeDecodeError as error:
        return CorpusError(_not_utf8(where, error))
    except (json.JSONDecodeError, RecursionError) as error:
        return CorpusError(f"{where}: not valid JSON ({error}); each line must hold one object")


def _not_utf8(where: str, error: UnicodeDecodeError) -> str:
    byte = f"byte 0x{error.object[error.start]:02x} at {error.start}"
    return f"{where}: not UTF-8 ({byte}); convert the file with iconv"


# ---- checking


def _check(where: str, record: Any, corpus: Corpus) -> Row:
    if isinstance(record, CorpusError):
        raise record
    if not isinstance(record, dict):
        raise CorpusError(f"{where}: expected an object with a key, got {type(record).__name__}")
    key, kind = _content_key(where, record, corpus)
    value = record[key]
    if kind == "prompt" and isinstance(value, list):
        kind = "messages"  # a prompt may itself be a conversation
    content = (
        _check_messages(f"{where}: {key}", value) if kind == "messages" else _check_text(where, key, value)
    )
    try:
        digest = hashlib.sha256(kind.encode() + _canonical(content)).digest()
    except UnicodeEncodeError as error:
        raise CorpusError(
            f"{where}: {key} holds a lone surrogate (U+{ord(error.object[error.start]):04X}), which no UTF-8 "
            "text has"
        ) from error
    return Row(where, kind, content, digest)


def _content_key(where: str, record: dict[str, Any], corpus: Corpus) -> tuple[str, Kind]:
    if corpus.column is not None:
        if corpus.column not in record:
            raise CorpusError(f"{where}: no key {corpus.column!r}; the row has {_keys(record)}")
        return corpus.column, corpus.kind
    for kind in get_args(Kind):
        if record.get(kind) is not None:  # parquet rows carry the missing keys of other rows as nulls
            return kind, kind
    raise CorpusError(
        f"{where}: a row needs `messages`, `prompt` or `text`, this one has {_keys(record)}; "
        "if another column holds it, name it with column= and kind="
    )


def _keys(record: dict[str, Any]) -> str:
    return ", ".join(f"`{key}`" for key in record) or "no keys"


def _check_text(where: str, key: str, value: Any) -> str:
    if not isinstance(value, str):
        raise CorpusError(f"{where}: {key}: expected a string, got {type(value).__name__}")
    if not value.strip():
        raise CorpusError(f"{where}: {key} is empty")
    return value


def _check_messages(where: str, value: Any) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise CorpusError(f"{where}: expected a list of messages, got {_shown(value)}")
    for index, message in enumerate(value):
        at = f"{where}[{index}]"
        if not isinstance(message, dict):
            raise CorpusError(f"{at}: expected an object with `role` and `content`, got {_shown(message)}")
        if message.get("role") not in _ROLES:
            raise CorpusError(f"{at}.role: expected one of {', '.join(_ROLES)}, got {message.get('role')!r}")
        if not isinstance(message.get("content"), str):
            raise CorpusError(f"{at}.content: expected a string, got {_shown(message.get('content'))}")
    if not any(message["role"] == "user" for message in value):
        raise CorpusError(f"{where}: no user turn, so nothing to answer")
    return tuple(value)


def _shown(value: Any) -> str:
    return "an empty list" if value == [] else type(value).__name__


def _canonical(content: str | Iterable[Message]) -> bytes:
    if isinstance(content, str):
        return content.encode()
    return json.dumps(list(content), sort_keys=True, ensure_ascii=False, default=str).encode()
