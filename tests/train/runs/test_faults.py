"""Faults injected into runs: kills, damaged files, shared folders. Nothing is lost; errors say what to do."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from filelock import FileLock
from oracles.runs import forked
from oracles.runs.outcomes import fails

from certdraft.train.commands.cli import main
from certdraft.train.runs import run_folder
from certdraft.train.runs.checkpoint_file import WholeCheckpointIO, is_whole, read_checkpoint
from certdraft.train.runs.metrics_csv import whole_rows

Write = Callable[..., str]
TESTS = str(Path(__file__).parents[1])


@pytest.fixture
def settings(settings: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(TESTS)
    settings["trainer"] |= {"max_steps": 6, "val_check_interval": 2, "log_every_n_steps": 1}
    settings["checkpoint"] = {"every_n_train_steps": 2}
    return settings


def fit(settings: dict[str, Any], write: Write, *more: str) -> Path:
    """The folder of a finished run."""
    main(["fit", "--config", write(settings), *more])
    return newest(settings)


def newest(settings: dict[str, Any]) -> Path:
    (folder,) = (path for path in Path(settings["runs_dir"], "tiny").iterdir())
    return folder


def with_fault(settings: dict[str, Any], name: str, **init: Any) -> dict[str, Any]:
    fault = {"class_path": f"injected.{name}", "init_args": init}
    return {**settings, "trainer": {**settings["trainer"], "callbacks": [fault]}}


def assert_same_run(a: Path, b: Path) -> None:
    """Best and last weights, optimiser, best score and metrics are identical."""
    for kind in ("last", "best"):
        one, two = (torch.load(run / f"checkpoints/{kind}.ckpt", weights_only=True) for run in (a, b))
        assert one["global_step"] == two["global_step"]
        assert one["certdraft"]["metrics"] == two["certdraft"]["metrics"]
        for name, value in one["state_dict"].items():
            assert torch.equal(value, two["state_dict"][name]), (kind, name)
    assert (a / "metrics.csv").read_text() == (b / "metrics.csv").read_text()


@pytest.fixture
def straight(settings: dict[str, Any], write: Write, tmp_path: Path) -> Path:
    alone = {**settings, "runs_dir": str(tmp_path / "straight")}
    main(["fit", "--config", write(alone, "straight.yaml")])
    return newest(alone)


@pytest.mark.parametrize("hook", ["on_train_batch_end", "on_validation_start", "on_validation_end"])
def test_a_kill_around_a_validation(
    hook: str, settings: dict[str, Any], write: Write, straight: Path
) -> None:
    """Of the step that is also one of `last.ckpt`: it is neither left out nor made twice."""
    killed = write(with_fault(settings, "Kill", hook=hook, step=4))
    assert forked.end(forked.start(lambda: main(["fit", "--config", killed]))) == -9
    assert_same_run(fit(settings, write, "--ckpt_path", "last"), straight)


def test_validation_at_the_end_of_an_epoch(settings: dict[str, Any], write: Write, tmp_path: Path) -> None:
    settings["data"]["batch_size"] = 32  # three batches an epoch
    settings["trainer"] |= {"check_val_every_n_epoch": 1, "val_check_interval": 1.0, "max_steps": 8}
    settings["checkpoint"] = {"every_n_train_steps": 3}
    alone = {**settings, "runs_dir": str(tmp_path / "straight")}
    main(["fit", "--config", write(alone, "straight.yaml")])
    killed = write(with_fault(settings, "Kill", hook="on_train_batch_end", step=7))
    assert forked.end(forked.start(lambda: main(["fit", "--config", killed]))) == -9
    assert_same_run(fit(settings, write, "--ckpt_path", "last"), newest(alone))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_with_its_metrics(
    number: int, settings: dict[str, Any], write: Write, straight: Path
) -> None:
    settings["checkpoint"] = {"every_n_train_steps": 100}
    stopped = write(with_fault(settings, "Signal", number=int(number), step=3))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", stopped])
    assert stop.value.code == 128 + number
    assert read_checkpoint(newest(settings) / "checkpoints/last.ckpt")["global_step"] == 3
    assert whole_rows(newest(settings) / "metrics.csv")[-1]["step"] == "2"
    assert_same_run(fit(settings, write, "--ckpt_path", "last"), straight)


def test_ctrl_c_twice_ends_with_130(settings: dict[str, Any], write: Write) -> None:
    stopped = write(with_fault(settings, "Signal", number=int(signal.SIGINT), step=3, times=2))
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", stopped])
    assert stop.value.code == 130


def test_a_fit_leaves_the_signal_handlers_as_they_were(settings: dict[str, Any], write: Write) -> None:
    """`certdraft real` goes on after a fit: what it does then must end at SIGTERM."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    before = [signal.getsignal(number) for number in numbers]
    fit(settings, write)
    assert [signal.getsignal(number) for number in numbers] == before


@pytest.mark.parametrize("how", ["max_time", "exception", "stop"])
def test_every_end_leaves_a_last_checkpoint(
    how: str, settings: dict[str, Any], write: Write, straight: Path
) -> None:
    settings["checkpoint"] = {"every_n_train_steps": 100}
    settings["trainer"]["limit_val_batches"] = 0 if how == "max_time" else 1.0
    if how == "max_time":
        settings["trainer"]["max_steps"] = 10_000
        fit(settings, write, "--trainer.max_time", "00:00:00:01")
        assert read_checkpoint(newest(settings) / "checkpoints/last.ckpt")["global_step"] > 0
        return
    ended = with_fault(settings, "Raise" if how == "exception" else "Stop", step=3)
    arguments = ["fit", "--config", write(ended)]
    if how == "exception":
        with pytest.raises(ZeroDivisionError):
            main(arguments)
    else:
        main(arguments)
    last = read_checkpoint(newest(settings) / "checkpoints/last.ckpt")
    assert last["global_step"] == 3
    resumed = fit(settings, write, "--ckpt_path", "last")
    if how == "exception":
        assert_same_run(resumed, straight)
    one, two = (read_checkpoint(run / "checkpoints/last.ckpt") for run in (resumed, straight))
    assert all(torch.equal(value, two["state_dict"][name]) for name, value in one["state_dict"].items())


def test_no_checkpoint_between_accumulated_batches(settings: dict[str, Any], write: Write) -> None:
    settings["trainer"] |= {"accumulate_grad_batches": 2, "max_steps": 3, "limit_val_batches": 0}
    settings["checkpoint"] = {"every_n_train_steps": 1}
    with pytest.raises(ZeroDivisionError):
        fit(with_fault(settings, "Raise", step=0), write)
    assert not list(newest(settings).glob("checkpoints/*"))


def test_a_damaged_last_checkpoint_falls_back_to_the_one_before(
    settings: dict[str, Any], write: Write, straight: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(settings, write)
    last = run / "checkpoints/last.ckpt"
    flip(last)
    fit(settings, write, "--ckpt_path", "last")
    assert "last.ckpt is damaged: going on from last.previous.ckpt" in capsys.readouterr().err
    assert_same_run(run, straight)
    last.write_bytes(b"")
    fit(settings, write, "--ckpt_path", "last")
    assert_same_run(run, straight)
    for file in (last, run / "checkpoints/last.previous.ckpt"):
        flip(file)
    said = fails(capsys, "fit", "--config", write(settings), "--ckpt_path", "last")
    assert "last.ckpt is damaged; use one beside it (best.ckpt), or train again" in said
    flip(run / "checkpoints/best.ckpt")
    for command in ("validate", "fit"):
        said = fails(capsys, command, "--config", write(settings), "--ckpt_path", "best")
        assert "best.ckpt is damaged; delete it and train again" in said
    said = fails(capsys, "export", "--run", str(run), "--out", str(run / "export"))
    assert "best.ckpt is damaged" in said


def flip(file: Path) -> None:
    """One bit in the middle."""
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_a_checkpoint_is_whole_at_every_moment_of_its_writing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off before each rename, the folder still holds a whole checkpoint, and `last` never mixes two."""
    io, replace = WholeCheckpointIO(), Path.replace
    folder = tmp_path / "tiny/run/checkpoints"
    for number in range(3):
        io.save_checkpoint({"number": torch.tensor(number)}, folder / "last.ckpt")
    seen = set()
    for allowed in range(6):
        calls = iter(range(100))

        def cut_off(self: Path, target: Path, limit: int = allowed, calls: Any = calls) -> Path:
            if next(calls) >= limit:
                raise KeyboardInterrupt
            return replace(self, target)

        monkeypatch.setattr(Path, "replace", cut_off)
        try:
            io.save_checkpoint({"number": torch.tensor(10 + allowed)}, folder / "last.ckpt")
        except KeyboardInterrupt:
            pass
        monkeypatch.setattr(Path, "replace", replace)
        found = run_folder.find_checkpoint(tmp_path / "tiny")
        assert found is not None
        seen.add(found.name)
        assert all(is_whole(file) for file in folder.glob("*.ckpt"))
        assert not list(folder.glob("*.tmp"))
        if not (folder / "last.ckpt").exists():
            io.save_checkpoint({"number": torch.tensor(0)}, folder / "last.ckpt")
    assert seen == {"last.ckpt", "last.previous.ckpt"}


def test_a_checkpoint_runs_no_code(
    settings: dict[str, Any], write: Write, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Evil:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "ran"),)

    run = fit(settings, write)
    torch.save({"state_dict": {}, "evil": Evil()}, tmp_path / "evil.ckpt")
    config = write({**settings, "weights_only": False})
    ask = ("validate", "--config", config, "--ckpt_path", str(run / "checkpoints/best.ckpt"))
    assert "weights_only: false would run code" in fails(capsys, *ask)
    said = fails(capsys, "validate", "--config", write(settings), "--ckpt_path", str(tmp_path / "evil.ckpt"))
    assert "evil.ckpt is damaged, or no checkpoint" in said
    assert not (tmp_path / "ran").exists()


def test_damaged_records_name_the_file_and_the_way_out(
    settings: dict[str, Any], write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(settings, write)
    again = ("fit", "--config", write(settings), "--ckpt_path", "last")
    config = (run / "config.yaml").read_text()
    (run / "config.yaml").write_text("a: [b")
    assert "config.yaml is damaged; restore it, or delete it" in fails(capsys, *again)
    (run / "config.yaml").unlink()
    main(list(again))
    assert yaml.safe_load((run / "config.yaml").read_text())["model"] == yaml.safe_load(config)["model"]
    record = (run / "run.yaml").read_text()
    (run / "run.yaml").write_text("parts: 3")
    assert "run.yaml is damaged; move it away to go on" in fails(capsys, *again)
    (run / "run.yaml").write_text(record)
    (run / "metrics.csv").write_bytes(b"\xff\x00\xff")
    assert "metrics.csv is damaged" in fails(capsys, *again)


def test_torn_metrics_rows_are_dropped(settings: dict[str, Any], write: Write, straight: Path) -> None:
    killed = write(with_fault(settings, "Kill", hook="on_train_batch_end", step=5))
    forked.end(forked.start(lambda: main(["fit", "--config", killed])))
    with (newest(settings) / "metrics.csv").open("a") as stream:
        stream.write("0,4,0.0")
    assert_same_run(fit(settings, write, "--ckpt_path", "last"), straight)


def test_runs_of_one_second_get_one_folder_each(tmp_path: Path) -> None:
    children = [forked.start(lambda: run_folder.new_run_folder(tmp_path, "race")) for _ in range(4)]
    assert [forked.end(pid) for pid in children] == [0] * 4
    assert len(list((tmp_path / "race").iterdir())) == 4


def test_a_run_is_resumed_by_one_process_only(
    settings: dict[str, Any], write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    run = fit(settings, write)
    with FileLock(run / ".lock"):
        said = fails(capsys, "fit", "--config", write(settings), "--ckpt_path", "last")
    assert "is in use by another process" in said
    main(["fit", "--config", write(settings), "--ckpt_path", "last"])


def test_a_job_has_one_run_of_a_name(
    settings: dict[str, Any],
    write: Write,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_JOB_NAME", "bash")  # Lightning then starts no cluster environment
    run = fit(settings, write)
    assert run.name == "job-7"
    before = (run / "checkpoints/last.ckpt").read_bytes()
    other = write({**settings, "seed_everything": 5}, "other.yaml")
    assert "job-7 holds a run already" in fails(capsys, "fit", "--config", other)
    shutil.rmtree(run / "checkpoints")
    said = fails(capsys, "fit", "--config", other, "--ckpt_path", "last")
    assert "job-7 holds a run already of other settings" in said
    main(["fit", "--config", write(settings), "--ckpt_path", "last"])  # requeued before the first checkpoint
    assert len((run / "checkpoints/last.ckpt").read_bytes()) == len(before)
