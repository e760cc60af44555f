"""Whether a trace holds texts that a drafter was trained on, from the records of both."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from certdraft.data import EMBEDDED_CORPUS
from certdraft.evaluation.report.provenance import read_parts, sha256

_SAME = ("source", "hub_config", "hub_split", "column", "kind")  # settings of one and the same set of rows
_FRACTIONS = ("validation_fraction", "test_fraction")


def refuse_training_texts(drafters: Mapping[str, str], trace: str) -> None:
    """Raise if a trace is not held out from the training of a drafter.

    The run record in an exported drafter's folder has the hash of its training trace. Where that trace still
    is where the run read it, the corpora of both are compared, too.
    """
    file = Path(trace) / "trace.json"
    if not file.is_file():
        return
    digest, corpus = sha256(file), _corpus(file)
    for name, path in drafters.items():
        for part in read_parts(Path(path)):
            trained = part["data"].get("train") or {}
            if trained.get("sha256") == digest:
                raise ValueError(
                    f"{trace} is the trace that the drafter {name} ({path}) was trained on, so its numbers "
                    "would not be about held-out text; give a trace of other prompts"
                )
            other = Path(str(trained.get("path"))) / "trace.json"
            if not other.is_file() or sha256(other) != trained.get("sha256"):
                continue
            if shared := next(_overlaps(_corpus(other), corpus), None):
                raise ValueError(
                    f"{trace} shares texts with {other.parent}, which the drafter {name} ({path}) was "
                    f"trained on: {shared}; give a trace of another split, recorded with the same fractions"
                )


def _corpus(file: Path) -> dict[str, Any]:
    """Corpus settings of a trace; empty where the file is damaged, which opening the trace reports."""
    try:
        found: Any = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return {}
    for key in ("settings", "corpus"):
        found = found.get(key) if isinstance(found, dict) else None
    return found if isinstance(found, dict) else {}


def _overlaps(trained: Mapping[str, Any], held_out: Mapping[str, Any]) -> Iterator[str]:
    """What each source that both corpora read has in common, in words."""
    for one in trained.get("sources") or [trained]:
        for other in held_out.get("sources") or [held_out]:
            if not one.get("source") or any(one.get(key) != other.get(key) for key in _SAME):
                continue
            splits = {str(one.get("split")), str(other.get("split"))}
            if "all" in splits or len(splits) == 1:
                yield f"both are of {one['source']}, split {' and '.join(sorted(splits))}"
            fractions = [tuple(corpus.get(key) for key in _FRACTIONS) for corpus in (one, other)]
            # the splits of the standard library are fixed, whatever the fractions
            if one["source"] != EMBEDDED_CORPUS and fractions[0] != fractions[1]:
                told = [" and ".join(map(str, fraction)) for fraction in fractions]
                names = " and ".join(_FRACTIONS)
                yield f"the splits of {one['source']} overlap, with {names} {told[0]} there, {told[1]} here"
