"""Sweep files: W&B's agent and `certdraft sweep` run the same commands, and every option in them exists."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock

import certdraft
from certdraft.train.commands.cli import main
from certdraft.train.commands.sweep import read_sweep

CONFIGS = Path(certdraft.__file__).parent / "configs"
SWEEPS = sorted((CONFIGS / "sweeps").glob("*.yaml"))


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_every_point_of_a_shipped_sweep_is_a_command_that_parses(
    path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(CONFIGS.parent)
    main(["sweep", "--file", str(path), "--dry_run", "true", "--count", "4"])
    assert len(capsys.readouterr().out.splitlines()) == 4


@pytest.mark.parametrize("path", SWEEPS, ids=lambda p: p.stem)
def test_the_metric_of_a_shipped_sweep_is_one_that_runs_log(path: Path) -> None:
    from certdraft.train.validation import ValidationSettings, ValidationSums

    sums = ValidationSums(ValidationSettings())
    sums.sums += 1
    logged = {f"val/{name}" for name in sums.metrics(lambda values: values)} | {"val/accuracy"}  # arbitration
    plan = read_sweep(path)
    decoded = {"eval/tau", "eval/tau_decoded", "eval/speedup", "eval/tokens_per_s", "eval/coverage@4"}
    assert plan.metric in (logged if "fit" in plan.command else decoded)


@pytest.fixture
def tiny_sweep(settings: dict[str, Any], write: Callable[..., str], tmp_path: Path) -> dict[str, Any]:
    del settings["runs_dir"]
    settings["trainer"].update(max_steps=2, val_check_interval=2)
    logger = {"class_path": "pytorch_lightning.loggers.WandbLogger", "init_args": {"project": "tiny"}}
    settings["trainer"]["logger"] = logger
    return {
        "program": "lightning",
        "method": "grid",
        "metric": {"name": "val/tau_expected", "goal": "maximize"},
        "parameters": {
            "model.loss": {"values": ["{'class_path': 'PoolDiscountedCE', 'init_args': {'m': 2}}", "HardCE"]},
            "model.optimizer.lr": {"value": 1e-3},
        },
        "command": ["${env}", "lightning", "fit", "--config", write(settings), "${args}"],
    }


def test_runs_here_without_an_account_and_goes_on(
    tiny_sweep: dict[str, Any], write: Callable[..., str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    file, out = write(tiny_sweep, "sweep.yaml"), tmp_path / "out"
    main(["sweep", "--file", file, "--out", str(out), "--count", "1"])
    (first,) = json.loads((out / "sweep.json").read_text())["runs"]
    assert first["exit_status"] == 0
    assert 1 <= first["val/tau_expected"] <= 5
    main(["sweep", "--file", file, "--out", str(out)])
    runs = json.loads((out / "sweep.json").read_text())["runs"]
    assert runs[0] == first
    assert [run["point"]["model.loss"][:7] for run in runs] == ["{'class", "HardCE"]
    config = yaml.safe_load(next((out / "run-001").rglob("config.yaml")).read_text())
    assert config["model"]["init_args"]["loss"]["init_args"]["m"] == 2
    assert list((out / "run-002").rglob("run-*.wandb"))


def test_numbers_ranges_and_the_program_macro(
    tiny_sweep: dict[str, Any], write: Callable[..., str], tmp_path: Path
) -> None:
    file = tmp_path / "sweep.yaml"
    tiny_sweep["command"] = ["${env}", "${program}", "fit", "${args}"]
    tiny_sweep["method"] = "random"
    tiny_sweep["parameters"] = {
        "a": {"values": ["1e-5"]}, "b": {"min": 0, "max": 0.1}, "c": {"min": 1, "max": 3},
        "d": {"min": "1e-5", "max": "1E-3", "distribution": "log_uniform_values"},
    }  # fmt: skip
    file.write_text(yaml.safe_dump(tiny_sweep).replace("'", ""))  # 1e-5 unquoted, as it is typed
    plan = read_sweep(file)
    points = plan.points(40)
    assert all(point["a"] == 1e-5 and 1e-5 <= point["d"] <= 1e-3 for point in points)
    assert len({point["b"] for point in points}) == 40
    assert all(0 <= point["b"] <= 0.1 for point in points)
    assert {point["c"] for point in points} == {1, 2, 3}
    assert plan.arguments({"a": 1e-5, "b": True}) == ["fit", "--a=1e-05", "--b=True"]


def test_without_a_key_it_stays_here_and_failures_are_told(
    tiny_sweep: dict[str, Any],
    write: Callable[..., str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """W&B's files are kept in the run; asked for and without a key, the run says so in one paragraph."""
    for name in ("WANDB_MODE", "WANDB_API_KEY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "nobody"))
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    tiny_sweep["parameters"]["model.loss"]["values"] = ["HardCE"]
    file, out = write(tiny_sweep, "sweep.yaml"), tmp_path / "out"
    main(["sweep", "--file", file, "--out", str(out)])
    assert list(out.rglob("offline-run-*"))
    capfd.readouterr()
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "--file", file, "--out", str(tmp_path / "asked"), "--wandb", "true"])
    assert stop.value.code == 2
    said = capfd.readouterr().err
    assert "1 of 1 runs failed" in said
    assert "W&B has no API key" in said
    assert "Traceback" not in said


def test_a_folder_belongs_to_one_sweep_at_a_time(
    tiny_sweep: dict[str, Any], write: Callable[..., str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = write(tiny_sweep, "sweep.yaml"), tmp_path / "out"
    out.mkdir()
    with FileLock(out / ".lock"), pytest.raises(SystemExit) as stop:
        main(["sweep", "--file", file, "--out", str(out)])
    assert stop.value.code == 2
    assert "is in use by another process" in capsys.readouterr().err
    (out / "notes.txt").touch()
    with pytest.raises(SystemExit):
        main(["sweep", "--file", file, "--out", str(out)])
    assert "is not empty" in capsys.readouterr().err


@pytest.mark.slow
def test_the_agent_of_wandb_runs_it_offline(
    tiny_sweep: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """W&B's real agent, its server replaced by nothing: private names, hence pinned by the test alone."""
    import sysconfig

    from wandb.wandb_agent import Agent

    scripts = sysconfig.get_path("scripts")
    monkeypatch.setenv("PATH", f"{scripts}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SWEEP_ID", "t")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wandb" / "sweep-t").mkdir(parents=True)
    agent = Agent(object(), None, sweep_id="t")
    agent._sweep_command = list(tiny_sweep["command"])
    arguments = {"model.loss": {"value": "HardCE"}, "model.optimizer.lr": {"value": 1e-3}}
    run = {"type": "run", "id": "c1", "run_id": "r1", "program": "lightning", "args": arguments}
    assert "exception" not in agent._process_command(run)
    assert agent._run_processes["r1"].wait() == 0
    assert list(tmp_path.rglob("offline-run-*-r1/run-r1.wandb"))


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"methods": "grid"}, "no sweep has the key 'methods'"),
        ({"method": "hill climbing"}, "give grid, random or bayes"),
        ({"metric": {"name": "val/tau_expected"}}, "a name and a goal"),
        ({"parameters": {}}, "name at least one option"),
        ({"parameters": {"model.optimizer.lr": {"values": [None]}}}, "the word None"),
        ({"parameters": {"model.optimizer.lr": {"min": 0.1}}}, "needs numbers min, max"),
        ({"parameters": {"model.optimizer.lr": {"min": "low", "max": 0.2}}}, "needs numbers min, max"),
        ({"program": "python", "command": ["${program}", "${args}"]}, "command must call"),
        ({"parameters": {"model.optimizer.lr": {"min": 0.1, "max": 0.2}}}, "a grid needs `values`"),
        ({"method": "random"}, "--count"),
        ({"run_cap": 0}, "run_cap is 0"),
        ({"command": ["python", "train.py", "${args}"]}, "command must call"),
        ({"command": ["lightning", "fit", "${args_no_boolean_flags}"]}, "pass ${args} on"),
        ({"parameters": {"model.optimizer.lrr": {"values": [1]}}}, "did you mean"),
        ({"parameters": {"model.loss": {"values": ["HardCF"]}}}, "HardCE"),
    ],
)
def test_a_wrong_sweep_is_refused_before_anything_runs(
    change: dict[str, Any],
    complaint: str,
    tiny_sweep: dict[str, Any],
    write: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = write({**tiny_sweep, **change}, "sweep.yaml")
    with pytest.raises(SystemExit) as stop:
        main(["sweep", "--file", file, "--out", str(tmp_path / "out")])
    assert stop.value.code == 2
    message = capsys.readouterr().err
    assert complaint in message
    assert "sweep.yaml" in message
    assert not (tmp_path / "out").exists()
