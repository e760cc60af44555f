"""The embedded corpus: split by file, no leak, the same everywhere."""

import pytest

from certdraft.data.corpus.standard_library import Document, corpus_sha256, split_of, standard_library


def test_splits_are_disjoint_and_cover_everything() -> None:
    parts = {split: {d.name for d in standard_library(split)} for split in ("train", "validation", "test")}
    everything = [d.name for d in standard_library()]
    assert len(everything) == len(set(everything)) == sum(map(len, parts.values()))
    assert set(everything) == set.union(*parts.values())
    assert len(parts["train"]) > 8 * len(parts["validation"]) > 0 < len(parts["test"])


def test_split_depends_on_the_name_alone() -> None:
    """Fixed examples: a change of the hash would silently move held-out files into training."""
    assert split_of("calendar.py") == "validation"
    assert split_of("zipfile.py") == "test"
    assert split_of("pydoc_data/topics.py") == "train"


def test_no_held_out_file_repeats_a_training_file() -> None:
    train = {d.text.strip() for d in standard_library("train")}
    held_out = standard_library("validation") + standard_library("test")
    assert [d.name for d in held_out if len(d.text) > 500 and d.text.strip() in train] == []


def test_unknown_split_names_the_choices() -> None:
    with pytest.raises(ValueError, match="'dev' is unknown; choose one of train, validation, test"):
        standard_library("dev")  # type: ignore[arg-type]


def test_hash_sees_names_texts_and_their_borders() -> None:
    base = [Document("a", "bc"), Document("d", "e")]
    others = ([Document("ab", "c"), base[1]], [base[1], base[0]], [Document("a", "bcd"), Document("", "e")])
    assert len({corpus_sha256(documents) for documents in (base, *others)}) == 4
