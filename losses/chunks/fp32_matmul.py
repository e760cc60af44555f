"""The matrix products of chunked evaluation: low-precision factors, fp32 results.

Only CUDA has products that read bf16 and write fp32; on a CPU everything is fp32 (or float64) from the start.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from certdraft.losses.coarse_logits import work_dtype

_log = logging.getLogger(__name__)


def product_dtype(a: Tensor, b: Tensor, gradients: bool = False) -> torch.dtype:
    """What the products read: the wider of the two types; fp32 on a CPU.

    Args:
        a: left factor.
        b: right factor.
        gradients: those of a model in training, whose gradients are products too: the autocast type if one is
            on, but never fp16, whose range loses them.
    """
    device = a.device.type
    promoted = torch.promote_types(a.dtype, b.dtype)
    if gradients and torch.is_autocast_enabled(device):
        promoted = torch.get_autocast_dtype(device)
    if gradients and promoted == torch.float16:
        return torch.float32
    return promoted if device == "cuda" else work_dtype(promoted)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b with an fp32 (float64) result."""
    if a.dtype == work_dtype(a.dtype):
        return torch.mm(a, b, out=out)
    if out is None:
        return torch.mm(a, b, out_dtype=torch.float32)
    if out.is_contiguous() and _writes_fp32(a.dtype, str(a.device)):
        return torch.mm(a, b, out_dtype=out.dtype, out=out)
    return out.copy_(torch.mm(a, b, out_dtype=torch.float32))


def accumulate_(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total += a @ b, where total is fp32 whatever a and b are."""
    if a.dtype == total.dtype:
        return total.addmm_(a, b)
    if _writes_fp32(a.dtype, str(a.device)):
        return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    return total.add_(torch.mm(a, b, out_dtype=torch.float32))


@functools.cache
def _writes_fp32(dtype: torch.dtype, device: str) -> bool:
    """Whether this torch writes and adds low-precision products into an fp32 matrix without a copy."""
    ones = torch.ones(16, 16, dtype=dtype, device=device)
    total = torch.full((16, 16), torch.nan, device=device)
    try:
        torch.mm(ones, ones, out_dtype=torch.float32, out=total)
        torch.addmm(total, ones, ones, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError) as error:
        _log.warning("chunked losses need more memory: this torch copies fp32 products (%s)", error)
        return False
    return bool((total == 32).all())
