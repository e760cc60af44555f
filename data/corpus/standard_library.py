"""The text that every machine with Python already has: the standard library, split by file.

One file is one document and belongs to exactly one split, chosen by a hash of its path, so that no held-out
text is ever seen in training and the split stays the same on another machine. Left out: test suites (absent
from some distributions), machine-written tables (`encodings`), and build residue. `pydoc_data.topics`, the
language reference, is one document of prose.

The text is read in place; none of it is shipped with certdraft.
"""

from __future__ import annotations

import hashlib
import importlib
import sysconfig
import tokenize
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

Split = Literal["train", "validation", "test"]

_SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "encodings", "ensurepip", "idle_test", "lib-dynload", "lib2to3", "site-packages"}
    | {"dist-packages", "pydoc_data", "test", "tests", "turtledemo"}
)
_SKIPPED_PREFIXES = ("_sysconfigdata", "config-", "__phello__")
_SALT = "certdraft-1"
_HELD_OUT_PARTS = 20  # 1/20 of the files for validation, 1/20 for test


@dataclass(frozen=True)
class Document:
    """One text: `name` is its path inside the library, with `/`, the same on every machine."""

    name: str
    text: str


def split_of(name: str) -> Split:
    """The split that a document belongs to: 90 % train, 5 % validation, 5 % test, by a hash of its name."""
    part = int.from_bytes(hashlib.sha256(f"{_SALT}:{name}".encode()).digest()[:8], "big") % _HELD_OUT_PARTS
    return "validation" if part == 0 else "test" if part == 1 else "train"


def standard_library(split: Split | None = None) -> list[Document]:
    """Documents of the running Python's standard library, sorted by name.

    Args:
        split: only this split; all three when None.

    Raises:
        ValueError: unknown split.
        FileNotFoundError: this Python has no library sources (a frozen or zipped installation).
    """
    if split is not None and split not in get_args(Split):
        raise ValueError(f"split {split!r} is unknown; choose one of {', '.join(get_args(Split))}")
    documents = [d for d in _all_documents() if split is None or split_of(d.name) == split]
    if not documents:
        raise FileNotFoundError(
            f"no standard-library sources under {_library_root()}: this Python is frozen or stripped. "
            "Use a regular CPython, or give your own text with a corpus path."
        )
    return documents


def corpus_sha256(documents: list[Document]) -> str:
    """Hash of names and texts, for provenance records."""
    digest = hashlib.sha256()
    for document in documents:
        for part in (document.name, document.text):
            data = part.encode()
            digest.update(len(data).to_bytes(8, "big") + data)
    return digest.hexdigest()


def _library_root() -> Path:
    return Path(sysconfig.get_path("stdlib"))


def _all_documents() -> Iterator[Document]:
    root = _library_root()
    documents = [Document("pydoc_data/topics.py", _reference_text())]
    for path in root.rglob("*.py"):
        parts = path.relative_to(root).parts
        if any(part in _SKIPPED_FOLDERS or part.startswith(_SKIPPED_PREFIXES) for part in parts):
            continue
        try:
            with tokenize.open(path) as file:  # honours the file's own encoding line
                text = file.read()
        except (SyntaxError, UnicodeDecodeError):  # deliberately broken files exist in some builds
            continue
        if text.strip():
            documents.append(Document("/".join(parts), text))
    return iter(sorted(documents, key=lambda document: document.name))


def _reference_text() -> str:
    topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    return "\n\n".join(topics[name].strip() for name in sorted(topics)) + "\n"
