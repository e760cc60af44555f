"""However a global batch is spread, over processes or in time, training gives the same losses."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from certdraft.train.commands.cli import main

Write = Callable[..., str]


@pytest.fixture
def plain(settings: dict[str, Any]) -> dict[str, Any]:
    """No dropout, whose random numbers depend on the rank; every step is logged."""
    del settings["model"]["drafter"]["init_args"]["config"]["attention_dropout"]
    settings["trainer"] |= {"log_every_n_steps": 1, "max_steps": 6, "val_check_interval": 3}
    return settings


def losses(settings: dict[str, Any], write: Write, name: str, **trainer: Any) -> list[float]:
    """Losses of a run, one a step."""
    folder = Path(settings["runs_dir"]) / name
    settings = {**settings, "runs_dir": str(folder), "trainer": settings["trainer"] | trainer}
    main(["fit", "--config", write(settings, f"{name}.yaml")])
    [file] = folder.rglob("metrics.csv")
    rows = csv.DictReader(file.read_text().splitlines())
    return [float(row["train/loss_nats"]) for row in rows if row["train/loss_nats"]]


def test_two_processes_train_like_one(plain: dict[str, Any], write: Write) -> None:
    alone = losses(plain, write, "alone")
    plain["data"]["batch_size"] //= 2
    both = losses(plain, write, "both", devices=2, strategy="ddp_fork")
    assert len(alone) == 6
    assert both == pytest.approx(alone, abs=1e-5)


def weights(settings: dict[str, Any], name: str) -> dict[str, torch.Tensor]:
    [file] = Path(settings["runs_dir"], name).rglob("last.ckpt")
    return torch.load(file, weights_only=True)["state_dict"]


def test_accumulated_batches_weigh_every_step_alike(plain: dict[str, Any], write: Write) -> None:
    """Twelve batches of two rows in six steps, or six of four; their rows differ in learned steps."""
    whole = losses(plain, write, "whole", val_check_interval=6)
    plain["data"]["batch_size"] //= 2
    parts = losses(plain, write, "parts", accumulate_grad_batches=2, val_check_interval=12)
    assert len(whole) == 6
    assert parts != pytest.approx(whole, abs=0.005)  # each is of its batch alone
    for name, value in weights(plain, "whole").items():
        torch.testing.assert_close(weights(plain, "parts")[name], value, atol=2e-6, rtol=1e-4)


def test_accumulation_over_processes(plain: dict[str, Any], write: Write) -> None:
    losses(plain, write, "whole", val_check_interval=6)
    plain["data"]["batch_size"] //= 4
    several = {"accumulate_grad_batches": 2, "devices": 2, "strategy": "ddp_fork", "val_check_interval": 12}
    losses(plain, write, "parts", **several)
    for name, value in weights(plain, "whole").items():
        torch.testing.assert_close(weights(plain, "parts")[name], value, atol=2e-6, rtol=1e-4)


def run_as_command(
    settings: dict[str, Any], write: Write, name: str, *more: str, returncode: int = 0
) -> Path:
    """The run's folder; other processes are started by Lightning, from the command line."""
    folder = Path(settings["runs_dir"]) / name
    config = write({**settings, "runs_dir": str(folder)}, f"{name}.yaml")
    command = [Path(sys.executable).with_name("certdraft"), "fit", "--config", config, *more]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == returncode, done.stderr
    return next(folder.rglob("metrics.csv")).parent


def logged(run: Path) -> list[float]:
    rows = csv.DictReader((run / "metrics.csv").read_text().splitlines())
    return [float(row["train/loss_nats"]) for row in rows if row["train/loss_nats"]]


@pytest.mark.slow
def test_fsdp2_trains_like_one_process(plain: dict[str, Any], write: Write) -> None:
    """Two processes with half of the weights each; and it goes on from its sharded checkpoint."""
    alone = losses(plain, write, "alone")
    plain["data"]["batch_size"] //= 2
    strategy = {
        "class_path": "pytorch_lightning.strategies.ModelParallelStrategy",
        "init_args": {"data_parallel_size": 2, "tensor_parallel_size": 1, "process_group_backend": "gloo"},
    }
    plain["trainer"] |= {"devices": 2, "strategy": strategy}
    fault = {"class_path": "injected.Signal", "init_args": {"number": 9, "step": 5}}
    killed = {
        **plain,
        "trainer": plain["trainer"] | {"callbacks": [fault]},
        "checkpoint": {"every_n_train_steps": 3},
    }
    run_as_command(killed, write, "both", returncode=-9)
    run = run_as_command(
        {**plain, "checkpoint": {"every_n_train_steps": 3}}, write, "both", "--ckpt_path", "last"
    )
    assert (run / "checkpoints" / "last.ckpt").is_dir()
    assert logged(run) == pytest.approx(alone, abs=1e-5)


def test_checkpointed_activations_change_nothing(plain: dict[str, Any], write: Write) -> None:
    whole = losses(plain, write, "whole", max_steps=3)
    plain["model"]["drafter"]["init_args"]["gradient_checkpointing"] = True
    assert losses(plain, write, "recomputed", max_steps=3) == pytest.approx(whole, abs=1e-6)


def test_bf16_mixed_stays_close(plain: dict[str, Any], write: Write) -> None:
    whole = losses(plain, write, "whole", max_steps=3)
    mixed = losses(plain, write, "mixed", max_steps=3, precision="bf16-mixed")
    assert mixed != whole
    assert mixed == pytest.approx(whole, rel=0.01)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch.compile warns about itself
def test_compiled_layers_train_alike(plain: dict[str, Any], write: Write) -> None:
    whole = losses(plain, write, "whole", max_steps=3)
    compiled = {"class_path": "certdraft.train.compiling.CompileLayers"}
    assert losses(plain, write, "compiled", max_steps=3, callbacks=[compiled]) == pytest.approx(
        whole, abs=1e-4
    )
