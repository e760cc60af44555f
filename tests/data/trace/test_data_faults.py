"""A recording that is killed, stopped or starved of disk goes on to the bytes of an undisturbed one."""

import os
import re
import resource
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from oracles.runs import forked

from certdraft.data import Accounting, Corpus, Generation, Prompts, RecordedRow, TraceMeta, record_trace
from certdraft.data.record import writer as writer_module
from certdraft.data.trace.recorded_row import read_part
from certdraft.data.trace.shards import Ledger

ROWS = 22


@pytest.fixture
def record(tmp_path: Path, target_dir: str) -> Callable[..., TraceMeta]:
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(f'{{"prompt": "fox {"the " * (i % 5)}{i}"}}\n' for i in range(ROWS)))

    def run(name: str, **changes: object) -> TraceMeta:
        settings = {
            "corpus": Corpus(str(file), split="all"), "prompts": Prompts(max_prompt_tokens=100),
            "generation": Generation(max_new_tokens=6, max_length=200), "num_kept": 8, "batch_size": 2,
            "shard_rows": 6, "accelerator": "cpu", "feature_layers": (0,),
        }  # fmt: skip
        return record_trace(str(tmp_path / name), target_dir, **settings | changes)

    return run


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.parametrize("times", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_killed_at_random_moments(record: Callable[..., TraceMeta], tmp_path: Path, times: int) -> None:
    seconds = forked.timed(lambda: record("whole"))
    met = forked.kill_often(lambda: record("killed"), times, seconds)
    assert met
    record("killed")
    assert files_of(tmp_path / "killed") == files_of(tmp_path / "whole")


def test_a_kill_costs_the_shard_in_progress_only(
    record: Callable[..., TraceMeta], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit, shards, record_prompts = Ledger.commit, [], writer_module.record_prompts

    def dying(self: Ledger, shard: int, *args: object) -> None:
        if shard == 1:
            raise ZeroDivisionError
        commit(self, shard, *args)

    def counted(*args: object, **kwargs: object) -> Iterator[tuple[int, RecordedRow]]:
        shards.append(args[2])
        return record_prompts(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "commit", dying)
        with pytest.raises(ZeroDivisionError):
            record("t")
    with monkeypatch.context() as patch:
        patch.setattr(writer_module, "record_prompts", counted)
        record("t")
    assert len(shards) == 3  # of 4
    record("whole")
    assert files_of(tmp_path / "t") == files_of(tmp_path / "whole")


def test_parts_of_other_settings_are_not_taken(
    record: Callable[..., TraceMeta], monkeypatch: pytest.MonkeyPatch
) -> None:
    def dying(self: Ledger, shard: int, rows: list[RecordedRow], accounting: Accounting) -> None:
        self.keep(shard, dict(enumerate(rows)))
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "commit", dying)
        with pytest.raises(ZeroDivisionError):
            record("t")
    with pytest.raises(ValueError, match="num_kept: 8 there, 9 now"):
        record("t", num_kept=9)


def test_a_part_is_read_as_it_was_written(record: Callable[..., TraceMeta], tmp_path: Path) -> None:
    rows, commit = dict[int, RecordedRow](), Ledger.commit

    def noted(self: Ledger, shard: int, given: list[RecordedRow], accounting: Accounting) -> None:
        rows.update(enumerate(given, len(rows)))
        commit(self, shard, given, accounting)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "commit", noted)
        record("t")
    ledger = Ledger(tmp_path / "u", {}, 1, with_features=True)
    ledger.keep(0, rows)
    back = ledger.kept(0)
    ledger.release()
    assert back.keys() == rows.keys()
    for index, row in rows.items():
        for name, value in vars(row).items():
            other = getattr(back[index], name)
            assert np.array_equal(other, value) if isinstance(value, np.ndarray) else other == value, name
    file = tmp_path / "cut"
    file.write_bytes(b"ARROW1")
    assert read_part(file) == {}


def test_sigterm_keeps_what_is_recorded(record: Callable[..., TraceMeta], tmp_path: Path) -> None:
    pid = forked.start(lambda: record("t"))
    while not (tmp_path / "t" / ".recording" / "shard-00000.arrow.json").exists():
        time.sleep(0.001)
    os.kill(pid, signal.SIGTERM)
    assert forked.end(pid) == 128 + signal.SIGTERM
    assert not (tmp_path / "t" / "trace.json").exists()
    record("t")
    record("whole")
    assert files_of(tmp_path / "t") == files_of(tmp_path / "whole")


def test_a_full_disk_that_is_none_of_our_making(record: Callable[..., TraceMeta], tmp_path: Path) -> None:
    """The kernel refuses to write more than 6,000 bytes into any file; a shard needs more."""

    def starved() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (6_000, 6_000))
        try:
            record("t")
        except ValueError as error:
            said = str(error)
        os.write(write, said.encode())

    read, write = os.pipe()
    forked.end(forked.start(starved))
    os.close(write)
    with open(read) as pipe:
        said = pipe.read()
    assert re.search(r"shard-00000\.arrow.*: the disk is full .*; what was written before is intact", said), (
        said
    )
    assert not list((tmp_path / "t").rglob("*.tmp"))
    record("t")
    record("whole")
    assert files_of(tmp_path / "t") == files_of(tmp_path / "whole")
