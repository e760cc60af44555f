"""The DataModule: traces recorded where missing, batches for training and validation, refusals."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jsonargparse
import numpy as np
import pytest
import torch

from certdraft.data import (
    Batch,
    Corpus,
    Generation,
    Prompts,
    RecordedRow,
    Recording,
    Trace,
    TraceDataModule,
    TraceError,
    open_trace,
)

Fake = tuple[Trace, list[RecordedRow]]
WriteFake = Callable[..., list[RecordedRow]]


@pytest.fixture
def recording(target_dir: str, tmp_path: Path) -> Recording:
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(f'{{"prompt": "{i} fox"}}\n' for i in range(40)))
    return Recording(
        target_dir,
        Corpus(str(file), validation_fraction=0.3),
        Prompts(max_prompt_tokens=60),
        Generation(max_new_tokens=4, max_length=80),
        num_kept=6,
    )


def test_missing_traces_are_recorded_once(recording: Recording, tmp_path: Path) -> None:
    paths = [str(tmp_path / name) for name in ("train", "validation")]
    module = TraceDataModule(*paths, seq_len=64, batch_size=2, record=recording, validation_rows=5)
    module.prepare_data()
    module.setup("fit")
    train, validation = (open_trace(path) for path in paths)
    assert len(validation) == 5
    prompts = [{tuple(t.columns(i).input_ids[:12]) for i in range(len(t))} for t in (train, validation)]
    assert not prompts[0] & prompts[1]
    before = Path(paths[0], "trace.json").stat().st_mtime_ns
    module.prepare_data()
    assert Path(paths[0], "trace.json").stat().st_mtime_ns == before
    other = replace(recording, generation=Generation(max_new_tokens=5, max_length=80))
    with pytest.raises(TraceError, match=r"settings \(generation.max_new_tokens: 4 there, 5 now\)\. Delete"):
        TraceDataModule(*paths, record=other).prepare_data()


def test_batches_cover_the_trace(fake_trace: Fake, tmp_path: Path) -> None:
    trace, _ = fake_trace
    module = TraceDataModule(str(trace.path), str(trace.path), seq_len=32, batch_size=2, num_kept=3)
    module.setup()
    for source in (module.train_dataloader(), module.val_dataloader()):
        batches = list(source)
        assert len(batches) == len(source)
        assert all(isinstance(batch, Batch) and batch.head.num_kept == 3 for batch in batches)
    # validation: every document with something to learn
    assert sum(batch.num_tokens for batch in batches) == trace.lengths[trace.counted > 0].sum() > 100
    assert sum(int(batch.loss_mask.sum()) for batch in batches) == trace.meta.num_counted
    documents = [module.validation_packing.pieces[i][0] for batch in batches for i in seen(batch)]
    assert documents == sorted(documents)  # and in order
    assert module.tokenizer_fingerprint == trace.meta.tokenizer_fingerprint
    summary = module.summary().splitlines()
    assert summary[0].startswith("train: 6 documents, 133 tokens (")
    assert summary[1].startswith("validation: 6 documents")
    assert batches[0].to("cpu").head.gap.dtype == torch.float32


def seen(batch: Batch) -> list[int]:
    ids = batch.document_ids.flatten()
    return list(dict.fromkeys(ids[ids >= 0].tolist()))


def test_held_out_documents_are_apart(
    tmp_path: Path, write_fake_trace: Callable[..., list[RecordedRow]]
) -> None:
    write_fake_trace(tmp_path / "t", [10] * 60, shard_rows=30)
    module = TraceDataModule(str(tmp_path / "t"), validation_fraction=0.3, seq_len=16)
    module.setup()
    parts = [set(p.pieces[:, 0].tolist()) for p in (module.train_packing, module.validation_packing)]
    assert not parts[0] & parts[1]
    assert parts[0] | parts[1] == set(range(60))
    assert 8 < len(parts[1]) < 30
    learned = [int(line.split("(")[1].split()[0]) for line in module.summary().splitlines()]
    assert sum(learned) == module.meta.num_counted
    with pytest.raises(TraceError, match="no document is left for validation"):
        TraceDataModule(str(tmp_path / "t"), validation_fraction=1e-6).setup()


def test_traces_of_two_tokenizers_are_refused(
    fake_trace: Fake,
    tmp_path: Path,
    write_fake_trace: Callable[..., list[RecordedRow]],
) -> None:
    write_fake_trace(tmp_path / "other", [4])
    file = tmp_path / "other" / "trace.json"
    file.write_text(file.read_text().replace("9f3c" * 16, "41aa" * 16))
    module = TraceDataModule(str(fake_trace[0].path), str(tmp_path / "other"))
    with pytest.raises(TraceError, match=r"tokenizer 41aa.* differs from the training trace's 9f3c"):
        module.setup()


def test_missing_trace_says_how_to_record_it(tmp_path: Path) -> None:
    module = TraceDataModule(str(tmp_path / "t"))
    module.prepare_data()
    with pytest.raises(FileNotFoundError, match=r"no such folder; record one with `certdraft trace`"):
        module.setup()
    with pytest.raises(ValueError, match="validation_fraction is 1"):
        TraceDataModule("t", validation_fraction=1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # jsonargparse announces its fifth version
def test_yaml_builds_it(tmp_path: Path) -> None:
    (tmp_path / "data.yaml").write_text(
        "data:\n  train: traces/train\n  seq_len: 128\n  record:\n    target: embedded\n    num_kept: 16\n"
        "    corpus: {source: embedded, max_rows: 10}\n    generation: {max_new_tokens: 8}\n"
    )
    parser = jsonargparse.ArgumentParser(exit_on_error=False)
    parser.add_argument("--config", action="config")
    parser.add_class_arguments(TraceDataModule, "data")
    module = parser.instantiate_classes(parser.parse_args(["--config", str(tmp_path / "data.yaml")])).data
    assert module.record == Recording(
        corpus=Corpus(max_rows=10), generation=Generation(max_new_tokens=8), num_kept=16
    )
    assert module.seq_len == 128
    assert "top-k entries per token position to load" in " ".join(parser.format_help().split())


def test_steps_index_the_flat_batch(fake_trace: Fake) -> None:
    trace, rows = fake_trace
    module = TraceDataModule(str(trace.path), str(trace.path), seq_len=64, batch_size=9)
    module.setup()
    [batch] = module.val_dataloader()
    steps = batch.steps()
    assert (
        batch.input_ids.flatten()[steps].tolist()
        == np.concatenate([row.input_ids[row.loss_mask] for row in rows]).tolist()
    )


def test_pieces_without_anything_to_learn_are_left_out(
    tmp_path: Path, write_rows: Callable[..., None], fake_row: Callable[..., RecordedRow]
) -> None:
    rows = [fake_row(length, 4, seed) for seed, length in enumerate([20, 7, 5, 30])]
    for row, learned in zip(rows, [range(12, 20), range(0), range(2, 3), range(30)], strict=True):
        row.loss_mask[:] = np.isin(np.arange(len(row.loss_mask)), learned)
    write_rows(tmp_path / "t", rows)
    module = TraceDataModule(str(tmp_path / "t"), str(tmp_path / "t"), seq_len=10, batch_size=2)
    module.setup()
    pieces = [[0, 10, 10], [2, 0, 5], [3, 0, 10], [3, 10, 10], [3, 20, 10]]
    assert sorted(module.train_packing.pieces.tolist()) == pieces
    assert sum(int(batch.loss_mask.sum()) for batch in module.val_dataloader()) == 8 + 1 + 30
    assert all(batch.loss_mask.any(1).all() for batch in module.val_dataloader())
    assert "(39 learned, 2 pieces without any left out)" in module.summary()
    for row in rows:
        row.loss_mask[:] = False
    write_rows(tmp_path / "nothing", rows)
    with pytest.raises(TraceError, match="nothing in it is to be learned"):
        TraceDataModule(str(tmp_path / "nothing"), str(tmp_path / "t"), seq_len=10).setup()


def test_ranks_without_validation_rows_get_a_batch_that_counts_for_nothing(fake_trace: Fake) -> None:
    trace, _ = fake_trace
    module = TraceDataModule(str(trace.path), str(trace.path), seq_len=64, batch_size=8)
    module.setup()
    source = module.val_dataloader()
    source.rank, source.world_size = 1, 2
    [batch] = source
    assert not batch.loss_mask.any()
    assert batch.num_tokens > 0
