"""The work between the matrix products: logits of a chunk in, per-step loss and logit gradient out.

What is done depends on how the loss looks at a step; the logits are overwritten.

| the loss | here |
|---|---|
| sees the head or a token | `split_` (a pass), the loss on its K + 1 classes by autograd, `join_` (a pass) |
| is `ForwardKL` over the full vocabulary | `forward_kl_`: closed form, each exponential taken once |
| is a `Mixture` whose parts look differently | each part on its own copy of the logits, gradients added |
| is anything else | its own autograd inside the chunk |

These functions are the readable path, and the one for CPUs. A `Kernels` value says which are used;
`losses.kernels` has one for CUDA. Axes: C steps of a chunk · V vocabulary · K head entries.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from certdraft.certificates import Head, largest
from certdraft.losses.base import Loss, classes
from certdraft.losses.chunks.fp32_matmul import product, product_dtype
from certdraft.losses.coarse_logits import NEVER, join_, split_, tile_rows, work_dtype
from certdraft.losses.discounted import DiscountedCE
from certdraft.losses.imitation import ForwardKL
from certdraft.losses.mixture import Mixture
from certdraft.losses.target import OnlineTarget, TargetBatch

Gradient = tuple[Tensor, Tensor | None]


def forward_kl_(
    logits: Float[Tensor, "C V"],
    target_logits: Float[Tensor, "C V"],
    coefficient: Float[Tensor, " C"] | None,
    dtype: torch.dtype,
) -> Gradient:
    """KL(p‖q) of every step and coefficient · (q − p); both arguments are overwritten."""
    value = logits.new_empty(len(logits))
    size = tile_rows(logits)
    p = logits.new_empty(min(size, len(logits)), logits.shape[-1])
    for start in range(0, len(logits), size):
        rows = slice(start, start + size)
        logq = torch.log_softmax(logits[rows], -1, out=logits[rows])
        logp = torch.log_softmax(target_logits[rows], -1, out=target_logits[rows])
        torch.exp(logp, out=p[: len(logp)])
        value[rows] = torch.linalg.vecdot(p[: len(logp)], logp.sub_(logq))
        if coefficient is not None:
            logq.exp_().sub_(p[: len(logp)]).mul_(coefficient[rows, None])
    return value, None if coefficient is None else logits.to(dtype)


def joined_(
    buffer: Float[Tensor, "C V"],
    total: Float[Tensor, "C 1"],
    ids: Int[Tensor, "C K"],
    grad: Float[Tensor, "C D"],
    dtype: torch.dtype,
) -> Float[Tensor, "C V"]:
    """`join_`, rounded once to the type of the products."""
    return join_(buffer, total, ids, grad).to(dtype)


@dataclass(frozen=True)
class Kernels:
    """One implementation of the row work.

    Args:
        name: "torch" or "triton".
        split_: as `coarse_logits.split_`.
        joined_: as `joined_`.
        forward_kl_: as `forward_kl_`.
        discounted_: a whole `DiscountedCE` in one go, where there is one.
    """

    name: str
    split_: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    joined_: Callable[[Tensor, Tensor, Tensor, Tensor, torch.dtype], Tensor]
    forward_kl_: Callable[[Tensor, Tensor, Tensor | None, torch.dtype], Gradient]
    discounted_: Callable[[Tensor, Tensor, Tensor, Tensor | None, torch.dtype], Gradient] | None = None


TORCH = Kernels("torch", split_, joined_, forward_kl_)


def row_work(
    loss: Loss,
    logits: Float[Tensor, "C V"],
    rows: TargetRows,
    coefficient: Float[Tensor, " C"] | None,
    kernels: Kernels,
    dtype: torch.dtype,
) -> Gradient:
    """Per-step loss [C] and, given coefficients, coefficient · gradient in the logits [C, V].

    The logits are overwritten.
    """
    if loss.overrides_forward:
        return differentiate(loss, logits, rows.batch(full=True), coefficient, dtype)
    view = loss.view(rows.target)
    if view == "full" and type(loss) is ForwardKL and rows.target.has_full:
        result = kernels.forward_kl_(logits, rows.logits().to(logits.dtype), coefficient, dtype)
        rows.used()
        return result
    if view == "full" and isinstance(loss, Mixture) and type(loss).on_full is Mixture.on_full:
        return _parts(loss, logits, rows, coefficient, kernels, dtype)
    target = rows.batch(full=view == "full")
    loss.check(logits, target)
    if view not in ("head", "token"):
        return differentiate(loss, logits, target, coefficient, dtype)
    ids = classes(view, target)
    if kernels.discounted_ is not None and isinstance(loss, DiscountedCE):
        if type(loss).on_coarse is DiscountedCE.on_coarse:
            return kernels.discounted_(logits, ids, loss.discount(target), coefficient, dtype)
    coarse, total = kernels.split_(logits, ids)
    value, gradient = differentiate(loss.on_coarse, coarse, target, coefficient, coarse.dtype)
    if gradient is not None:
        gradient = kernels.joined_(logits, total, ids, gradient, dtype)
    return value, gradient


def _parts(
    loss: Mixture,
    logits: Tensor,
    rows: TargetRows,
    coefficient: Tensor | None,
    kernels: Kernels,
    dtype: torch.dtype,
) -> Gradient:
    """Every part on its own copy of the logits; full views last, because they overwrite the target's."""
    terms = sorted(loss.terms(), key=lambda term: term[1].view(rows.target) == "full")
    values: list[Tensor] = []
    gradients: list[Tensor] = []
    for place, (weight, part) in enumerate(terms):
        last = place == len(terms) - 1
        given = None if coefficient is None else weight * coefficient
        own = logits if last else logits.clone()
        value, gradient = row_work(part, own, rows, given, kernels, logits.dtype)
        values.append(weight * value)
        if gradient is not None:
            gradients = [gradients[0].add_(gradient)] if gradients else [gradient]
    return torch.stack(values).sum(0), gradients[0].to(dtype) if gradients else None


def differentiate(
    function: Callable[[Tensor, TargetBatch], Tensor],
    seen: Tensor,
    target: TargetBatch,
    coefficient: Tensor | None,
    dtype: torch.dtype,
) -> Gradient:
    """Value and coefficient · gradient of a per-step function by its own autograd."""
    if coefficient is None:
        return function(seen, target), None
    with torch.enable_grad():
        leaf = seen.detach().requires_grad_()
        value = function(leaf, target)
        (gradient,) = torch.autograd.grad(value, leaf, coefficient)
    return value.detach(), gradient.to(dtype)


class TargetRows:
    """The target at the token positions of the current chunk.

    Args:
        target: the whole target.
        size: most steps of a chunk.
    """

    def __init__(self, target: TargetBatch | OnlineTarget, size: int) -> None:
        self.target = target
        self._rows = slice(0, 0)
        self._fresh = False  # the buffer holds the logits of these rows
        self._head: Head | None = None
        self._buffer = torch.empty(0)
        if isinstance(target, OnlineTarget):
            dtype = product_dtype(target.hidden, target.weight)
            self._weight = target.weight.to(dtype).t()
            self._buffer = target.hidden.new_empty(size, target.vocab_size, dtype=work_dtype(dtype))

    def move_to(self, rows: slice) -> None:
        """Move to these positions."""
        self._rows, self._fresh, self._head = rows, False, None

    def logits(self) -> Float[Tensor, "C V"]:
        """The target's logits, up to a constant; the caller may overwrite them (`used`)."""
        if isinstance(self.target, TargetBatch):
            assert self.target.logp is not None
            return self.target.logp[self._rows].clamp(min=NEVER)
        if not self._fresh:
            hidden = self.target.hidden[self._rows].to(self._weight.dtype)
            logits = self._buffer[: len(hidden)]
            product(hidden, self._weight, out=logits)
            if self.target.bias is not None:
                logits += self.target.bias
            self._fresh = True
        return self._buffer[: self._rows.stop - self._rows.start]

    def used(self) -> None:
        """Note that the caller has overwritten `logits`."""
        self._fresh = False

    def batch(self, full: bool) -> TargetBatch:
        """The steps as a TargetBatch, with the full distribution if it is wanted and there is one."""
        target = self.target
        if isinstance(target, TargetBatch):
            return target[self._rows]
        if self._head is None:
            self._head = self._cut(target.k)
        logp = self.logits().log_softmax(-1) if full and target.full else None
        return TargetBatch(self._head, logp, **target.by_step(self._rows))

    def _cut(self, k: int) -> Head:
        """The head of the current logits, as `Head.from_logits` makes it, but for the entropy."""
        logits = self.logits()
        top, ids = largest(logits, min(k, logits.shape[-1]))
        lse_gap = logits.new_empty(len(logits))
        size = tile_rows(logits)
        for start in range(0, len(logits), size):
            rows = slice(start, start + size)
            others = (logits[rows] - top[rows, :1]).exp_()
            # the greedy token is left out of the sum, so that a confident step keeps its small tail
            lse_gap[rows] = others.scatter_(-1, ids[rows, :1], 0.0).sum(-1).log1p()
        if lse_gap.device.type == "cpu" and not bool(lse_gap.isfinite().all()):
            row = self._rows.start + int((~lse_gap.isfinite()).nonzero()[0])
            raise ValueError(f"the target's logits hold NaN or infinity at step {row} of the batch")
        return Head(ids, top[:, :1] - top, lse_gap, logits.shape[-1])
