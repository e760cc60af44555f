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
        times: how often.
    """

    def __init__(self, number: int, step: int, times: int = 1) -> None:
        self.number, self.step, self.times = number, step, times

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            for _ in range(self.times):
                os.kill(os.getpid(), self.number)


class Kill(pl.Callback):
    """Kills this process (−9) at a hook.

    Args:
        hook: name of the callback's method.
        step: optimiser steps behind the run then.
    """

    def __init__(self, hook: str, step: int) -> None:
        def kill(trainer: pl.Trainer, *args: Any) -> None:
            if trainer.global_step == step:
                os.kill(os.getpid(), 9)

        setattr(self, hook, kill)


class Raise(pl.Callback):
    """Raises after the forward and backward pass that follow a step, before the weights move.

    Args:
        step: optimiser steps behind the run then.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_after_backward(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if trainer.global_step == self.step:
            raise ZeroDivisionError


class Stop(pl.Callback):
    """Ends training after a step, as early stopping does.

    Args:
        step: optimiser step after which it does.
    """

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_end(self, trainer: pl.Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_step == self.step


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
