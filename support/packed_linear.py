"""bf16 weights that are laid out for the CPU once, instead of in every product."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from certdraft.support.fp32 import project_fp32


def pack_linears(model: nn.Module) -> None:
    """Let linear layers in bf16 on a CPU multiply with packed weights when nothing is trained.

    oneDNN reorders a bf16 weight in every product, which costs as much as multiplying it with a few tokens.
    The packed weights take as much memory again. Does nothing on other devices, or where this torch cannot.

    Args:
        model: its `nn.Linear` layers become `PackedLinear`, in place.
    """
    if not _can_pack():
        return
    for module in model.modules():
        if type(module) is nn.Linear and _packable(module.weight):
            module.__class__ = PackedLinear
        if type(module) is PackedLinear:
            module.pack()


class PackedLinear(nn.Linear):
    """A linear layer that multiplies with packed weights while those are what was packed.

    With gradients, in another dtype, on another device, or once the weight has changed, it is an `nn.Linear`.
    """

    def pack(self) -> None:
        """Pack the weight, unless that was done."""
        if _packable(self.weight) and self._packed() is None:
            packed = torch.ops.mkldnn._reorder_linear_weight(self.weight.detach(), 1)  # batch size: a hint
            self.__dict__["packed"] = (_identity(self.weight), packed)

    def forward(self, input: Float[Tensor, "*step I"]) -> Float[Tensor, "*step O"]:
        """input Wᵀ + b."""
        packed = None if torch.is_grad_enabled() or input.dtype != torch.bfloat16 else self._packed()
        if packed is None:
            return F.linear(input, self.weight, self.bias)
        product: Tensor = torch.ops.mkldnn._linear_pointwise(input, packed, self.bias, "none", [], "")
        return product

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold only the weight."""
        return {key: value for key, value in self.__dict__.items() if key != "packed"}

    def _packed(self) -> Tensor | None:
        identity, packed = self.__dict__.get("packed", (None, None))
        return packed if packed is not None and identity == _identity(self.weight) else None


class WideHead:
    """`project_fp32` with one output layer, whose bf16 weight is widened once when nothing is trained.

    In a decoding pass, which has few tokens, `project_fp32` spends most of its time widening the weight.
    The copy takes twice the memory of the weight. With gradients, in another dtype or on another device
    nothing is kept; a weight that was replaced or written to is widened again.
    """

    def __init__(self) -> None:
        self._wide: tuple[tuple[int, int], Tensor] | None = None

    def __call__(
        self, hidden: Float[Tensor, "*step H"], weight: Float[Tensor, "V H"], bias: Tensor | None = None
    ) -> Float[Tensor, "*step V"]:
        """See `project_fp32`."""
        if torch.is_grad_enabled() or not _packable(weight):
            return project_fp32(hidden, weight, bias)
        if self._wide is None or self._wide[0] != _identity(weight):
            self._wide = _identity(weight), weight.detach().float()
        return project_fp32(hidden, self._wide[1], bias)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold no weight."""
        return {"_wide": None}


def _identity(weight: Tensor) -> tuple[int, int]:
    """Changes when the weight is replaced or written to."""
    return weight.data_ptr(), weight._version


def _packable(weight: Tensor) -> bool:
    # changes of inference tensors are not counted, so their packed copies could go stale
    return weight.device.type == "cpu" and weight.dtype == torch.bfloat16 and not weight.is_inference()


def _can_pack() -> bool:
    ops: Any = torch.ops.mkldnn
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(ops, "_reorder_linear_weight")
        and hasattr(ops, "_linear_pointwise")
        and bool(ops._is_mkldnn_bf16_supported())
    )
