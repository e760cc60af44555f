"""Loggers of a run: where their files lie, what the run is called, and how fast it trains."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
from jsonargparse import Namespace
from pytorch_lightning.callbacks import Callback

from certdraft.train.runs.metrics_csv import RunMetrics

_HERE = (None, ".")  # a save_dir that leaves the choice to the run


def name_loggers(loggers: Any, folder: Path) -> None:
    """Let W&B, TensorBoard and trackio write into the run's folder, and call the run NAME/TIME like it.

    Settings of the config are kept.

    Args:
        loggers: `trainer.logger` as parsed: one entry or a list; entries have `class_path` and `init_args`.
        folder: the run's, runs/NAME/TIME.
    """
    for entry in loggers if isinstance(loggers, list) else [loggers]:
        if not isinstance(entry, Namespace) or not (init := entry.get("init_args")):
            continue
        kind = str(entry.get("class_path", "")).rpartition(".")[2]
        if kind in ("WandbLogger", "TensorBoardLogger") and init.get("save_dir") in _HERE:
            init.save_dir = str(folder)
        if kind in ("WandbLogger", "TrackioLogger") and init.get("name") is None:
            init.name = f"{folder.parent.name}/{folder.name}"


class Speed(Callback):
    """Log `train/tokens_per_s`, over all ranks, to every logger but metrics.csv.

    metrics.csv holds what the same run writes again; the clock is not among that. Validation is not counted.
    """

    def __init__(self) -> None:
        self._tokens, self._since, self._paused, self._step = 0, 0.0, 0.0, 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._restart(trainer)

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._paused = time.perf_counter()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._since += time.perf_counter() - self._paused

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        ids = getattr(batch, "input_ids", batch[0] if isinstance(batch, list | tuple) else None)
        self._tokens += 0 if ids is None else ids.numel() * trainer.world_size
        step = trainer.global_step  # the same for all batches that are accumulated
        every = max(getattr(trainer, "log_every_n_steps", 1), 1)
        if step == self._step or step % every or not self._tokens:
            return
        rate = self._tokens / (time.perf_counter() - self._since)
        for logger in trainer.loggers:
            if not isinstance(logger, RunMetrics):
                logger.log_metrics({"train/tokens_per_s": rate}, step - 1)
        self._restart(trainer)

    def _restart(self, trainer: pl.Trainer) -> None:
        self._tokens, self._since, self._step = 0, time.perf_counter(), trainer.global_step
