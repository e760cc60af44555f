"""Whether this machine has the devices that a run asks for."""

from __future__ import annotations

import os
from typing import Any

import torch


def lacks_gpu(accelerator: Any) -> bool:
    """Whether `trainer.accelerator` names a GPU and torch sees none here."""
    return accelerator in ("gpu", "cuda", "mps") and not _has_gpu()


def check_devices(accelerator: Any, devices: Any) -> None:
    """Refuse a GPU that is not there, and many more processes than a CPU has cores.

    Each device of a CPU run is a process with its own model: dozens of them fill a machine's memory.
    """
    if lacks_gpu(accelerator):
        raise ValueError(
            f"trainer.accelerator {accelerator}: torch {torch.__version__} sees no GPU here (`certdraft "
            "doctor`). On a CPU: --trainer.accelerator cpu --trainer.devices 1, or begin with `certdraft fit "
            "--config demo`"
        )
    num_processes = int(devices) if str(devices).isdigit() else 1
    num_cores = os.cpu_count() or 1
    on_cpu = accelerator == "cpu" or (accelerator == "auto" and not _has_gpu())
    if on_cpu and num_processes > max(2, num_cores):
        raise ValueError(
            f"trainer.devices {devices}: on a CPU that is {devices} processes, and this machine has "
            f"{num_cores} cores; leave it at 1, which uses all of them"
        )


def _has_gpu() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()
