"""However a global batch is spread, over processes or in time, training gives the same losses."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from certdraft.train.cli import main

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
    assert parts != pytest.approx(whole, abs=0.05)  # each is of its batch alone
    for name, value in weights(plain, "whole").items():
        torch.testing.assert_close(weights(plain, "parts")[name], value, atol=2e-6, rtol=1e-4)


def test_accumulation_over_processes(plain: dict[str, Any], write: Write) -> None:
    losses(plain, write, "whole", val_check_interval=6)
    plain["data"]["batch_size"] //= 4
    several = {"accumulate_grad_batches": 2, "devices": 2, "strategy": "ddp_fork", "val_check_interval": 12}
    losses(plain, write, "parts", **several)
    for name, value in weights(plain, "whole").items():
        torch.testing.assert_close(weights(plain, "parts")[name], value, atol=2e-6, rtol=1e-4)
