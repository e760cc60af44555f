"""The trace: what is read is what was written, without copies; every kind of damage is named."""

import json
from collections.abc import Callable
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch

from certdraft.certificates import Head, StrictGreedy, radius
from certdraft.data import RecordedRow, Trace, TraceError, open_trace
from certdraft.data.trace import recorded_row as recorded_row_module
from certdraft.data.trace.arrow_trace import SCHEMA

Fake = tuple[Trace, list[RecordedRow]]
WriteFake = Callable[..., list[RecordedRow]]
COLUMNS = ("input_ids", "loss_mask", "top_ids", "top_gap", "lse_gap", "entropy")


def test_reads_what_was_written_without_copying(fake_trace: Fake) -> None:
    trace, rows = fake_trace
    assert len(trace) == 8
    assert trace.lengths.tolist() == [len(row.input_ids) for row in rows]
    assert trace.meta.num_tokens == sum(trace.lengths)
    assert trace.meta.num_counted == sum(int(row.loss_mask.sum()) for row in rows)
    for index, row in enumerate(rows):
        columns = trace.columns(index)
        for name in COLUMNS:
            read, written = getattr(columns, name), getattr(row, name)
            assert read.dtype == written.dtype, name
            assert np.array_equal(read, written), name
            if name != "loss_mask":
                assert not read.flags.owndata, name
                assert not read.flags.writeable, name
    with pytest.raises(IndexError, match="row 8 of a trace with 8 rows"):
        trace.row(8)


def test_many_arrow_batches_in_a_shard(
    tmp_path: Path, write_fake_trace: WriteFake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorded_row_module, "_BATCH_VALUES", 40)
    rows = write_fake_trace(tmp_path / "t", [5, 9, 20, 3, 1, 1], shard_rows=6)
    trace = open_trace(tmp_path / "t")
    assert len(trace._chunks) > 2
    for index, row in enumerate(rows):
        assert np.array_equal(trace.columns(index).loss_mask, row.loss_mask)
        assert np.array_equal(trace.columns(index).top_ids, row.top_ids)


def test_row_is_a_head(fake_trace: Fake) -> None:
    trace, rows = fake_trace
    row, written = trace.row(4), rows[4]
    assert row.head.shape == (30,)
    assert row.head.vocab_size == trace.meta.vocab_size
    assert torch.equal(row.head.greedy, torch.from_numpy(written.top_ids[:, 0]).long())
    expected = -written.top_gap.astype(np.float32) - written.lse_gap[:, None]
    np.testing.assert_array_equal(row.head.logp, expected)
    assert (radius(row.head, StrictGreedy()) >= 0).all()
    assert sum(1 for _ in trace) == 8


def test_half_precision_gaps_keep_margins(tmp_path: Path, write_fake_trace: WriteFake) -> None:
    logits = torch.randn(200, 304) * 3
    head = Head.from_logits(logits, 8)
    stored = Head(head.ids, head.gap.half().float(), head.lse_gap, 304, head.entropy)
    exact, kept = radius(head, StrictGreedy()), radius(stored, StrictGreedy())
    assert torch.allclose(kept, exact, rtol=3e-3, atol=0)  # relative, however small the margin


def test_datasets_reads_the_same_folder(fake_trace: Fake) -> None:
    trace, rows = fake_trace
    dataset = datasets.load_from_disk(str(trace.path))
    assert dataset.num_rows == 8
    assert dataset.features == datasets.Features.from_arrow_schema(SCHEMA)
    for index, row in enumerate(dataset.with_format("numpy")):
        for name in COLUMNS:
            assert np.array_equal(row[name], getattr(rows[index], name).reshape(-1)), name


def damaged(folder: Path, kind: str) -> Path:
    shard = folder / "shard-00001.arrow"
    if kind == "missing":
        shard.unlink()
    elif kind == "cut":
        shard.write_bytes(shard.read_bytes()[:-64])
    else:
        data = bytearray(shard.read_bytes())
        data[len(data) // 2] ^= 1
        shard.write_bytes(data)
    return shard


@pytest.mark.parametrize(
    ("kind", "error", "message"),
    [
        ("missing", FileNotFoundError, r"shard-00001\.arrow is missing; run .* again"),
        ("cut", TraceError, r"shard-00001\.arrow has [\d,]+ bytes instead of [\d,]+"),
        ("flipped", TraceError, r"shard-00001\.arrow does not match its sha256"),
    ],
)
def test_damaged_shard_is_named(fake_trace: Fake, kind: str, error: type, message: str) -> None:
    folder = fake_trace[0].path
    damaged(folder, kind)
    with pytest.raises(error, match=message):
        open_trace(folder, verify="full")
    if kind == "flipped":
        open_trace(folder)  # the quick check does not read the bytes, and says so
    else:
        with pytest.raises(error, match=message):
            open_trace(folder)


def edited(folder: Path, **changes: object) -> None:
    file = folder / "trace.json"
    content = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({k: v for k, v in content.items() if v is not None}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schema": None}, r"trace\.json names no schema version"),
        ({"schema": 2}, r"schema version 2, this certdraft reads 1; upgrade certdraft"),
        ({"schema": "old"}, r"schema version 'old'.*; record again"),
        ({"num_kept": None, "target": None}, r"trace\.json lacks num_kept, target"),
        ({"num_kept": 5}, r"shard-00000\.arrow: column top_ids does not have 5 values a token"),
    ],
)
def test_metadata_that_does_not_fit(fake_trace: Fake, changes: dict, message: str) -> None:
    edited(fake_trace[0].path, **changes)
    with pytest.raises(TraceError, match=message):
        open_trace(fake_trace[0].path)


def test_shards_of_another_trace(fake_trace: Fake, tmp_path: Path, write_fake_trace: WriteFake) -> None:
    folder = fake_trace[0].path
    content = json.loads((folder / "trace.json").read_text())
    content["shards"][0] |= {"rows": 2, "tokens": 22}
    edited(folder, shards=content["shards"])
    with pytest.raises(TraceError, match=r"holds 3 rows and 23 tokens, trace\.json says 2 and 22"):
        open_trace(folder)


def test_not_a_trace(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder; record one with `certdraft trace`"):
        open_trace(tmp_path / "nowhere")
    with pytest.raises(TraceError, match=r"holds no trace\.json"):
        open_trace(tmp_path)
    (tmp_path / ".recording").mkdir()
    with pytest.raises(TraceError, match="is unfinished; run its `certdraft trace` command again"):
        open_trace(tmp_path)
    (tmp_path / "trace.json").write_text('{"schema": ')
    with pytest.raises(TraceError, match=r"trace\.json is not valid JSON"):
        open_trace(tmp_path)


def test_file_that_is_no_arrow_stream(fake_trace: Fake) -> None:
    shard = fake_trace[0].path / "shard-00000.arrow"
    shard.write_bytes(b"x" * shard.stat().st_size)
    with pytest.raises(TraceError, match=r"shard-00000\.arrow is not an Arrow stream"):
        open_trace(fake_trace[0].path)


def test_other_tokenizer_and_short_head_are_refused(fake_trace: Fake) -> None:
    trace = fake_trace[0]
    trace.check_tokenizer("9f3c" * 16)
    with pytest.raises(TraceError, match=r"tokenizer 9f3c.* \(of tiny\) differs from the drafter's 41aa"):
        trace.check_tokenizer("41aa" * 16)
    trace.check_num_kept(4, "coverage@3")
    with pytest.raises(TraceError, match="K=4 tokens, coverage@4 needs 5; record again with num_kept=5"):
        trace.check_num_kept(5, "coverage@4")


FORGED = {
    "an id outside the vocabulary": (
        "top_ids",
        (2, 1),
        99_999,
        "a token of top_ids lies outside the vocabulary",
    ),
    "a negative id": ("top_ids", (0, 0), -1, "a token of top_ids lies outside the vocabulary of 304"),
    "an input id": ("input_ids", (1,), 304, "a token of input_ids lies outside the vocabulary of 304"),
    "a NaN gap": ("top_gap", (3, 2), np.nan, "top_gap does not ascend from 0"),
    "a negative gap": ("top_gap", (3, 1), -1, "top_gap does not ascend from 0"),
    "unsorted gaps": ("top_gap", (4, 2), 60_000, "top_gap does not ascend from 0"),
    "no greedy token": ("top_gap", (4, 0), 1e-3, "top_gap does not ascend from 0"),
    "a NaN": ("lse_gap", (0,), np.nan, "lse_gap is negative or not finite"),
    "a negative lse": ("lse_gap", (0,), -1, "lse_gap is negative or not finite"),
    "an entropy": ("entropy", (2,), np.inf, "entropy is negative or not finite"),
}


@pytest.mark.parametrize("case", FORGED)
@pytest.mark.parametrize("verify", ["sizes", "full"])
def test_forged_values_with_right_hashes_are_named(
    tmp_path: Path,
    write_rows: Callable[..., None],
    fake_row: Callable[..., RecordedRow],
    case: str,
    verify: str,
) -> None:
    column, index, value, message = FORGED[case]
    rows = [fake_row(6, 4, seed) for seed in range(3)]
    getattr(rows[0], column)[index] = value
    write_rows(tmp_path / "t", rows)
    with pytest.raises(TraceError, match=rf"shard-00000\.arrow: row 0, position \d: .*{message}"):
        open_trace(tmp_path / "t", verify)  # the first document of a shard is looked at always


def test_all_documents_are_checked_in_full(
    tmp_path: Path, write_rows: Callable[..., None], fake_row: Callable[..., RecordedRow]
) -> None:
    rows = [fake_row(6, 4, seed) for seed in range(3)]
    rows[2].top_ids[5, 3] = rows[2].top_ids[5, 0]
    write_rows(tmp_path / "twice", rows)
    open_trace(tmp_path / "twice")
    with pytest.raises(TraceError, match="row 2, position 5: top_ids names a token twice"):
        open_trace(tmp_path / "twice", verify="full")
    rows = [fake_row(6, 4, seed) for seed in range(3)]
    rows[1].lse_gap[2] = 0
    rows[1].top_gap[2] = 0
    write_rows(tmp_path / "mass", rows)
    with pytest.raises(TraceError, match="row 1, position 2: the probabilities sum to more than 1"):
        open_trace(tmp_path / "mass", verify="full")


@pytest.mark.parametrize(
    ("shards", "message"),
    [
        ([], "it lists no shards"),
        ("../shard-00000.arrow", r"'\.\./shard-00000\.arrow' is not a plain file name"),
        ("/etc/passwd", "'/etc/passwd' is not a plain file name"),
        ("", "'' is not a plain file name"),
        (7, "7 is not a plain file name"),
    ],
)
def test_shards_are_files_of_the_folder(fake_trace: Fake, shards: object, message: str) -> None:
    folder = fake_trace[0].path
    content = json.loads((folder / "trace.json").read_text())
    entries = [content["shards"][0] | {"file": shards}, *content["shards"][1:]] if shards != [] else []
    edited(folder, shards=entries)
    with pytest.raises(TraceError, match=rf"trace\.json: .*{message}"):
        open_trace(folder)


@pytest.mark.parametrize(
    "changes",
    [
        {"shards": 3},
        {"shards": [3]},
        {"num_kept": "4"},
        {"vocab_size": -1},
        {"settings": []},
        {"shards": [{}]},
    ],
    ids=str,
)
def test_values_of_another_type_are_named(fake_trace: Fake, changes: dict) -> None:
    edited(fake_trace[0].path, **changes)
    with pytest.raises(TraceError, match=r"trace\.json.*(expected|another type).*restore it from a copy"):
        open_trace(fake_trace[0].path)


def test_counts_of_each_document(fake_trace: Fake, tmp_path: Path) -> None:
    trace, rows = fake_trace
    assert trace.counted.tolist() == [int(row.loss_mask.sum()) for row in rows]
