"""Recording end to end with a tiny target: content, resumption to the byte, and every refusal."""

import errno
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from oracles.runs.recordings import SETTINGS, files_of, generation, record
from transformers import Qwen3ForCausalLM

from certdraft.data import (
    Corpus,
    LogitHead,
    Recording,
    RecordingError,
    load_target,
    load_tokenizer,
    open_trace,
    record_prompts,
    tokenizer_fingerprint,
)
from certdraft.data.record.recording import read_prompts
from certdraft.data.trace import recorded_row as recorded_row_module
from certdraft.data.trace.shards import Ledger
from certdraft.support import Progress


def test_trace_holds_what_each_prompt_alone_gives(undisturbed: tuple[Path, str], target_dir: str) -> None:
    folder, chats = undisturbed
    trace = open_trace(folder, verify="full")
    target, tokenizer = load_target(target_dir), load_tokenizer(target_dir)
    recording = Recording(target_dir, Corpus(chats, split="all"), SETTINGS["prompts"], generation())
    prompts, _ = read_prompts(recording, tokenizer)
    assert len(trace) == len(prompts) == 10
    assert [shard.rows for shard in trace.meta.shards] == [4, 4, 2]
    for index, prompt in enumerate(prompts):
        [(_, alone)] = record_prompts(
            target, LogitHead(target), [prompt], generation(),
            batch_size=1, num_kept=8, eos_ids=frozenset({0}),
        )  # fmt: skip
        columns = trace.columns(index)
        assert np.array_equal(columns.input_ids, alone.input_ids)
        assert np.array_equal(columns.loss_mask, alone.loss_mask)
        assert np.array_equal(columns.top_ids[:, 0], alone.top_ids[:, 0])
        np.testing.assert_allclose(columns.top_gap, alone.top_gap, rtol=2**-9, atol=1e-3)
    meta = trace.meta
    assert (meta.vocab_size, meta.num_kept, meta.dtype, meta.target) == (304, 8, "float32", target_dir)
    assert meta.tokenizer_fingerprint == tokenizer_fingerprint(tokenizer)
    assert meta.settings["generation"]["max_new_tokens"] == 6
    assert meta.accounting["corpus"]["used"] == meta.accounting["recording"]["used"] == 10
    assert sorted(files_of(folder)) == [
        "dataset_info.json",
        *(f"shard-0000{i}.arrow" for i in range(3)),
        "state.json",
        "trace.json",
    ]


def test_finished_trace_is_left_alone(undisturbed: tuple[Path, str], target_dir: str) -> None:
    folder, chats = undisturbed
    before = {p.name: p.stat().st_mtime_ns for p in folder.iterdir()}
    record(folder, target_dir, chats)
    assert {p.name: p.stat().st_mtime_ns for p in folder.iterdir()} == before


_RECORD = """
import sys
from certdraft.data import Corpus, Generation, Prompts, record_trace
out, target, chats = sys.argv[1:]
record_trace(out, target, Corpus(chats, split="all"), Prompts(max_prompt_tokens=100),
             Generation(max_new_tokens=6, max_length=200), num_kept=8, batch_size=3, shard_rows=4,
             accelerator="cpu")
"""


def test_killed_recording_resumes_to_the_same_bytes(
    undisturbed: tuple[Path, str], target_dir: str, tmp_path: Path
) -> None:
    expected, chats = undisturbed
    folder = tmp_path / "trace"
    command = [sys.executable, "-c", _RECORD, str(folder), target_dir, chats]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    while not (folder / ".recording" / "shard-00000.arrow.json").exists():
        assert process.poll() is None, process.stderr.read().decode()
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stderr.close()
    assert not (folder / "trace.json").exists()
    record(folder, target_dir, chats)
    assert files_of(folder) == files_of(expected)


class Killed(BaseException):
    """Stands for the power cut: no handler may catch it."""


def test_death_at_every_write_leaves_something_to_resume(
    tmp_path: Path, write_fake_trace: Callable[..., list], monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [5, 1, 17, 8, 30]
    write_fake_trace(tmp_path / "whole", lengths, shard_rows=2)
    expected = files_of(tmp_path / "whole")
    actions = {
        (os, "fsync"): os.fsync,
        (Path, "replace"): Path.replace,
        (Path, "write_text"): Path.write_text,
    }
    calls = 0

    def dying(action: Callable, fatal: int) -> Callable:
        def run(*args: object, **kwargs: object) -> object:
            nonlocal calls
            calls += 1
            if calls < fatal:
                return action(*args, **kwargs)
            if action is actions[Path, "write_text"]:
                action(args[0], args[1][: len(args[1]) // 2], **kwargs)
            raise Killed

        return run

    fatal, died = 0, True
    while died:
        fatal, calls, folder = fatal + 1, 0, tmp_path / f"died-{fatal}"
        with monkeypatch.context() as patch:
            for (owner, name), action in actions.items():
                patch.setattr(owner, name, dying(action, fatal))
            try:
                write_fake_trace(folder, lengths, shard_rows=2)
                died = False
            except Killed:
                assert not (folder / "trace.json").exists() or files_of(folder).items() >= expected.items()
        write_fake_trace(folder, lengths, shard_rows=2)
        assert files_of(folder) == expected, f"died at write {fatal}"
    assert fatal > 30  # three or four calls for each of ten files


def test_full_disk_leaves_what_was_written(
    tmp_path: Path, write_fake_trace: Callable[..., list], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(descriptor: int) -> None:
        if list((tmp_path / "t").glob(".shard-00001*")):
            raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(
            RecordingError, match=r"shard-00001\.arrow: the disk is full.*run the same command again"
        ):
            write_fake_trace(tmp_path / "t", [3] * 9)
    assert sorted(files_of(tmp_path / "t")) == [
        ".recording/lock",
        ".recording/settings.json",
        ".recording/shard-00000.arrow.json",
        "shard-00000.arrow",
    ]
    write_fake_trace(tmp_path / "t", [3] * 9)
    write_fake_trace(tmp_path / "whole", [3] * 9)
    assert files_of(tmp_path / "t") == files_of(tmp_path / "whole")


@pytest.mark.parametrize("kind", ["missing", "flipped"])
def test_only_the_damaged_shard_is_recorded_again(
    undisturbed: tuple[Path, str], target_dir: str, tmp_path: Path, kind: str
) -> None:
    expected, chats = undisturbed
    folder = tmp_path / "trace"
    folder.mkdir()
    for name, content in files_of(expected).items():
        (folder / name).write_bytes(content)
    shard = folder / "shard-00001.arrow"
    shard.write_bytes(shard.read_bytes()[:-1] + b"x") if kind == "flipped" else shard.unlink()
    untouched = (folder / "shard-00000.arrow").stat().st_mtime_ns
    record(folder, target_dir, chats)
    assert files_of(folder) == files_of(expected)
    assert (folder / "shard-00000.arrow").stat().st_mtime_ns == untouched


def test_changed_corpus_is_noticed_on_resume(tmp_path: Path, target_dir: str, chats: str) -> None:
    with pytest.raises(ZeroDivisionError):
        record_until(tmp_path / "t", target_dir, chats, shard=1)
    with open(chats, "a") as file:
        file.write('{"prompt": "one more"}\n')
    with pytest.raises(RecordingError, match=r"unfinished recording .*num_prompts: 12 there, 13 now"):
        record(tmp_path / "t", target_dir, chats)


def record_until(folder: Path, target_dir: str, chats: str, shard: int) -> None:
    commit = Ledger.commit

    def failing(self: Ledger, index: int, *args: object) -> None:
        if index == shard:
            raise ZeroDivisionError
        commit(self, index, *args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Ledger, "commit", failing)
        record(folder, target_dir, chats)


def test_loops_are_counted_and_left_out(
    tmp_path: Path, make_target: Callable[..., Qwen3ForCausalLM], target_dir: str, chats: str
) -> None:
    make_target(initializer_range=0.02, tie_word_embeddings=True).save_pretrained(tmp_path / "dull")
    meta = record(
        tmp_path / "t",
        str(tmp_path / "dull"),
        chats,
        tokenizer=target_dir,
        generation=generation(max_new_tokens=64),
    )
    recorded = meta.accounting["recording"]
    cut = recorded["notes"].get("degenerate loop cut or masked", {"count": 0})["count"]
    skipped = sum(reason["count"] for reason in recorded["skipped"].values())
    assert cut + skipped > 6
    assert recorded["read"] == recorded["used"] + skipped == 12
    assert recorded["used"] == meta.num_rows
    assert re.search(r"chats\.jsonl:\d+, from token \d+", json.dumps(recorded["notes"]))


def test_teacher_forced_text(tmp_path: Path, target_dir: str) -> None:
    text = "".join(f"def add_{i}(a, b):\n    return a + b\n" for i in range(20))
    (tmp_path / "x.txt").write_text(text)
    meta = record(
        tmp_path / "t", target_dir, str(tmp_path / "x.txt"), generation=generation(max_new_tokens=0)
    )
    trace = open_trace(tmp_path / "t")
    whole = load_tokenizer(target_dir)(text)["input_ids"]
    assert np.concatenate([trace.columns(i).input_ids for i in range(len(trace))]).tolist() == whole
    assert meta.num_counted == len(whole) - len(trace)


def test_progress_without_a_terminal_prints_lines(capsys: pytest.CaptureFixture) -> None:
    with Progress("recording", 4, "prompts", interval_s=0.0) as progress:
        progress.advance(1, tokens=100)
    assert re.search(
        r"^recording: 1/4 prompts, [\d,]+ tokens/s, [\d,]+ s left$", capsys.readouterr().err.strip()
    )
    with Progress("reading", None, "prompts", interval_s=0.0) as progress:
        assert list(progress.track("ab")) == ["a", "b"]
    assert "reading: 2 prompts" in capsys.readouterr().err


def test_bytes_per_token_is_what_the_shards_take(undisturbed: tuple[Path, str]) -> None:
    trace = open_trace(undisturbed[0])
    expected = recorded_row_module.bytes_per_token(8) * trace.meta.num_tokens
    assert (
        expected < sum(shard.bytes for shard in trace.meta.shards) < expected + 3 * 4000
    )  # schema and offsets
