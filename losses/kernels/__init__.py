"""Fused row work for CUDA, and the choice between it and the readable path."""

from __future__ import annotations

import functools
import importlib.util
from typing import Literal

import torch

from certdraft.losses.chunks.chunk_backward import TORCH, Kernels

Backend = Literal["auto", "torch", "triton"]


@functools.cache
def _triton() -> Kernels:
    from certdraft.losses.kernels.fused import make_kernels

    return make_kernels()


def choose_kernels(backend: Backend, device: torch.device, dtype: torch.dtype = torch.float32) -> Kernels:
    """The row work of a backend.

    Args:
        backend: "torch", "triton", or "auto": triton on CUDA where it is installed.
        device: where the logits are.
        dtype: of the logits; the kernels know fp32 only.

    Raises:
        ValueError: triton was asked for by name and is not installed, or the logits are float64.
    """
    installed = importlib.util.find_spec("triton") is not None
    if backend == "triton" and not installed:
        raise ValueError(
            "backend='triton' needs the triton package (pip install triton); backend='torch' gives the same "
            "numbers without it."
        )
    if backend == "triton" and dtype != torch.float32:
        raise ValueError("backend='triton' computes in fp32; take backend='torch' for float64.")
    usable = installed and dtype == torch.float32
    if backend == "torch" or not usable or (backend == "auto" and device.type != "cuda"):
        return TORCH
    return _triton()
