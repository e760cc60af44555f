"""The CPU of this machine as a `Device`: its memory read, its speed measured in half a second."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import torch

from certdraft.train.plan.formulas import GB, Device

_SIDE = 1024  # of the square matrices that are multiplied
_BYTES = 1 << 27  # copied to measure the bandwidth, more than any cache holds


def measured_cpu(precision: str) -> Device:
    """Measure one matrix product in the dtype that `precision` multiplies in, and one copy."""
    dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float32
    factor = torch.randn(_SIDE, _SIDE).to(dtype)
    product_s = _best(lambda: factor @ factor)
    source = torch.zeros(_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy_s = _best(lambda: target.copy_(source))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(
        memory_gb=memory / GB,
        bf16_tflops=2 * _SIDE**3 / product_s / 1e12,
        bandwidth_gb_s=2 * _BYTES / copy_s / GB,
        kind="cpu",
        overhead_gb=0.8,
        overhead="Python, libraries, fragmentation",
    )


def _best(work: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest of some calls; the first one, which warms up, is not counted."""
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    return min(seconds)
