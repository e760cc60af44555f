"""A trace of the tiny target with hidden states."""

from __future__ import annotations

from pathlib import Path

import pytest

from certdraft.data import Corpus, Generation, record_trace


@pytest.fixture(scope="module")
def trace(tiny: Path) -> Path:
    """The tiny target's trace with the features of its first layer."""
    for split in ("train", "validation"):
        corpus = Corpus(source=str(tiny / "corpus.jsonl"), split=split, validation_fraction=0.2)
        if not (tiny / f"{split}-features").exists():
            record_trace(
                str(tiny / f"{split}-features"), str(tiny / "target"), corpus,
                generation=Generation(max_new_tokens=24, loops="keep"), accelerator="cpu",
                feature_layers=(0,),
            )  # fmt: skip
    return tiny / "train-features"
