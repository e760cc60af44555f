"""Corpora: records from files, folders, the hub or the embedded corpus, each with the place it was read from.

json, jsonl and text are read here rather than through `datasets`, whose errors name neither the line nor the
key; parquet, saved `datasets` folders and hub names go through `datasets`.
"""

from __future__ import annotations

import difflib
import gzip
import hashlib
import json
import os
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from certdraft.data.corpus.standard_library import standard_library
from certdraft.support import HUB_TIMEOUT_S, hub_answers, hub_endpoint, write_text

EMBEDDED_CORPUS = "embedded"
Kind = Literal["messages", "prompt", "text"]
Place = str  # such as "chats.jsonl:12"

_JSON = (".jsonl", ".ndjson", ".json")
_TEXT = (".txt", ".md")
_SUFFIXES = (*_JSON, *(s + ".gz" for s in _JSON), *_TEXT, ".parquet")
_LONGEST_LINE = 1 << 28  # bytes of one row, and
_LARGEST_FILE = 1 << 31  # of a .json file, which is read whole
_BOM = b"\xef\xbb\xbf"
_BROKEN_GZIP = (gzip.BadGzipFile, EOFError, zlib.error)


class CorpusError(ValueError):
    """A corpus that cannot be read; the message names the file, the row and the key."""


@dataclass(frozen=True)
class Source:
    """Which rows to read from one place.

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
        """Raise a ValueError for shares or numbers that cannot be."""
        validation, test = self.validation_fraction, self.test_fraction
        if min(validation, test) < 0 or validation + test >= 1:
            raise ValueError(
                f"validation_fraction {validation} and test_fraction {test} must be ≥ 0 and "
                "sum to less than 1"
            )
        if self.max_rows is not None and self.max_rows < 1:
            raise ValueError(f"max_rows is {self.max_rows}; give at least 1, or leave it out for all rows")


@dataclass(frozen=True)
class MixedSource(Source):
    """One source of a mixture.

    Args:
        share: weight of this source when the next row is drawn, relative to the other sources; above 0.
    """

    share: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.share < float("inf"):
            raise ValueError(f"share of source {self.source} is {self.share}; give a finite number above 0")


@dataclass(frozen=True)
class Corpus(Source):
    """Which rows to read, from one source or from a mixture of several.

    Args:
        sources: mix these instead: each row comes from one of them, drawn by `share` from those that have
            rows left. Each has all settings above, which then stay unset here, but for `max_rows`: the number
            of rows of the mixture. Without it every source is read to its end; shares then decide the order.
        mix_seed: of the draw.
    """

    sources: tuple[MixedSource, ...] = ()
    mix_seed: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        beside = [
            f.name for f in fields(Source) if f.name != "max_rows" and getattr(self, f.name) != f.default
        ]
        if self.sources and beside:
            raise ValueError(
                f"corpus.{beside[0]} is set beside corpus.sources; set it in the sources that it is for"
            )

    def held_out(self, split: Literal["validation", "test"], max_rows: int | None) -> Corpus:
        """The same corpus, of another split in every source and of at most `max_rows` rows."""
        if not self.sources:
            return replace(self, split=split, max_rows=max_rows)
        sources = tuple(replace(source, split=split) for source in self.sources)
        return replace(self, sources=sources, max_rows=max_rows)

    def __str__(self) -> str:
        return ", ".join(source.source for source in self.sources) or self.source


def read_records(corpus: Source) -> Iterator[tuple[Place, Any]]:
    """(place, record) of every record, unchecked; one that cannot be read is its CorpusError.

    Raises:
        CorpusError: an empty file, nothing readable in the folder.
        FileNotFoundError: no such file or folder, or the hub does not answer.
    """
    if corpus.source == EMBEDDED_CORPUS:
        documents = standard_library(None if corpus.split == "all" else corpus.split)
        # In the order of a hash: the first `max_rows` are a fair sample and not the letter A.
        documents.sort(key=lambda document: hashlib.sha256(document.text.encode()).digest())
        yield from ((f"standard library {d.name}", {"text": d.text}) for d in documents)
        return
    path = Path(corpus.source).expanduser()
    if path.is_file():
        yield from _file_records(path, path.name)
    elif path.is_dir():
        yield from _folder_records(path, corpus)
    elif corpus.source.startswith((".", "/", "~")) or path.name.endswith(_SUFFIXES) or len(path.parts) > 2:
        names = sorted(p.name for p in path.parent.glob("*")) if path.parent.is_dir() else []
        near = difflib.get_close_matches(path.name, names, n=5, cutoff=0.0)
        listed = f"{path.parent} holds {', '.join(near)}" if near else f"there is no folder {path.parent}"
        raise FileNotFoundError(f"corpus {corpus.source}: no such file or folder; {listed}")
    else:
        yield from hub_rows(corpus.source, corpus.hub_config, corpus.hub_split, corpus.streaming)


def corpus_of_rows(rows: Iterable[Mapping[str, Any]], file: Path) -> Corpus:
    """Write rows to a jsonl file and return the corpus that reads all of them.

    With the file a trace can be resumed and recorded again, like one of a corpus on disk.

    Args:
        rows: `{"messages": [...]}`, `{"prompt": ...}` or `{"text": ...}`: a list, or a `datasets.Dataset`.
        file: where the rows are kept.
    """
    lines = []
    for index, row in enumerate(rows):
        try:
            lines.append(json.dumps(dict(row), ensure_ascii=False) + "\n")
        except (TypeError, ValueError) as error:
            raise CorpusError(
                f"rows[{index}] cannot be stored as JSON ({error}); give dicts such as {{'prompt': '...'}}"
            ) from error
    if not lines:
        raise CorpusError("rows is empty; give at least one row such as {'prompt': '...'}")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_text(file, "".join(lines))
    return Corpus(source=str(file), split="all")


def hub_rows(
    name: str, config: str | None, split: str, streaming: bool = False
) -> Iterator[tuple[Place, Any]]:
    """(place, record) of every row of a hub dataset."""
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "TRUE", "YES", "ON")
    reason = "HF_HUB_OFFLINE is set; " if offline else ""
    try:
        if not offline and not hub_answers():
            raise FileNotFoundError(f"no answer from {hub_endpoint()} in {HUB_TIMEOUT_S:.0f} s")
        from datasets import load_dataset

        dataset = load_dataset(name, config, split=split, streaming=streaming)
    except Exception as error:  # datasets raises a dozen unrelated types here
        raise FileNotFoundError(
            f"corpus {name!r} is not a local file or folder, and it cannot be read from the hub: {reason}"
            f"{_first_line(error)}. Download it on a machine with access (`hf download --repo-type dataset "
            f"{name} --local-dir DIR`) and give DIR, or a jsonl, parquet or text file, as the corpus source. "
            "A gated dataset needs the HF_TOKEN environment variable."
        ) from error
    yield from _numbered(name, dataset)


def _numbered(name: str, records: Iterable[Any]) -> Iterator[tuple[Place, Any]]:
    return ((f"{name} row {index}", record) for index, record in enumerate(records))


def _folder_records(folder: Path, corpus: Source) -> Iterator[tuple[Place, Any]]:
    if (folder / "trace.json").exists():
        raise CorpusError(
            f"{folder} is a trace, not a corpus; train from it directly, or give the prompts' files"
        )
    if (folder / "state.json").exists() or (folder / "dataset_dict.json").exists():
        from datasets import DatasetDict, load_from_disk

        dataset = load_from_disk(str(folder))
        if isinstance(dataset, DatasetDict):
            if corpus.hub_split not in dataset:
                raise CorpusError(
                    f"{folder} has splits {', '.join(dataset)}; none is hub_split={corpus.hub_split!r}"
                )
            dataset = dataset[corpus.hub_split]
        yield from _numbered(folder.name, dataset)
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


def _file_records(path: Path, name: str) -> Iterator[tuple[Place, Any]]:
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


def _opened(path: Path) -> Any:
    return gzip.open(path) if path.suffix == ".gz" else path.open("rb")


def _line_records(path: Path, name: str) -> Iterator[tuple[Place, Any]]:
    num_rows = number = 0
    try:
        with _opened(path) as file:
            read = partial(file.readline, _LONGEST_LINE)
            for number, line in enumerate(iter(read, b""), 1):
                where, longer = f"{name}:{number}", len(line) == _LONGEST_LINE and not line.endswith(b"\n")
                while longer and len(rest := read()) == _LONGEST_LINE and not rest.endswith(b"\n"):
                    pass  # the rest of the line is left out
                if line.strip():
                    num_rows += 1
                    too_long = CorpusError(f"{where}: a row of more than {_LONGEST_LINE >> 20} MiB; split it")
                    yield where, too_long if longer else _decoded(line, where, json.loads)
    except _BROKEN_GZIP as error:
        broken = f"{name}:{number + 1}: broken gzip file ({error}); copy or download it again"
        yield f"{name}:{number + 1}", CorpusError(broken)
    else:
        if not num_rows:
            raise CorpusError(f"{name} holds only blank lines; give a file with at least one row")


def _json_records(path: Path, name: str) -> Iterator[tuple[Place, Any]]:
    try:
        with _opened(path) as file:
            data = file.read(_LARGEST_FILE + 1)
        if len(data) > _LARGEST_FILE:
            yield name, CorpusError(f"{name} holds more than {_LARGEST_FILE >> 30} GiB; write it as .jsonl")
            return
        content = json.loads(data.removeprefix(_BOM).decode())
    except UnicodeDecodeError as error:
        yield name, CorpusError(_not_utf8(name, error))
    except (ValueError, RecursionError, *_BROKEN_GZIP):
        # one object a line under the wrong suffix; a really broken file fails by line
        yield from _line_records(path, name)
    else:
        content = content if isinstance(content, list) else [content]
        if not content:
            raise CorpusError(f"{name} holds an empty list; give a file with at least one row")
        yield from ((f"{name}[{index}]", record) for index, record in enumerate(content))


def _parquet_records(path: Path, name: str) -> Iterator[tuple[Place, Any]]:
    from datasets import load_dataset

    try:
        dataset = load_dataset("parquet", data_files=str(path), split="train", streaming=True)
        yield from _numbered(name, dataset)
    except CorpusError:
        raise
    except Exception as error:
        raise CorpusError(
            f"{name}: not a readable parquet file ({_first_line(error)}); write it again"
        ) from error


def _decoded(line: bytes, where: Place, parse: Callable[[str], Any]) -> Any:
    try:
        return parse(line.removeprefix(_BOM).decode())
    except UnicodeDecodeError as error:
        return CorpusError(_not_utf8(where, error))
    except (ValueError, RecursionError) as error:  # also an integer of more digits than Python reads
        return CorpusError(f"{where}: not valid JSON ({error}); each line must hold one object")


def _not_utf8(where: Place, error: UnicodeDecodeError) -> str:
    byte = f"byte 0x{error.object[error.start]:02x} at {error.start}"
    return f"{where}: not UTF-8 ({byte}); convert the file with iconv"


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
