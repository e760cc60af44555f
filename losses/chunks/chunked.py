"""Any loss from hidden states and output weights, without ever holding the [N, V] logits.

    chunked(hidden, weight, target)   is   reduce(loss(hidden @ weight.T, target))   in a few [C, V] chunks.

For a mean or a sum the coefficient of every step is known beforehand, so each chunk's gradient is taken while
its logits exist and backward only scales: the three GEMMs are done once. For reduction="none" the
coefficients arrive with backward, which therefore walks the chunks a second time. Logits are fp32 and the
weight gradient is accumulated in fp32 whatever the inputs are; bf16 inputs are rounded once more, in dz, for
the two gradient GEMMs on CUDA. fp16 has no room for dz, a step's share of a mean over thousands (and
loss scaling comes later, in backward), so fp16 inputs are multiplied in fp32.

One [C, V] buffer serves all chunks; what happens to it between the products is in `chunk_backward`. A loss of
a few logits (`SparseLoss`) needs only the first product.
Axes: N steps · V vocabulary · H hidden · C chunk.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from certdraft.losses.base import Loss
from certdraft.losses.certificate_losses import SparseLoss
from certdraft.losses.chunks.chunk_backward import Kernels, TargetRows, differentiate, row_work
from certdraft.losses.chunks.fp32_matmul import accumulate_, product, product_dtype
from certdraft.losses.coarse_logits import ABSENT, work_dtype
from certdraft.losses.kernels import Backend, choose_kernels
from certdraft.losses.reduction import Reduction, step_coefficients
from certdraft.losses.target import OnlineTarget, TargetBatch

# fp32 logits of a chunk: 24 MiB suits a CPU's caches; on a GPU those of both models get 1.25 GB.
_CPU_BLOCK_BYTES = 24 * 2**20
_GPU_BUDGET_BYTES = 1_250_000_000


def auto_chunk_tokens(vocab_size: int, device_type: str) -> int:
    """Steps per chunk: 24 MiB of logits on a CPU, else clamp(1.25 GB/(8 V), 512, 2048) in multiples of 128.

    On an accelerator, below ~700 steps the traffic of the fp32 weight gradient is more than GEMMs can hide.
    """
    if device_type == "cpu":
        return min(max(_CPU_BLOCK_BYTES // (4 * vocab_size), 32), 2048)
    return min(max(_GPU_BUDGET_BYTES // (8 * vocab_size), 512), 2048) // 128 * 128


@dataclass(frozen=True)
class _Plan:
    loss: Loss
    target: TargetBatch | OnlineTarget
    chunk_tokens: int
    dtype: torch.dtype  # what the products read
    kernels: Kernels


class _Chunk(NamedTuple):
    """Some steps: logits, target, coefficients, hidden states, and where the gradient of those goes."""

    logits: Tensor
    target: TargetRows
    coefficient: Tensor | None
    hidden: Tensor
    d_hidden: Tensor | None


@torch.no_grad()
def _walk(
    plan: _Plan, hidden: Tensor, weight: Tensor, coefficient: Tensor | None, needs: tuple[bool, bool]
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Per-step loss [N], and with coefficients the gradients of hidden [N, H] and weight [V, H]."""
    with torch.autocast(hidden.device.type, enabled=False):
        dtype = work_dtype(plan.dtype)
        w = weight.to(plan.dtype)
        size = min(plan.chunk_tokens, len(hidden))
        buffer = torch.empty(size, plan.target.vocab_size, dtype=dtype, device=hidden.device)
        per_step = torch.zeros(len(hidden), dtype=dtype, device=hidden.device)
        d_hidden = None
        if coefficient is not None and needs[0]:
            d_hidden = torch.zeros_like(hidden, dtype=dtype if hidden.dtype == torch.float16 else None)
        d_weight = torch.zeros_like(w, dtype=dtype) if coefficient is not None and needs[1] else None
        target = TargetRows(plan.target, size)
        sparse = isinstance(plan.loss, SparseLoss) and not plan.loss.overrides_forward
        work = _sparse_chunk if sparse else _dense_chunk
        for start in range(0, len(hidden), max(size, 1)):
            rows = slice(start, min(start + size, len(hidden)))
            h = hidden[rows].to(plan.dtype)
            logits = buffer[: len(h)]
            product(h, w.t(), out=logits[:, : len(w)])
            logits[:, len(w) :] = ABSENT
            given = None if coefficient is None else coefficient[rows].to(dtype)
            target.move_to(rows)
            d_h = None if d_hidden is None else d_hidden[rows]
            per_step[rows] = work(plan, _Chunk(logits, target, given, h, d_h), w, d_weight)
    return per_step, d_hidden, d_weight


def _dense_chunk(plan: _Plan, chunk: _Chunk, w: Tensor, d_weight: Tensor | None) -> Tensor:
    """Loss of the chunk's steps; their gradient goes into d_h and d_weight by two products."""
    value, dz = row_work(plan.loss, chunk.logits, chunk.target, chunk.coefficient, plan.kernels, plan.dtype)
    dz = None if dz is None else dz[:, : len(w)]
    if dz is not None and chunk.d_hidden is not None:
        chunk.d_hidden.copy_(torch.mm(dz, w))
    if dz is not None and d_weight is not None:
        accumulate_(d_weight, dz.t(), chunk.hidden)
    return value


def _sparse_chunk(plan: _Plan, chunk: _Chunk, w: Tensor, d_weight: Tensor | None) -> Tensor:
    """The same for a loss of a few logits: rows of the output layer are gathered, nothing is multiplied."""
    logits, seen = chunk.logits, chunk.target.batch(full=False)
    plan.loss.check(logits, seen)
    ids = plan.loss.pick(logits, seen)
    picked = logits.gather(-1, ids)
    value, dz = differentiate(plan.loss.on_picked, picked, seen, chunk.coefficient, logits.dtype)
    if dz is not None:
        dz, ids = dz.masked_fill(ids >= len(w), 0.0), ids.clamp(max=len(w) - 1)
    if dz is not None and chunk.d_hidden is not None:
        chunk.d_hidden.copy_(torch.einsum("cs,csh->ch", dz, w[ids].to(dz.dtype)))
    if dz is not None and d_weight is not None:
        rows = dz.unsqueeze(-1) * chunk.hidden.to(dz.dtype).unsqueeze(1)
        d_weight.index_add_(0, ids.flatten(), rows.flatten(0, 1).to(d_weight.dtype))
    return value


class _Reduced(torch.autograd.Function):
    """Σ coefficient · loss; gradients are made in forward and scaled in backward."""

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, coefficient: Tensor, plan: _Plan, with_grad: bool
    ) -> Tensor:
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        given = coefficient if with_grad and any(needs) else None
        per_step, d_hidden, d_weight = _walk(plan, hidden, weight, given, needs)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtypes = hidden.dtype, weight.dtype
        return (per_step * coefficient).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = _scaled(d_hidden, grad).to(ctx.dtypes[0])
        if d_weight is not None:
            d_weight = _scaled(d_weight, grad).to(ctx.dtypes[1])
        return d_hidden, d_weight, None, None, None


def _scaled(gradient: Tensor, grad: Tensor) -> Tensor:
    """gradient · grad; over the gradient itself when the graph is freed after this backward."""
    kept = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    grad = grad.to(gradient.dtype)
    return gradient * grad if kept is None or kept() else gradient.mul_(grad)


class _PerStep(torch.autograd.Function):
    """Per-step losses; backward recomputes the chunks with the coefficients it is given."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, plan: _Plan) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        ctx.plan = plan
        return _walk(plan, hidden, weight, None, (False, False))[0]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight = ctx.saved_tensors
        needs = (ctx.needs_input_grad[0], ctx.needs_input_grad[1])
        _, d_hidden, d_weight = _walk(ctx.plan, hidden, weight, grad, needs)
        return (
            None if d_hidden is None else d_hidden.to(hidden.dtype),
            None if d_weight is None else d_weight.to(weight.dtype),
            None,
        )


class Chunked(nn.Module):
    """A loss evaluated in chunks of steps: same numbers and gradients as on the full logits, O(C · V) memory.

    Args:
        loss: any loss of this package, without trainable parameters.
        reduction: "mean" (by the sum of counted weights), "sum", or "none"; see `losses.reduction`.
        chunk_tokens: steps per chunk; None chooses by vocabulary and device (`auto_chunk_tokens`).
        backend: "torch" is the readable path; "triton" the fused kernels, for CUDA; "auto" takes them on CUDA
            where triton is installed. Both give the same numbers up to rounding.
    """

    def __init__(
        self,
        loss: Loss,
        reduction: Reduction = "mean",
        chunk_tokens: int | None = None,
        backend: Backend = "auto",
    ) -> None:
        super().__init__()
        if backend not in ("auto", "torch", "triton"):
            raise ValueError(f"Chunked: backend={backend!r}; choose auto, torch or triton.")
        if reduction not in ("none", "mean", "sum"):
            raise ValueError(f"Chunked: reduction={reduction!r}; choose none, mean or sum.")
        if chunk_tokens is not None and chunk_tokens < 1:
            raise ValueError(f"Chunked: chunk_tokens={chunk_tokens} must be at least 1.")
        if any(True for _ in loss.parameters()):
            raise ValueError(f"Chunked: {loss!r} has parameters; their gradient would be lost.")
        self.loss, self.reduction, self.chunk_tokens = loss, reduction, chunk_tokens
        self.backend: Backend = backend

    def forward(
        self,
        hidden: Float[Tensor, "N H"],
        weight: Float[Tensor, "V H"],
        target: TargetBatch | OnlineTarget,
        mask: Bool[Tensor, " N"] | None = None,
        step_weight: Float[Tensor, " N"] | None = None,
        denominator: float | Tensor | None = None,
    ) -> Tensor:
        """Reduced loss, or [N] weighted per-step losses for reduction="none" (0 off the mask).

        Args:
            hidden: the drafter's last hidden states.
            weight: its output embedding, no bias.
            target: the target at the same N steps.
            mask: True = the step counts; others are dropped before the first GEMM.
            step_weight: weights of the steps, no gradient.
            denominator: see `step_coefficients`.

        Raises:
            ValueError: shapes disagree, or the loss refuses the target.
        """
        if len(weight) + target.num_absent != target.vocab_size:
            raise ValueError(
                f"Chunked: the drafter has {len(weight)} tokens in its vocabulary, the target "
                f"{target.vocab_size}. Both must use the same tokenizer and padding of the output layer."
            )
        if hidden.dim() != 2 or len(hidden) != len(target) or weight.shape[1:] != hidden.shape[1:]:
            raise ValueError(
                f"Chunked: hidden {list(hidden.shape)}, weight {list(weight.shape)} and a target of "
                f"{len(target)} steps do not fit; expected [N, H], [V, H] and N steps."
            )
        num_steps = len(hidden)
        if mask is not None:
            hidden, target = hidden[mask], target.select(mask)
            step_weight = None if step_weight is None else step_weight[mask]
        dtype = product_dtype(hidden, weight, gradients=True)
        kernels = choose_kernels(self.backend, hidden.device, work_dtype(dtype))
        plan = _Plan(self.loss, target, self._chunk(weight), dtype, kernels)
        like = hidden.new_empty(len(hidden), dtype=work_dtype(dtype))
        coefficient = step_coefficients(None, step_weight, self.reduction, like, denominator)
        if self.reduction != "none":
            return _Reduced.apply(hidden, weight, coefficient, plan, torch.is_grad_enabled())
        per_step = _PerStep.apply(hidden, weight, plan) * coefficient
        return per_step if mask is None else per_step.new_zeros(num_steps).masked_scatter(mask, per_step)

    def _chunk(self, weight: Tensor) -> int:
        return self.chunk_tokens or auto_chunk_tokens(len(weight), weight.device.type)

    def extra_repr(self) -> str:
        return f"reduction={self.reduction!r}, chunk_tokens={self.chunk_tokens or 'auto'}"
