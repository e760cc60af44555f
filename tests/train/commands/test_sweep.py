"""Sweep files: W&B's agent and `certdraft sweep` run the same commands, and every option in them exists."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

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
        ({"parameters": {"model.optimizer.lr": {"min": 0.1}}}, "needs min, max"),
        ({"parameters": {"model.optimizer.lr": {"min": 0.1, "max": 0.2}}}, "a grid needs `values`"),
        ({"method": "random"}, "--count"),
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
