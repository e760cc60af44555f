"""Logits in fp32: the one projection behind every margin, greedy token and certificate.

A bf16 logit between 16 and 32 is a multiple of 1/8, so bf16 logits tie, and their argmax and margins are not
those of the model. Recording, online targets, validation, evaluation and decoding all project here.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn import functional as F

_BLOCK_VALUES = 1 << 19  # weight values widened at once on a CPU: 2 MiB of fp32 stay in its cache
_DEVICE_BLOCK_VALUES = 1 << 26  # elsewhere, 256 MiB: every block costs launches


def project_fp32(
    hidden: Float[Tensor, "*step H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, " V"] | None = None,
    product: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "*step V"]:
    """hidden @ weight.T + bias, accumulated and returned in fp32 (float64 stays float64).

    Autocast does not apply. Low-precision factors are read as they are: products of two bf16 numbers are
    exact in fp32, so only the order of the sums differs from a widened copy of the weights, which is never
    made as a whole. Differentiable.

    Args:
        hidden: hidden states after the final norm, any float dtype.
        weight: output embedding; the dtype may differ from that of `hidden`.
        bias: of the output layer, if it has one.
        product: hidden times the weight, in their dtype, where a layer has it packed; used if that is fp32.
    """
    wide = torch.promote_types(torch.promote_types(hidden.dtype, weight.dtype), torch.float32)
    with torch.autocast(hidden.device.type, enabled=False):
        if product is not None and hidden.dtype == weight.dtype == torch.float32:
            return product(hidden) if bias is None else product(hidden) + bias.float()
        if weight.dtype == wide:
            return F.linear(hidden.to(wide), weight, None if bias is None else bias.to(wide))
        flat = hidden.reshape(-1, hidden.shape[-1])
        if torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad):
            logits = F.linear(flat.to(wide), weight.to(wide))
        elif weight.is_cuda and hidden.dtype == weight.dtype and wide == torch.float32:
            logits = torch.mm(flat, weight.t(), out_dtype=torch.float32)
        else:
            logits = _by_blocks(flat.to(wide), weight)
        if bias is not None:
            logits = logits + bias.to(wide)
        return logits.view(*hidden.shape[:-1], len(weight))


def project_greedy(
    hidden: Float[Tensor, "*step H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, " V"] | None = None,
    product: Callable[[Tensor], Tensor] | None = None,
) -> Float[Tensor, "*step V"]:
    """Logits in fp32 of which only the largest are exact: greedy tokens and near-ties of `project_fp32`.

    On a CPU a bf16 product costs a third of one accumulated into fp32. Its rounding moves no logit by more
    than 2^-9 of the largest product, so tokens that can be the greedy one lie within 2^-8 of it below the
    best; those within four times that are computed again in fp32. Not differentiable.

    Args:
        hidden: as in `project_fp32`.
        weight: as in `project_fp32`.
        bias: as in `project_fp32`.
        product: hidden times the weight, in their dtype, where a layer has it packed.
    """
    if not _rounding_pays(hidden, weight):
        return project_fp32(hidden, weight, bias, product)
    flat = hidden.reshape(-1, hidden.shape[-1])
    logits = _rounded(flat, weight, product)
    rounding = 2**-8 * torch.maximum(logits.amax(-1, keepdim=True), -logits.amin(-1, keepdim=True))
    if bias is not None:
        logits += bias.float()
    rows, ids = (logits >= logits.amax(-1, keepdim=True) - 4 * rounding).nonzero(as_tuple=True)
    exact = (flat[rows].float() * weight[ids].float()).sum(-1)
    logits[rows, ids] = exact if bias is None else exact + bias[ids].float()
    return logits.view(*hidden.shape[:-1], len(weight))


def project_top(
    hidden: Float[Tensor, "*step H"],
    weight: Float[Tensor, "V H"],
    bias: Float[Tensor, " V"] | None = None,
    product: Callable[[Tensor], Tensor] | None = None,
    exact: int = 64,
) -> Float[Tensor, "*step V"]:
    """Logits in fp32 for drafting: the largest of every row are those of `project_fp32`.

    The others are rounded to bf16 where a CPU multiplies faster that way; they order tokens that no tree
    reaches and hardly move the normaliser. Not differentiable.

    Args:
        hidden: as in `project_fp32`.
        weight: as in `project_fp32`.
        bias: as in `project_fp32`.
        product: hidden times the weight, in their dtype, where a layer has it packed.
        exact: largest logits of a row that are computed again in fp32.
    """
    if not _rounding_pays(hidden, weight):
        return project_fp32(hidden, weight, bias, product)
    flat = hidden.reshape(-1, hidden.shape[-1])
    logits = _rounded(flat, weight, product)
    if bias is not None:
        logits += bias.float()
    ids = logits.topk(min(exact, len(weight)), sorted=False).indices
    again = torch.bmm(weight[ids].float(), flat.float().unsqueeze(-1)).squeeze(-1)
    logits.scatter_(-1, ids, again if bias is None else again + bias[ids].float())
    return logits.view(*hidden.shape[:-1], len(weight))


def _rounding_pays(hidden: Tensor, weight: Tensor) -> bool:
    """Whether a bf16 product is cheaper than one accumulated into fp32: on a CPU."""
    return weight.device.type == "cpu" and weight.dtype == hidden.dtype == torch.bfloat16


def _rounded(
    hidden: Float[Tensor, "N H"], weight: Float[Tensor, "V H"], product: Callable[[Tensor], Tensor] | None
) -> Float[Tensor, "N V"]:
    """The product, rounded to the dtype of its factors, in fp32."""
    return (F.linear(hidden, weight) if product is None else product(hidden)).float()


def _by_blocks(hidden: Float[Tensor, "N H"], weight: Float[Tensor, "V H"]) -> Float[Tensor, "N V"]:
    """The product with a weight of another dtype, widened a block of rows at a time."""
    logits = hidden.new_empty(len(hidden), len(weight))
    values = _BLOCK_VALUES if weight.device.type == "cpu" else _DEVICE_BLOCK_VALUES
    rows = max(1, values // weight.shape[1])
    for begin in range(0, len(weight), rows):
        block = weight[begin : begin + rows].to(hidden.dtype)
        logits[:, begin : begin + rows] = hidden @ block.t()
    return logits
