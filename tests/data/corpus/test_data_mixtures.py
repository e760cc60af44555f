"""Mixtures: order and shares by the seed, accounting by source, and errors that name the source."""

import json
from collections import Counter
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from certdraft.data import Accounting, Corpus, CorpusError, MixedSource, Prompts, Recording, read_rows
from certdraft.data.record.recording import read_prompts, with_defaults


def jsonl(file: Path, rows: list[dict]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


@pytest.fixture
def two(tmp_path: Path) -> tuple[MixedSource, MixedSource]:
    """400 prompts, and 400 questions in a column of their own, of which the first is among the prompts."""
    first = jsonl(tmp_path / "a.jsonl", [{"prompt": f"say {i}"} for i in range(400)])
    second = jsonl(tmp_path / "b.jsonl", [{"ask": "say 0"}, *({"ask": f"why {i}"} for i in range(399))])
    return (
        MixedSource(first, split="all", share=3),
        MixedSource(second, split="all", column="ask", share=1),
    )


def contents(corpus: Corpus) -> list[str]:
    return [str(row.content) for row in read_rows(corpus, Accounting("rows"))]


def test_order_is_the_seeds_and_shares_hold(two: tuple[MixedSource, ...]) -> None:
    drawn = contents(Corpus(sources=two, max_rows=400))
    assert drawn == contents(Corpus(sources=two, max_rows=400))
    assert drawn != contents(Corpus(sources=two, max_rows=400, mix_seed=1))
    assert len(drawn) == 400
    counts = Counter(text.split()[0] for text in drawn)
    assert 260 <= counts["say"] <= 340  # 300 expected; 4.6 standard deviations
    for word in counts:  # each source in its own order
        numbers = [int(text.split()[1]) for text in drawn if text.startswith(word)]
        assert numbers == sorted(numbers)


def test_without_max_rows_all_is_read_and_a_row_of_two_sources_is_used_once(
    two: tuple[MixedSource, ...],
) -> None:
    accounting = Accounting("rows")
    rows = list(read_rows(Corpus(sources=two), accounting))
    assert len(rows) == len({row.digest for row in rows}) == 799
    assert [part.read for part in accounting.parts.values()] == [400, 400]
    assert sum(part.skipped["duplicate"].count for part in accounting.parts.values() if part.skipped) == 1


def test_each_source_is_accounted_for(
    two: tuple[MixedSource, ...], tmp_path: Path, tokenizer: PreTrainedTokenizerBase
) -> None:
    bad = jsonl(tmp_path / "c.jsonl", [{"prompt": "fine"}, {"prompt": 3}])
    skipping = MixedSource(bad, split="all", bad_rows="skip")
    corpus = Corpus(sources=(two[0], skipping))
    prompts, accounting = read_prompts(Recording(corpus=corpus, prompts=Prompts(template="none")), tokenizer)
    assert accounting.balanced
    assert accounting.used == len(prompts) == 401
    first, second = accounting.parts.values()
    assert (first.read, first.used, second.read, second.used) == (400, 400, 2, 1)
    assert second.skipped["malformed"].count == accounting.skipped["malformed"].count == 1
    assert Accounting.from_dict(json.loads(json.dumps(accounting.to_dict()))) == accounting
    assert f"sources[1] {bad}: 2 rows read = 1 used + 1 skipped" in str(accounting)


def test_settings_list_the_sources_and_older_settings_have_none(two: tuple[MixedSource, ...]) -> None:
    settings = Recording(corpus=Corpus(sources=two)).settings()
    assert [(s["source"], s["share"]) for s in settings["corpus"]["sources"]] == [
        (two[0].source, 3),
        (two[1].source, 1),
    ]
    older = Recording().settings()
    del older["corpus"]["sources"], older["corpus"]["mix_seed"]
    assert with_defaults(older) == Recording().settings()


def test_errors_name_the_source(two: tuple[MixedSource, ...], tmp_path: Path) -> None:
    bad = jsonl(tmp_path / "c.jsonl", [{"prompt": 3}])
    with pytest.raises(CorpusError, match=r"corpus\.sources\[1\] .*c\.jsonl: c\.jsonl:1: prompt: expected"):
        contents(Corpus(sources=(two[0], MixedSource(bad, split="all"))))
    absent = MixedSource(str(tmp_path / "d.jsonl"))
    with pytest.raises(FileNotFoundError, match=r"corpus\.sources\[0\] .*no such file"):
        contents(Corpus(sources=(absent, two[0])))


def test_contradictions_are_refused(two: tuple[MixedSource, ...]) -> None:
    with pytest.raises(ValueError, match=r"corpus\.column is set beside corpus\.sources"):
        Corpus(sources=two, column="ask")
    with pytest.raises(ValueError, match="share of source embedded is 0"):
        MixedSource(share=0)


def test_held_out_splits_are_those_of_every_source(two: tuple[MixedSource, ...]) -> None:
    held = Corpus(sources=two, mix_seed=4).held_out("validation", 30)
    assert [source.split for source in held.sources] == ["validation"] * 2
    assert (held.max_rows, held.mix_seed) == (30, 4)
    alone = Corpus(two[0].source).held_out("test", 5)
    assert (alone.split, alone.max_rows) == ("test", 5)
