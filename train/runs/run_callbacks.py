"""Callbacks of every training run: exact reseeding, checkpoints, records, and a stop that loses nothing."""

from __future__ import annotations

import contextlib
import copy
import hashlib
import os
import signal
import struct
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from types import FrameType
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback, ModelCheckpoint

from certdraft.support import write_text
from certdraft.train.runs.checkpoint_file import LAST
from certdraft.train.runs.run_record import write_part

_EVERY = 20  # steps between two questions to all ranks whether one was asked to stop


class StepRNG(Callback):
    """Reseed torch before every batch from (seed, step, micro-batch, rank).

    Dropout then depends on where the run is and not on how it got there, so a resumed run repeats it without
    any stored generator state, on any number of ranks.

    Args:
        seed: the run's seed; None takes the one that `seed_everything` set, or 0.
    """

    def __init__(self, seed: int | None = None) -> None:
        self.seed = int(os.environ.get("PL_GLOBAL_SEED", "0")) if seed is None else seed

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        micro_batch = batch_idx % trainer.accumulate_grad_batches
        torch.manual_seed(step_seed(self.seed, trainer.global_step, micro_batch, trainer.global_rank))


def step_seed(seed: int, step: int, micro_batch: int, rank: int) -> int:
    """A 63-bit hash of its arguments, the same on every machine.

    Examples:
        >>> step_seed(0, 0, 0, 0) != step_seed(0, 0, 0, 1)
        True
    """
    digest = hashlib.blake2b(struct.pack("<4q", seed, step, micro_batch, rank), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


class RunCheckpoint(ModelCheckpoint):
    """`best.ckpt` after a validation that improves `monitor`, `last.ckpt` every few steps and at every end.

    `last.ckpt` is the state after an optimiser step, written once that step is logged and its validation, if
    one is due, is done: a run that goes on from it repeats nothing and leaves nothing out.

    Args:
        monitor: logged metric that decides what is best.
        mode: whether more of it is better, or less.
        every_n_train_steps: steps between two `last.ckpt`; what a kill can cost.
        dirpath: folder; the run's `checkpoints` folder when not given.
    """

    def __init__(
        self,
        monitor: str = "val/tau_expected",
        mode: Literal["max", "min"] = "max",
        every_n_train_steps: int = 200,
        dirpath: str | None = None,
    ) -> None:
        if every_n_train_steps < 1:
            raise ValueError(f"checkpoint.every_n_train_steps is {every_n_train_steps}; give 1 or more")
        super().__init__(
            dirpath=dirpath, filename="best", monitor=monitor, mode=mode, save_last=True, save_top_k=1,
            enable_version_counter=False, save_on_train_epoch_end=False,
        )  # fmt: skip
        self.every_n_steps = every_n_train_steps
        self._finished = self._saved = -1  # optimiser steps
        self._stepping = False
        self._loops: dict[str, Any] | None = None  # progress and data position after the finished step

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._finished = self._saved = trainer.global_step
        self._stepping, self._loops = False, None

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._finished % self.every_n_steps == 0:
            self.save_last_now(trainer)

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        self._stepping = True

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step != self._finished:  # not between accumulated batches
            self._finished, self._stepping = trainer.global_step, False
            self._loops = copy.deepcopy(trainer.fit_loop.state_dict())
            # Otherwise Lightning counts the epoch twice when it goes on from the last batch of one.
            self._loops["epoch_loop.batch_progress"]["is_last_batch"] = False

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        score = trainer.callback_metrics.get(str(self.monitor))
        if score is None or trainer.sanity_checking or trainer.state.fn != "fit":
            return
        best = self.best_model_score
        better = not score.isnan() and (
            best is None or bool(score > best if self.mode == "max" else score < best)
        )
        if trainer.strategy.reduce_boolean_decision(bool(better)):
            self.best_model_score = score.detach().clone()
            self.best_model_path = self._save(trainer, "best.ckpt")

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Nothing: epochs do not matter here."""

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.save_last_now(trainer)

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        """Save the last finished step, unless its validation or the next step was under way."""
        lost = self._stepping or trainer.validating or trainer.world_size > 1
        if not lost and not isinstance(exception, OSError):
            with contextlib.suppress(OSError):  # the exception itself is what the user should see
                self.save_last_now(trainer)

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        if self._loops is not None:
            checkpoint["loops"]["fit_loop"] = self._loops

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the best score, also in a folder that was moved."""
        self.best_model_score = state_dict.get("best_model_score")
        if self.best_model_score is not None:
            self.best_model_path = str(Path(str(self.dirpath)) / "best.ckpt")

    def save_last_now(self, trainer: pl.Trainer) -> None:
        """Write `last.ckpt` of the last finished step, unless it is written."""
        if self._finished != self._saved:
            self._saved = self._finished
            self.last_model_path = self._save(trainer, LAST)

    def _save(self, trainer: pl.Trainer, name: str) -> str:
        path = str(Path(str(self.dirpath)) / name)
        trainer.save_checkpoint(path, weights_only=False)
        if trainer.is_global_zero:
            for logger in trainer.loggers:
                logger.after_save_checkpoint(self)
        return path


class Interrupted(SystemExit):
    """The run was stopped by a signal, which is in the exit code."""


class GracefulStop(Callback):
    """Ctrl-C or SIGTERM finishes the step, writes `last.ckpt` and leaves; a second signal leaves at once.

    The step is finished when the next batch starts: what it logged is then written.
    """

    def __init__(self) -> None:
        self.signal: int | None = None
        self._before: dict[int, Any] = {}
        self._step = -1
        self._finished = False

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        # Lightning sets its handlers after this and takes them back before `teardown`; put back there, its
        # handler would swallow every later SIGTERM of this process
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        for number in self._before:
            signal.signal(number, self._note)

    def on_train_batch_start(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        finished, self._finished, self._step = self._finished, False, trainer.global_step
        if not finished:  # between accumulated batches: their gradient would be lost
            return
        asked = self.signal is not None
        if trainer.world_size > 1:  # all ranks or none; asked seldom, because it synchronises
            if trainer.global_step % _EVERY:
                return
            asked = trainer.strategy.reduce_boolean_decision(asked, all=False)
        if asked:
            self._leave(trainer)

    def on_train_batch_end(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._finished = trainer.global_step != self._step

    def teardown(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._restore()

    def on_exception(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, exception: BaseException
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None:
            raise Interrupted(128 + number)
        self.signal = number
        print("\nstopping after this step; again to stop at once", file=sys.stderr, flush=True)

    def _leave(self, trainer: pl.Trainer) -> None:
        saved = "nothing saved"
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, RunCheckpoint):
                callback.save_last_now(trainer)
                where = callback.last_model_path
                saved = f"saved {where}; go on with the same command and --ckpt_path last"
        if trainer.is_global_zero:
            print(f"stopped at step {trainer.global_step}: {saved}", file=sys.stderr, flush=True)
        raise Interrupted(128 + (self.signal or signal.SIGTERM))

    def _restore(self) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}


class Provenance(Callback):
    """Store settings, target and validation metrics in every checkpoint, so that a moved one is complete.

    Args:
        config: the resolved settings as YAML.
    """

    def __init__(self, config: str) -> None:
        self.config = config
        self.metrics: dict[str, float] = {}

    def on_validation_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not trainer.sanity_checking:
            values = trainer.callback_metrics.items()
            self.metrics = {k.removeprefix("val/"): float(v) for k, v in values if k.startswith("val/")}
            self.metrics["step"] = trainer.global_step

    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        meta = getattr(getattr(trainer, "datamodule", None), "meta", None)
        names = (
            "target", "target_revision", "weights_origin", "tokenizer_fingerprint", "vocab_size",
            "num_counted",
        )  # fmt: skip
        target = {} if meta is None else {name: getattr(meta, name, None) for name in names}
        checkpoint["certdraft"] = {"config": self.config, "target": target, "metrics": self.metrics}

    def on_load_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        self.metrics = checkpoint.get("certdraft", {}).get("metrics", {})


class RunFolder(Callback):
    """Write config.yaml, command.txt and run.yaml into the run's folder before the first step.

    Args:
        folder: the run's folder.
        config: the resolved settings as YAML.
        settings: the same as plain data; goes to W&B when it logs this run.
    """

    def __init__(self, folder: Path, config: str, settings: Mapping[str, Any]) -> None:
        self.folder, self.config, self.settings = folder, config, settings

    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        if not trainer.is_global_zero:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "config.yaml").exists():  # a resumed run keeps the settings it began with
            write_text(self.folder / "config.yaml", self.config)
        data = getattr(trainer, "datamodule", None)
        traces = {name: getattr(data, f"{name}_trace", None) for name in ("train", "validation")}
        write_part(self.folder, {name: trace.path for name, trace in traces.items() if trace is not None})
        for logger in trainer.loggers:
            if type(logger).__name__ == "WandbLogger" and (experiment := getattr(logger, "experiment", None)):
                experiment.config.update({"cli": self.settings}, allow_val_change=True)
        print(f"run folder: {self.folder}", file=sys.stderr)
        if stage == "fit" and (loss := getattr(pl_module, "loss", None)) is not None:
            decoder, weights = getattr(pl_module, "decoder", None), getattr(pl_module, "step_weights", None)
            unread = getattr(pl_module, "unread_decoder", None)
            for what, text in (
                ("decoder, not read because the config names a loss", unread), ("trained for", decoder),
                ("loss", loss), ("step weights", weights),
            ):  # fmt: skip
                if text is not None:
                    print(f"{what}: {text}", file=sys.stderr)

    def on_fit_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Say which checkpoint is best, and what to do with it."""
        saved = next((c for c in trainer.checkpoint_callbacks if isinstance(c, RunCheckpoint)), None)
        if not trainer.is_global_zero or saved is None:
            return
        if saved.best_model_score is not None:
            print(
                f"best: {saved.best_model_path}, {saved.monitor} {saved.best_model_score:.3f}",
                file=sys.stderr,
            )
        if hasattr(pl_module, "drafter"):
            print(f"next: certdraft export {self.folder}", file=sys.stderr)
