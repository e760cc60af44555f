"""Ctrl-C and SIGTERM while a trace is recorded, and a trace made of what was recorded until then."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from faults.conftest import Work
from oracles.runs import forked
from oracles.runs.outcomes import Start, outcome

from certdraft.data import RecordedRow, TraceMeta, open_trace
from certdraft.data.record import writer
from certdraft.data.record.interruption import Stopped, StopSignals
from certdraft.data.trace.recorded_row import read_part
from certdraft.train.commands.cli import main

SLOW_S = 600.0  # that a shard would take


Amid = Callable[[int, Callable[[], object]], None]


@pytest.fixture
def amid(monkeypatch: pytest.MonkeyPatch) -> Amid:
    """Makes a recording act amid its second shard, when so many of its texts are complete."""

    def install(rows: int, act: Callable[[], object]) -> None:
        record_prompts, shards = writer.record_prompts, []

        def acting(*args: object, **kwargs: object) -> Iterator[tuple[int, RecordedRow]]:
            shards.append(args[2])
            for number, found in enumerate(record_prompts(*args, **kwargs)):
                if (len(shards), number) == (2, rows):
                    act()
                yield found

        monkeypatch.setattr(writer, "record_prompts", acting)

    return install


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_a_slow_shard_and_keeps_its_complete_rows(
    number: int,
    code: int,
    start: Start,
    work: Work,
    tmp_path: Path,
    amid: Amid,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    out, mark = tmp_path / "out", tmp_path / "slow"
    amid(5, lambda: (mark.touch(), time.sleep(SLOW_S)))
    pid = forked.start(start("trace", out))
    begin = time.monotonic()
    while not mark.exists() and time.monotonic() < begin + SLOW_S:
        time.sleep(0.01)
    begin = time.monotonic()
    os.kill(pid, number)
    assert forked.end(pid) == code
    assert time.monotonic() - begin < SLOW_S / 2, "it waited for the shard"
    monkeypatch.undo()
    notes = out / "trace/.recording"
    assert [note.name for note in notes.glob("shard-*.json")] == ["shard-00000.arrow.json"]
    assert [len(read_part(part)) for part in notes.glob("*.part-*")] == [5]
    assert forked.end(forked.start(start("trace", out))) == 0
    assert forked.end(forked.start(start("trace", tmp_path / "straight"))) == 0
    assert outcome(out) == outcome(tmp_path / "straight")


@pytest.fixture
def partial(start: Start, tmp_path: Path, amid: Amid, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A recording with a whole shard that was stopped in the second, after four of its rows."""
    amid(4, lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert forked.end(forked.start(start("trace", tmp_path / "out"))) == 143
    monkeypatch.undo()
    return tmp_path / "out/trace"


def test_a_partial_trace_is_closed_and_can_go_on(
    partial: Path, start: Start, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """56 prompts: 16 in the first shard and 4 of the second are recorded."""
    with pytest.raises(ValueError, match="is unfinished; .*--finish true"):
        open_trace(partial)
    main(["trace", "--out_dir", str(partial), "--finish", "true"])
    said = capsys.readouterr().err
    assert "56 prompts read = 20 used + 36 skipped" in said
    assert "36 × not recorded, because the recording was closed before its end (e.g. prompt " in said
    trace = open_trace(partial, verify="full")
    assert len(trace) == 20
    assert [shard.file for shard in trace.meta.shards] == ["shard-00000.arrow", "shard-00001.arrow"]
    recording = trace.meta.accounting["recording"]
    assert (recording["read"], recording["used"]) == (56, 20)
    assert sum(skip["count"] for skip in recording["skipped"].values()) == 36
    assert not (partial / ".recording").exists()

    # the rows are those that an undisturbed recording has
    assert forked.end(forked.start(start("trace", tmp_path / "straight"))) == 0
    whole = open_trace(tmp_path / "straight/trace")
    texts = {tuple(row.input_ids.tolist()) for row in whole}
    assert {tuple(row.input_ids.tolist()) for row in trace} <= texts

    # the command that began it still goes on, to the bytes of an undisturbed one
    del trace, whole
    assert forked.end(forked.start(start("trace", tmp_path / "out"))) == 0
    assert outcome(tmp_path / "out") == outcome(tmp_path / "straight")


def test_closing_can_be_killed_and_repeated(partial: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*args: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    close = ["trace", "--out_dir", str(partial), "--finish", "true"]
    with monkeypatch.context() as patch:
        patch.setattr(writer.Ledger, "finish", die)
        assert forked.end(forked.start(lambda: main(close))) == -9
    main(close)
    assert len(open_trace(partial, verify="full")) == 20


def test_what_cannot_be_closed(work: Work, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path / "none", work.trace):
        with pytest.raises(SystemExit) as stop:
            main(["trace", "--out_dir", str(folder), "--finish", "true"])
        assert stop.value.code == 2
        assert "holds no unfinished recording that could be closed" in capsys.readouterr().err
    assert TraceMeta.read(work.trace / "trace.json").num_rows


def test_files_are_written_to_their_end() -> None:
    """A signal waits while files are written; a second one does not."""
    signals, events, before = StopSignals(), [], signal.getsignal(signal.SIGTERM)
    with signals:
        os.kill(os.getpid(), signal.SIGTERM)
        events.append(signals.number)
        with pytest.raises(Stopped), signals.interruptible():
            events.append("computed")
        with pytest.raises(Stopped):
            os.kill(os.getpid(), signal.SIGTERM)
    assert events == [signal.SIGTERM]
    assert signal.getsignal(signal.SIGTERM) is before
