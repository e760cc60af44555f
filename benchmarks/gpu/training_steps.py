"""Training steps of every drafter kind: tokens/s, synchronisations, memory."""

from __future__ import annotations

import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from planned import beside_plan, expected
from work import Meter, Size, drafters, traced

from certdraft import DrafterModule, TraceDataModule
from certdraft.drafters import BlockConfig, Drafter, DSparkConfig, EagleConfig, drafter_kinds
from certdraft.losses import ForwardKL, HardCE, Mixture
from certdraft.train import TargetSettings


class Steps(pl.Callback):
    """Seconds of training steps once their batch is there; synchronisations since the step before.

    Args:
        meter: of the device.
    """

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.seconds: list[float] = []
        self.syncs: list[int] = []

    def on_train_start(self, *_: Any) -> None:
        self._listen()

    def on_train_batch_start(self, *_: Any) -> None:
        self._warn(False)  # of this wait
        self.meter.wait()
        self._warn(True)
        self.begin = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self._hush()
        self.syncs.append(sum("synchroniz" in str(entry.message) for entry in self.log))
        self.meter.wait()
        self.seconds.append(time.perf_counter() - self.begin)
        self._listen()  # to the fetching of the next batch too

    def on_train_end(self, *_: Any) -> None:
        self._hush()

    def _listen(self) -> None:
        self.caught = warnings.catch_warnings(record=True)
        self.log = self.caught.__enter__()
        warnings.simplefilter("always")
        self._warn(True)

    def _hush(self) -> None:
        self._warn(False)
        self.caught.__exit__(None, None, None)

    def _warn(self, on: bool) -> None:
        if self.meter.cuda:
            torch.cuda.set_sync_debug_mode("warn" if on else "default")


def make_drafter(settings: dict[str, Any]) -> Drafter:
    """Make a drafter from `class_path` and `init_args`."""
    kinds: dict[str, Any] = {kind.__name__: kind for kind in drafter_kinds().values()}
    configs: dict[str, Any] = {
        "EagleDrafter": EagleConfig, "BlockDrafter": BlockConfig, "DSparkDrafter": DSparkConfig
    }  # fmt: skip
    name, init = settings["class_path"], dict(settings["init_args"])
    if name in configs:
        init["config"] = configs[name](**init["config"])
    drafter: Drafter = kinds[name](**init)
    return drafter


def run_train(size: Size, folder: Path, meter: Meter) -> dict[str, Any]:
    """Train every drafter kind for a few steps under bf16-mixed."""
    trace = traced(size, folder, meter)
    found: dict[str, Any] = {}
    for name, chosen in drafters(size).items():
        drafter = make_drafter(chosen)
        data = TraceDataModule(
            str(trace), validation_fraction=0.2, seq_len=size.seq_len, batch_size=size.rows
        )
        settings = (
            TargetSettings(str(folder / "target"), dtype="bfloat16", logits=False) if drafter.taps else None
        )
        module = DrafterModule(drafter, Mixture([HardCE(), ForwardKL()], [0.5, 0.5]), target=settings)
        steps = Steps(meter)
        trainer = pl.Trainer(
            accelerator="gpu" if meter.cuda else "cpu", devices=1, precision="bf16-mixed",
            max_steps=size.steps + 2, limit_val_batches=0, num_sanity_val_steps=0, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[steps],
        )  # fmt: skip
        peak = meter.peak_gib(lambda t=trainer, m=module, d=data: t.fit(m, datamodule=d))
        timed, syncs = sorted(steps.seconds[2:]), sorted(steps.syncs[2:])  # the first two do not count
        planned = expected(size, folder, chosen, beside=settings is not None).train
        found[name] = {
            "trainable": sum(p.numel() for p in drafter.parameters() if p.requires_grad),
            "tokens_per_s": size.rows * size.seq_len / timed[len(timed) // 2],
            "syncs_a_step": syncs[len(syncs) // 2] if meter.cuda else None,
        } | beside_plan(peak, planned)
    return found
