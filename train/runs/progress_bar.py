"""Progress of a whole run: steps, tokens/s and time left; a bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from typing import Any

import pytorch_lightning as pl
from pytorch_lightning.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

_TERMINAL_S, _LINES_S = 0.5, 10.0  # between two looks at the metrics, each of which waits for the device


class RunProgress(ProgressBar):
    """One bar for the run instead of one for each epoch; validation results as lines above it."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled, self._task = True, TaskID(0)
        self._bar: Progress | None = None
        self._begin = self._seen = 0.0
        self._first_step = self._tokens = self._eval_done = 0

    def disable(self) -> None:
        """Lightning's word for every rank but the first."""
        self._enabled = False

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin = self._seen = time.monotonic()
        self._first_step, self._tokens = trainer.global_step, 0
        self._open("training", trainer.max_steps, trainer.global_step)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        ids = getattr(batch, "input_ids", batch[0] if isinstance(batch, list | tuple) else None)
        self._tokens += 0 if ids is None else ids.numel() * trainer.world_size
        now = time.monotonic()
        if (
            now - self._seen < (_TERMINAL_S if self._bar else _LINES_S)
            and trainer.global_step < trainer.max_steps
        ):
            return
        self._seen = now
        step, seconds = trainer.global_step, now - self._begin
        rate = f"{self._tokens / max(seconds, 1e-9):,.0f} tokens/s"
        loss = trainer.callback_metrics.get("train/loss_nats")
        text = rate if loss is None else f"{rate}, loss {float(loss):.3f}"
        if self._bar is not None:
            self._bar.update(self._task, completed=step, text=text)
        else:
            left = seconds / max(step - self._first_step, 1) * (trainer.max_steps - step)
            self._say(f"step {step:,}/{trainer.max_steps:,}, {text}, {_clock(left)} left")

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._close()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._close()

    def on_validation_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._eval_start = time.monotonic()

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._seen += time.monotonic() - self._eval_start
        if trainer.sanity_checking:
            return
        shown = {k: float(v) for k, v in trainer.callback_metrics.items() if k.startswith("val/")}
        if shown:
            where = f"step {trainer.global_step:,}" if trainer.state.fn == "fit" else "validation"
            self._say(f"{where}: " + ", ".join(f"{k.removeprefix('val/')} {v:.3f}" for k, v in shown.items()))

    def print(self, *args: Any, **kwargs: Any) -> None:
        """What `self.print` of a module calls."""
        self._say(" ".join(str(arg) for arg in args))

    def _open(self, label: str, total: int, done: int) -> None:
        if self._enabled and sys.stderr.isatty():
            text = TextColumn("steps, {task.fields[text]}")
            columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), text)
            self._bar = Progress(*columns, TimeRemainingColumn(), console=Console(stderr=True))
            self._task = self._bar.add_task(label, total=total, completed=done, text="")
            self._bar.start()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def _say(self, text: str) -> None:
        if not self._enabled:
            return
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        else:
            print(text, file=sys.stderr, flush=True)


def _clock(seconds: float) -> str:
    """1:02:03 or 2:03.

    Examples:
        >>> _clock(3723), _clock(123)
        ('1:02:03', '2:03')
    """
    minutes, second = divmod(int(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02}:{second:02}" if hour else f"{minute}:{second:02}"
