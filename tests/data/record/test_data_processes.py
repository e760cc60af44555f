"""Several processes record the trace that one records, byte for byte."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from certdraft.data import Corpus, Generation, Prompts, TraceMeta, record_trace
from certdraft.data.trace.shards import Ledger

ROWS = 30


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    file = tmp_path / "chats.jsonl"
    file.write_text("".join(f'{{"prompt": "fox {"the " * (i % 5)}{i}"}}\n' for i in range(ROWS)))
    return str(file)


@pytest.fixture
def record(tmp_path: Path, target_dir: str, corpus: str) -> Callable[..., TraceMeta]:
    def run(name: str, **changes: object) -> TraceMeta:
        generation = Generation(max_new_tokens=6, max_length=200)
        return record_trace(
            str(tmp_path / name), target_dir, Corpus(corpus, split="all"), Prompts(max_prompt_tokens=100),
            generation, num_kept=8, batch_size=3, shard_rows=4, accelerator="cpu", **changes,
        )  # fmt: skip

    return run


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def test_two_processes_write_what_one_writes(record: Callable[..., TraceMeta], tmp_path: Path) -> None:
    record("one")
    meta = record("two", devices=2, strategy="ddp_fork")
    assert len(meta.shards) == 8
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")


def test_they_go_on_where_one_stopped(
    record: Callable[..., TraceMeta], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    commit = Ledger.commit

    def failing(self: Ledger, shard: int, *args: object) -> None:
        if shard == 5:
            raise ZeroDivisionError
        commit(self, shard, *args)

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "commit", failing)
        with pytest.raises(ZeroDivisionError):
            record("two")
    before = (tmp_path / "two" / "shard-00003.arrow").stat().st_mtime_ns
    record("two", devices=2, strategy="ddp_fork")
    record("one")
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")
    assert (tmp_path / "two" / "shard-00003.arrow").stat().st_mtime_ns == before


@pytest.mark.slow
def test_the_command_on_two_processes(
    record: Callable[..., TraceMeta], tmp_path: Path, target_dir: str, corpus: str
) -> None:
    """As a user starts it: Lightning runs the command again for the other process."""
    record("one")
    command = [
        Path(sys.executable).with_name("certdraft"), "trace", "--out_dir", tmp_path / "two",
        "--target", target_dir, "--corpus.source", corpus, "--corpus.split", "all",
        "--prompts.max_prompt_tokens", "100", "--generation.max_new_tokens", "6",
        "--generation.max_length", "200", "--num_kept", "8", "--batch_size", "3", "--shard_rows", "4",
        "--accelerator", "cpu", "--devices", "2", "--strategy", "ddp",
    ]  # fmt: skip
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert files_of(tmp_path / "two") == files_of(tmp_path / "one")
