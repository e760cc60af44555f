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

from certdraft.losses.base import Loss, classes
from certdraft.losses.chunks.target_chunks import TargetRows
from certdraft.losses.coarse_logits import join_, split_, tile_rows
from certdraft.losses.imitation.divergence_losses import ForwardKL
from certdraft.losses.mixture import Mixture
from certdraft.losses.surrogates.discounted import DiscountedCE
from certdraft.losses.target import TargetBatch

Gradient = tuple[Tensor, Tensor | None]


def forward_kl_(
    logits: Float[Tensor, "C V"],
    target_logits: Float[Tensor, "C V"],
    coefficient: Float[Tensor, " C"] | None,
    dtype: torch.dtype,
) -> Gradient:
    """KL(p‖q) of every step and coefficient · (q − p); both arguments are overwritten.

    Args:
        logits: the drafter's, finite.
        target_logits: the target's, up to a constant, finite.
        coefficient: what each step's loss is multiplied with; None when no gradient is wanted.
        dtype: of the gradient.
    """
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
        split_: as `coarse.split_`.
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

    Args:
        loss: any loss.
        logits: the drafter's at the steps of the chunk, fp32 or float64; overwritten.
        rows: the target, moved to these steps.
        coefficient: what each step's loss is multiplied with; None when no gradient is wanted.
        kernels: the implementation.
        dtype: of the gradient.
    """
    view = loss.view(rows.target)
    if view == "full" and type(loss) is ForwardKL and rows.target.has_full:
        result = kernels.forward_kl_(logits, rows.logits().to(logits.dtype), coefficient, dtype)
        rows.used()
        return result
    if view == "full" and isinstance(loss, Mixture):
        return _parts(loss, logits, rows, coefficient, kernels, dtype)
    target = rows.batch(full=view == "full")
    loss.check(logits, target)
    if view not in ("head", "token"):
        return differentiate(loss, logits, target, coefficient, dtype)
    ids = classes(view, target)
    if kernels.discounted_ is not None and isinstance(loss, DiscountedCE):
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
