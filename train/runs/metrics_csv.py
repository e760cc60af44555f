"""metrics.csv of a run: one file over all its parts, in which a resumed part replaces what it repeats."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lightning_fabric.loggers.logger import rank_zero_experiment
from pytorch_lightning.loggers import CSVLogger
from pytorch_lightning.loggers.csv_logs import ExperimentWriter

from certdraft.support import write_file


class RunMetrics(CSVLogger):
    """Lightning's CSVLogger, writing every row at once and straight into the run's folder.

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
    """Appends rows; a file with other columns, and that of an earlier part, is replaced as a whole."""

    def __init__(self, log_dir: str, resume_step: int) -> None:
        super().__init__(log_dir)
        self._file = Path(self.metrics_file_path)
        if self._file.exists():
            kept = [row for row in whole_rows(self._file) if float(row["step"]) < resume_step]
            self.metrics_keys = sorted({key for row in kept for key in row})
            self._write(kept)

    def save(self) -> None:
        if not self.metrics:
            return
        new = {key for row in self.metrics for key in row} - set(self.metrics_keys)
        if new or not self._file.exists():
            self.metrics_keys = sorted({*self.metrics_keys, *new})
            self._write([*(whole_rows(self._file) if self._file.exists() else ()), *self.metrics])
        else:
            with self._file.open("a", newline="", encoding="utf-8") as stream:
                csv.DictWriter(stream, self.metrics_keys).writerows(self.metrics)
        self.metrics = []

    def _write(self, rows: Iterable[Mapping[str, Any]]) -> None:
        def write(temporary: Path) -> None:
            with temporary.open("w", newline="", encoding="utf-8") as stream:
                writer = csv.DictWriter(stream, self.metrics_keys)
                writer.writeheader()
                writer.writerows(rows)

        write_file(self._file, write)

    def _check_log_dir_exists(self) -> None:
        """The folder is the run's: neither warn about its content nor delete it."""


def whole_rows(file: Path) -> list[dict[str, str]]:
    """The rows of a metrics file, without any that a kill cut short.

    Raises:
        ValueError: the file is no table of metrics.
    """
    try:
        header, *lines = list(csv.reader(file.read_text(encoding="utf-8").splitlines(keepends=True))) or [[]]
        rows = [dict(zip(header, line, strict=True)) for line in lines if len(line) == len(header)]
        if rows and "step" not in header:
            raise ValueError("no column `step`")
    except (ValueError, csv.Error) as error:
        raise ValueError(
            f"{file} is damaged ({error}); move it away, and the run goes on without its earlier rows"
        ) from None
    return [row for row in rows if row["step"].isdigit()]
