"""Progress of a whole run: one bar over all epochs, validation results as lines above it."""

from __future__ import annotations

import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar

from certdraft.support import Progress

_TERMINAL_S, _LINES_S = 0.5, 10.0  # between two looks at the metrics, each of which waits for the device


class RunProgress(ProgressBar):
    """Lightning's progress callback, shown by `certdraft.support.Progress`."""

    def __init__(self) -> None:
        super().__init__()
        self._bar = Progress("training", None)
        self._seen, self._steps, self._tokens = 0.0, 0, 0

    def disable(self) -> None:
        """Called by Lightning on every rank but the first."""
        self._bar.enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        total = trainer.max_steps if trainer.max_steps > 0 else None
        self._bar = Progress(
            "training", total, "steps", interval_s=0, enabled=self._bar.enabled, done=trainer.global_step
        )
        self._bar.__enter__()
        self._seen, self._steps, self._tokens = time.monotonic(), trainer.global_step, 0

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        ids = getattr(batch, "input_ids", batch[0] if isinstance(batch, list | tuple) else None)
        self._tokens += 0 if ids is None else ids.numel() * trainer.world_size
        waited, last = time.monotonic() - self._seen, trainer.global_step == trainer.max_steps
        if waited < (_TERMINAL_S if self._bar.on_terminal else _LINES_S) and not last:
            return
        loss = trainer.callback_metrics.get("train/loss_nats")
        note = "" if loss is None else f"loss {float(loss):.3f}"
        self._bar.advance(trainer.global_step - self._steps, self._tokens, note)
        self._seen, self._steps, self._tokens = time.monotonic(), trainer.global_step, 0

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._bar.__exit__(None, None, None)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._bar.__exit__(None, None, None)

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        values = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if values and trainer.state.fn == "fit" and not trainer.sanity_checking:
            self.print(
                f"step {trainer.global_step:,}: "
                + ", ".join(f"{k.removeprefix('val/')} {v:.3f}" for k, v in values.items())
            )

    def print(self, *args: Any, **kwargs: Any) -> None:
        """Called by `self.print` of a module."""
        self._bar.print(" ".join(str(arg) for arg in args))
