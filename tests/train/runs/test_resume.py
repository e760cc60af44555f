"""A run that was stopped, however rudely, ends in the weights of one that was not."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.runs import forked

from certdraft.train.commands.cli import main
from certdraft.train.runs import run_folder

TESTS = str(Path(__file__).parents[1])
Write = Callable[..., str]


def newest(settings: dict[str, Any], kind: str = "last") -> dict[str, Any]:
    files = list(Path(settings["runs_dir"], "tiny").glob(f"*/checkpoints/{kind}.ckpt"))
    assert len(files) == 1, files
    return torch.load(files[0], weights_only=True)


def assert_identical(a: dict[str, Any], b: dict[str, Any]) -> None:
    """Weights, optimiser state and step, bit for bit."""
    assert a["global_step"] == b["global_step"]
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for name, value in a["state_dict"].items():
        assert torch.equal(value, b["state_dict"][name]), name
    for left, right in zip(a["optimizer_states"], b["optimizer_states"], strict=True):
        for index, state in left["state"].items():
            for key, value in state.items():
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(right["state"][index][key]))


def straight(settings: dict[str, Any], write: Write, folder: Path) -> dict[str, Any]:
    alone = {**settings, "runs_dir": str(folder / "straight")}
    main(["fit", "--config", write(alone, "straight.yaml")])
    return newest(alone)


def test_kill_9_through_the_lightning_script(settings: dict[str, Any], write: Write, tmp_path: Path) -> None:
    fault = {"class_path": "injected.Signal", "init_args": {"number": 9, "step": 8}}
    config = write({**settings, "trainer": {**settings["trainer"], "callbacks": [fault]}})
    script = Path(sys.executable).with_name("lightning")
    env = {**os.environ, "PYTHONPATH": TESTS, "OMP_NUM_THREADS": "1"}
    killed = subprocess.run([script, "fit", "--config", config], env=env, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    assert newest(settings)["global_step"] == 5
    main(["fit", "--config", write(settings), "--ckpt_path", "last"])
    assert_identical(newest(settings), straight(settings, write, tmp_path))
    rows = (next(Path(settings["runs_dir"], "tiny").iterdir()) / "metrics.csv").read_text().splitlines()[1:]
    assert [row.split(",")[1] for row in rows] == ["1", "3", "3", "5", "7", "7", "9", "11", "11"]


def test_lora_with_dropout_and_accumulation(
    settings: dict[str, Any], write: Write, tmp_path: Path, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lora = {"rank": 2, "dropout": 0.2, "target_modules": ["q_proj", "down_proj"]}
    init = {"pretrained": str(tiny / "target"), "lora": lora}
    settings["model"]["drafter"] = {"class_path": "CausalDrafter", "init_args": init}
    settings["trainer"] |= {"accumulate_grad_batches": 2, "max_steps": 8}
    monkeypatch.syspath_prepend(TESTS)
    fault = {"class_path": "injected.Signal", "init_args": {"number": 15, "step": 4}}
    stopped = {**settings, "trainer": {**settings["trainer"], "callbacks": [fault]}}
    with pytest.raises(SystemExit) as exit_:
        main(["fit", "--config", write(stopped)])
    assert exit_.value.code == 128 + 15
    assert newest(settings)["global_step"] == 4
    main(["fit", "--config", write(settings), "--ckpt_path", "last"])
    end = newest(settings)
    assert_identical(end, straight(settings, write, tmp_path))
    assert end["state_dict"]
    assert all("lora_" in name for name in end["state_dict"]), "adapters only"
    start = torch.load(next(Path(settings["runs_dir"]).rglob("best.ckpt")), weights_only=True)
    assert start["state_dict"].keys() == end["state_dict"].keys()


def test_other_settings_are_refused_with_both_values(
    settings: dict[str, Any], write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    settings["trainer"]["max_steps"] = 5
    main(["fit", "--config", write(settings)])
    typed = ["fit", "--config", write(settings), "--ckpt_path", "last", "--trainer.max_steps", "7"]
    with pytest.raises(SystemExit) as exit_:
        main(typed)
    said = capsys.readouterr().err
    assert exit_.value.code == 2
    assert "trainer.max_steps: 5 in the checkpoint, 7 now" in said
    main([*typed, "--allow_change", "[trainer.max_steps]", "--trainer.log_every_n_steps", "1"])
    assert newest(settings)["global_step"] == 7
    # a checkpoint that was carried away from its run folder still knows its settings
    moved = Path(settings["runs_dir"]).parent / "moved.ckpt"
    next(Path(settings["runs_dir"]).rglob("last.ckpt")).rename(moved)
    with pytest.raises(SystemExit):
        main(["fit", "--config", write(settings), "--ckpt_path", str(moved), "--model.optimizer.lr", "0.5"])
    assert "model.init_args.optimizer.lr" in capsys.readouterr().err


def test_only_other_ranks_share_a_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_folder.pass_on(tmp_path / "rank0")
    monkeypatch.setattr(os, "getppid", os.getpid)
    for name in ("LOCAL_RANK", "SLURM_JOB_ID", "TORCHELASTIC_RUN_ID"):
        monkeypatch.delenv(name, raising=False)
    first = run_folder.new_run_folder(
        tmp_path, "x"
    )  # a command of its own, though started by the same process
    assert first.parent == tmp_path / "x"
    assert run_folder.new_run_folder(tmp_path, "x") != first
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert run_folder.new_run_folder(tmp_path, "x") == tmp_path / "rank0"
    monkeypatch.setenv(run_folder.RUN_FOLDER_VARIABLE, "")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    assert run_folder.new_run_folder(tmp_path, "x") == tmp_path / "x" / "job-7"


def test_no_checkpoint_yet_starts_afresh_and_says_so(
    settings: dict[str, Any], write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    settings["trainer"]["max_steps"] = 1
    main(["fit", "--config", write(settings), "--ckpt_path", "last"])
    assert "starting from the beginning" in capsys.readouterr().err
    assert newest(settings)["global_step"] == 1
    with pytest.raises(SystemExit) as exit_:
        main(["validate", "--config", write(settings), "--ckpt_path", "best", "--name", "other"])
    assert exit_.value.code == 2


@pytest.mark.slow
def test_two_processes_train_like_one(settings: dict[str, Any], write: Write, tmp_path: Path) -> None:
    """One global batch, however it is spread; rows differ in how many of their steps count."""
    del settings["model"]["drafter"]["init_args"]["config"]["attention_dropout"]
    alone = straight(settings, write, tmp_path)
    settings["data"]["batch_size"] = 2
    settings["trainer"] |= {"devices": 2, "strategy": "ddp"}
    command = [Path(sys.executable).with_name("certdraft"), "fit", "--config", write(settings)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    both = newest(settings)
    assert both["certdraft"]["metrics"] == pytest.approx(alone["certdraft"]["metrics"], abs=0.02)
    for name, value in alone["state_dict"].items():
        torch.testing.assert_close(both["state_dict"][name], value, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("times", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments(settings: dict[str, Any], write: Write, tmp_path: Path, times: int) -> None:
    """Each attempt goes on where the one before was killed (−9); the end is that of an undisturbed run:
    weights, best checkpoint and metrics."""
    settings["checkpoint"]["every_n_train_steps"] = 2
    config = write(settings)
    alone = {**settings, "runs_dir": str(tmp_path / "straight")}
    whole = write(alone, "straight.yaml")
    seconds = forked.timed(lambda: main(["fit", "--config", whole]))
    fit = ["fit", "--config", config, "--ckpt_path", "last"]
    assert forked.kill_often(lambda: main(fit), times, seconds)
    main(fit)
    for kind in ("last", "best"):
        assert_identical(newest(settings, kind), newest(alone, kind))
        assert newest(settings, kind)["certdraft"]["metrics"] == newest(alone, kind)["certdraft"]["metrics"]
    metrics = [next(Path(run["runs_dir"]).rglob("metrics.csv")).read_text() for run in (settings, alone)]
    assert metrics[0] == metrics[1]


def test_a_full_disk_leaves_the_last_checkpoint(
    settings: dict[str, Any], write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel refuses files as large as a checkpoint, as a full disk would."""
    expected = straight(settings, write, tmp_path)
    config = write(settings)
    fault = {"class_path": "injected.Starve", "init_args": {"step": 7, "bytes": 20_000}}
    starved = write({**settings, "trainer": {**settings["trainer"], "callbacks": [fault]}}, "starved.yaml")
    monkeypatch.syspath_prepend(TESTS)
    assert forked.end(forked.start(lambda: main(["fit", "--config", starved]))) == 2
    assert newest(settings)["global_step"] == 5
    main(["fit", "--config", config, "--ckpt_path", "last"])
    assert_identical(newest(settings), expected)
