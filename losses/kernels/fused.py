"""Launch the Triton kernels of `jitted` in place of `chunk_backward`: allocation, grids and strides.

Axes: C steps of a chunk · V vocabulary · K head entries.
"""

from __future__ import annotations

import torch
from torch import Tensor

from certdraft.losses.chunks.chunk_backward import Gradient, Kernels
from certdraft.losses.kernels.jitted import make_jitted

_BLOCK = 4096  # entries a program looks at together
_WARPS = 8


def make_kernels() -> Kernels:
    """Import triton and wrap its kernels."""
    jitted = make_jitted()

    def split_(buffer: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        """`coarse_logits.split_`; instead of exponentials the logits stay, with −inf in the head."""
        steps, vocab_size = buffer.shape
        kept, ids = ids.shape[1], ids.contiguous()  # a truncated head is a view of a longer one
        coarse = buffer.new_empty(steps, kept + (kept < vocab_size))
        rest = buffer.new_empty(steps, 1)
        jitted["split"][(steps,)](
            buffer, ids, coarse, rest, buffer.stride(0), coarse.stride(0), vocab_size, kept,
            KP=_power(kept), TAIL=kept < vocab_size, BLOCK=_block(vocab_size), num_warps=_WARPS,
        )  # fmt: skip
        return coarse, rest

    def joined_(buffer: Tensor, rest: Tensor, ids: Tensor, grad: Tensor, dtype: torch.dtype) -> Tensor:
        """`chunk_backward.joined_`, from what `split_` left."""
        steps, vocab_size = buffer.shape
        kept, ids, grad = ids.shape[1], ids.contiguous(), grad.contiguous()
        out = _out(buffer, dtype)
        jitted["join"][(steps,)](
            buffer, ids, rest, grad, out, buffer.stride(0), grad.stride(0), out.stride(0), vocab_size, kept,
            KP=_power(kept), TAIL=kept < vocab_size, BLOCK=_block(vocab_size), num_warps=_WARPS,
        )  # fmt: skip
        return out

    def discounted_(
        logits: Tensor, ids: Tensor, weight: Tensor, coefficient: Tensor | None, dtype: torch.dtype
    ) -> Gradient:
        """Per-step loss and gradient of a `DiscountedCE` with these weights."""
        steps, vocab_size = logits.shape
        value, ids, weight = logits.new_empty(steps), ids.contiguous(), weight.to(logits.dtype).contiguous()
        out = logits if coefficient is None else _out(logits, dtype)
        jitted["discounted"][(steps,)](
            logits, ids, weight, value if coefficient is None else coefficient, value, out,
            logits.stride(0), out.stride(0), vocab_size, ids.shape[1],
            KP=_power(ids.shape[1]), GRAD=coefficient is not None, BLOCK=_block(vocab_size), num_warps=_WARPS,
        )  # fmt: skip
        return value, None if coefficient is None else out

    def forward_kl_(
        logits: Tensor, target_logits: Tensor, coefficient: Tensor | None, dtype: torch.dtype
    ) -> Gradient:
        """`chunk_backward.forward_kl_`; the target's logits are not overwritten."""
        steps, vocab_size = logits.shape
        value = logits.new_empty(steps)
        out = logits if coefficient is None else _out(logits, dtype)
        jitted["forward_kl"][(steps,)](
            logits, target_logits, value if coefficient is None else coefficient, value, out,
            logits.stride(0), target_logits.stride(0), out.stride(0), vocab_size,
            GRAD=coefficient is not None, BLOCK=_block(vocab_size), num_warps=_WARPS,
        )  # fmt: skip
        return value, None if coefficient is None else out

    return Kernels("triton", split_, joined_, forward_kl_, discounted_)


def _out(logits: Tensor, dtype: torch.dtype) -> Tensor:
    """Where the gradient goes: over the logits, unless it has another type."""
    return logits if dtype == logits.dtype else torch.empty_like(logits, dtype=dtype)


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _block(vocab_size: int) -> int:
    return min(_BLOCK, max(_power(vocab_size), 16))
