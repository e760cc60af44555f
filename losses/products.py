"""The matrix products of chunked evaluation: low-precision factors, fp32 results.

Only CUDA has products that read bf16 and write fp32; on a CPU everything is fp32 (or float64) from the start.
"""

from __future__ import annotations

import functools
import logging

import torch
from torch import Tensor

from certdraft.losses.coarse import work_dtype

_log = logging.getLogger(__name__)


def product_dtype(a: Tensor, b: Tensor, autocast: bool = False) -> torch.dtype:
    """What the products read: the wider of the two types (the autocast type if one is on); fp32 on a CPU."""
    device = a.device.type
    promoted = torch.promote_types(a.dtype, b.dtype)
    if autocast and torch.is_autocast_enabled(device):
        promoted = torch.get_autocast_dtype(device)
    return promoted if device == "cuda" else work_dtype(promoted)


def product(a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
    """a @ b with an fp32 (float64) result."""
    if a.dtype == work_dtype(a.dtype):
        return torch.mm(a, b, out=out)
    result = torch.mm(a, b, out_dtype=torch.float32)
    return result if out is None else out.copy_(result)


def accumulate_(total: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """total += a @ b, where total is fp32 whatever a and b are."""
    if a.dtype == total.dtype:
        return total.addmm_(a, b)
    if _adds_in_place(a.dtype, str(a.device)):
        return torch.addmm(total, a, b, out_dtype=total.dtype, out=total)
    return total.add_(product(a, b))


@functools.cache
def _adds_in_place(dtype: torch.dtype, device: str) -> bool:
    """Whether this torch adds a low-precision product to an fp32 matrix without a copy of it."""
    a, total = torch.ones(16, 16, dtype=dtype, device=device), torch.ones(16, 16, device=device)
    try:
        torch.addmm(total, a, a, out_dtype=torch.float32, out=total)
    except (RuntimeError, TypeError) as error:
        _log.warning("weight gradients need one more copy: this torch refuses a fused product (%s)", error)
        return False
    return bool((total == 17).all())
