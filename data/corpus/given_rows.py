"""Rows given from Python, as a corpus file beside the trace that is recorded from them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from certdraft.data.corpus.corpora import Corpus, CorpusError
from certdraft.support import write_text


def corpus_of_rows(rows: Iterable[Mapping[str, Any]], file: Path) -> Corpus:
    """Write rows to a jsonl file and return the corpus that reads all of them.

    With the file a trace can be resumed and recorded again, like one of a corpus on disk.

    Args:
        rows: `{"messages": [...]}`, `{"prompt": ...}` or `{"text": ...}`: a list, or a `datasets.Dataset`.
        file: where the rows are kept.

    Raises:
        CorpusError: no row, or one that is not a mapping of JSON values.
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
