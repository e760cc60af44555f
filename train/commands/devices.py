"""Whether this machine has the devices that a run asks for."""

from __future__ import annotations

import os
import time
from typing import Any, Literal

import torch
from torch.nn import functional as F


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


@torch.inference_mode()
def faster_dtype() -> Literal["bfloat16", "float32"]:
    """Which dtype this CPU multiplies matrices in faster, by timing both for some hundredths of a second.

    Without bfloat16 instructions (AVX2 alone) a product in bfloat16 takes several times as long.
    """
    seconds = {}
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight = torch.ones(64, 576, dtype=dtype), torch.ones(1536, 576, dtype=dtype)
        times = []
        for _ in range(6):  # the fastest: others are disturbed, and the first warms up
            begin = time.perf_counter()
            F.linear(hidden, weight)
            times.append(time.perf_counter() - begin)
        seconds[dtype] = min(times)
    return "bfloat16" if seconds[torch.bfloat16] <= seconds[torch.float32] else "float32"


def _has_gpu() -> bool:
    return torch.cuda.is_available() or torch.backends.mps.is_available()
