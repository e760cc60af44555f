"""Loggers beside metrics.csv: TensorBoard, trackio and W&B get what a run logs, its name and its speed."""

from __future__ import annotations

import csv
import importlib.util
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar

import pytest
import pytorch_lightning as pl
import torch
from jsonargparse import Namespace
from pytorch_lightning.loggers import CSVLogger, Logger

from certdraft.drafters import CausalDrafter
from certdraft.train import DrafterModule
from certdraft.train.commands.cli import main
from certdraft.train.optim import gradient_norm
from certdraft.train.runs.loggers import name_loggers

Write = Callable[..., str]
LOGGED = {"train/loss_nats", "train/lr", "train/grad_norm", "train/tokens_per_s"}


class Listener(Logger):
    """Keeps what it is given."""

    seen: ClassVar[list[tuple[int | None, dict[str, float]]]] = []
    name, version = "listener", None

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        self.seen.append((step, dict(metrics)))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        return


@pytest.fixture
def short(settings: dict[str, Any]) -> dict[str, Any]:
    settings["trainer"] |= {"max_steps": 4, "val_check_interval": 2, "limit_val_batches": 1}
    return settings


def fit(settings: dict[str, Any], write: Write, *options: str) -> Path:
    main(["fit", "--config", write(settings), *options])
    (folder,) = Path(settings["runs_dir"], "tiny").iterdir()
    return folder


def fit_with(
    short: dict[str, Any], write: Write, logger: str, missing: str, capsys: pytest.CaptureFixture[str]
) -> Path | None:
    """The run's folder; None where the logger's package is not installed, which the command must say."""
    options = ("--trainer.logger", f"configs/logger/{logger}.yaml")
    if importlib.util.find_spec(logger) is not None:
        return fit(short, write, *options)
    with pytest.raises(SystemExit) as stop:
        fit(short, write, *options)
    assert stop.value.code == 2
    assert missing in capsys.readouterr().err
    return None


def test_every_logger_is_told_norm_and_speed(
    short: dict[str, Any], write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Listener, "seen", [])
    short["trainer"] |= {
        "logger": {"class_path": "my_loggers.Listener"}, "gradient_clip_val": 1e-3,
        "accumulate_grad_batches": 2,
    }  # fmt: skip
    monkeypatch.setitem(sys.modules, "my_loggers", sys.modules[__name__])
    folder = fit(short, write)
    told: dict[str, list[tuple[int | None, float]]] = {}
    for step, metrics in Listener.seen:
        for name, value in metrics.items():
            told.setdefault(name, []).append((step, value))
    for name in LOGGED:
        assert [step for step, _ in told[name]] == [1, 3], name
    assert all(value > 1e-3 for _, value in told["train/grad_norm"]), "of the gradient before it is clipped"
    assert all(10 < value < 1e9 for _, value in told["train/tokens_per_s"])
    with (folder / "metrics.csv").open() as stream:
        columns = set(csv.DictReader(stream).fieldnames or ())
    assert columns >= LOGGED - {"train/tokens_per_s"}
    assert "train/tokens_per_s" not in columns, "a run that is repeated writes the same metrics.csv"


def test_the_norm_is_that_of_all_gradients() -> None:
    one, two, idle = (torch.nn.Parameter(torch.zeros(2)) for _ in range(3))
    one.grad, two.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0])
    assert float(gradient_norm([one, two, idle])) == pytest.approx(5.0)


def test_loggers_are_named_and_placed_unless_the_config_says_so(tmp_path: Path) -> None:
    def entry(kind: str, **init: Any) -> Namespace:
        return Namespace(class_path=f"pytorch_lightning.loggers.{kind}", init_args=Namespace(**init))

    folder = tmp_path / "mine" / "2026-01-01_00-00-00"
    fresh = [
        entry("WandbLogger", save_dir=".", name=None),
        entry("TensorBoardLogger", save_dir=".", name="tensorboard"),
        entry("TrackioLogger", project="p", name=None),
    ]
    name_loggers(fresh, folder)
    assert [e.init_args.get("save_dir") for e in fresh] == [str(folder), str(folder), None]
    called = "mine/2026-01-01_00-00-00"
    assert [e.init_args.get("name") for e in fresh] == [called, "tensorboard", called]
    given = entry("WandbLogger", save_dir="elsewhere", name="chosen")
    name_loggers(given, folder)
    assert (given.init_args.save_dir, given.init_args.name) == ("elsewhere", "chosen")
    name_loggers(None, folder)
    name_loggers(True, folder)


def test_tensorboard_or_what_is_missing(
    short: dict[str, Any], write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = fit_with(short, write, "tensorboard", "tensorboard", capsys)
    if folder is None:
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    assert set(found.Tags()["scalars"]) >= LOGGED | {"val/tau_expected"}
    assert [event.step for event in found.Scalars("train/grad_norm")] == [1, 3]


def test_trackio_or_what_is_missing(
    short: dict[str, Any],
    write: Write,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    folder = fit_with(short, write, "trackio", "pip install trackio", capsys)
    if folder is None:
        return
    import trackio

    (run,) = trackio.Api().runs("certdraft")
    assert run.name == f"tiny/{folder.name}"


def test_python_trainers_log_the_norm_as_well(tiny: Path, tmp_path: Path) -> None:
    from certdraft.data import TraceDataModule

    drafter = CausalDrafter(pretrained=str(tiny / "target"))
    logger = CSVLogger(str(tmp_path))
    trainer = pl.Trainer(
        max_steps=1, logger=logger, log_every_n_steps=1, accelerator="cpu", enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    with pytest.warns():  # Lightning on a loader without workers
        trainer.fit(DrafterModule(drafter), TraceDataModule(str(tiny / "train"), seq_len=64, batch_size=4))
    assert trainer.callback_metrics["train/grad_norm"] > 0
