"""metrics.csv of a run: one file over all its parts, in which a resumed part replaces what it repeats."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter


class RunMetrics(CSVLogger):
    """Writes `metrics.csv` straight into the run's folder.

    Args:
        folder: the run's folder.
        resume_step: optimiser steps of the checkpoint the run goes on from; later rows are dropped.
    """

    def __init__(self, folder: str | Path, resume_step: int = 0) -> None:
        super().__init__(save_dir=folder, name="", version="", flush_logs_every_n_steps=1)
        self.resume_step = resume_step

    @property
    @rank_zero_experiment
    def experiment(self) -> ExperimentWriter:
        if self._experiment is None:
            self._experiment: ExperimentWriter = _Writer(self.log_dir, self.resume_step)
        return self._experiment

    def log_hyperparams(self, params: Any = None) -> None:
        """Nothing: config.yaml has them."""


class _Writer(ExperimentWriter):
    def __init__(self, log_dir: str, resume_step: int) -> None:
        super().__init__(log_dir)
        file = Path(self.metrics_file_path)
        if not file.exists():
            return
        with file.open(newline="", encoding="utf-8") as stream:
            rows = list(csv.DictReader(stream))
        file.unlink()
        self.metrics = [row for row in rows if float(row["step"]) < resume_step]
        self.save()

    def _check_log_dir_exists(self) -> None:
        """The folder is the run's: neither warn about its content nor delete it."""
