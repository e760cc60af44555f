"""Faults that tests inject into a run through `trainer.callbacks`."""

from __future__ import annotations

import os
import resource
from typing import Any

import pytorch_lightning as pl


class Signal(pl.Callback):
    """Sends this process a signal after a step.

    Args:
        number: of the signal; 9 leaves no time for anything.
        step: optimiser step after which it is sent.
    """

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            os.kill(os.getpid(), self.number)


class Starve(pl.Callback):
    """Lets the kernel refuse large files after a step.

    Args:
        step: optimiser step after which it does.
        bytes: no file may become larger.
    """

    def __init__(self, step: int, bytes: int) -> None:
        self.step, self.bytes = step, bytes

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.bytes, self.bytes))
