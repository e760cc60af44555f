"""bf16 weights that are laid out for the CPU once, instead of in every product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from certdraft.support.fp32 import project_fp32, project_top


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
            self.__dict__["packed"] = _identity(self.weight), _pack(self.weight.detach())

    def forward(self, input: Float[Tensor, "*step I"]) -> Float[Tensor, "*step O"]:
        """input Wᵀ + b."""
        packed = None if torch.is_grad_enabled() or input.dtype != torch.bfloat16 else self._packed()
        if packed is None:
            return F.linear(input, self.weight, self.bias)
        return _packed_product(input, packed, self.bias)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold only the weight."""
        return {key: value for key, value in self.__dict__.items() if key != "packed"}

    def _packed(self) -> Tensor | None:
        identity, packed = self.__dict__.get("packed", (None, None))
        return packed if packed is not None and identity == _identity(self.weight) else None


class OutputLayer:
    """The projections of one output layer; a CPU lays its bf16 weight out once when nothing is trained.

    In a decoding pass, which has few tokens, both spend most of their time laying the weight out. A copy in
    fp32 or for oneDNN is made when it is first needed. With gradients, in another dtype or on another device
    nothing is kept; a weight that was replaced or written to is laid out again.
    """

    def __init__(self) -> None:
        self._kept: dict[str, tuple[tuple[int, int], Tensor]] = {}

    def __call__(
        self, hidden: Float[Tensor, "*step H"], weight: Float[Tensor, "V H"], bias: Tensor | None = None
    ) -> Float[Tensor, "*step V"]:
        """All logits; see `project_fp32`."""
        if torch.is_grad_enabled() or not _packable(weight):
            return project_fp32(hidden, weight, bias)
        return project_fp32(hidden, self._laid_out("wide", weight, Tensor.float), bias)

    def top(
        self, hidden: Float[Tensor, "*step H"], weight: Float[Tensor, "V H"], bias: Tensor | None = None
    ) -> Float[Tensor, "*step V"]:
        """Logits for drafting; see `project_top`."""
        if (
            torch.is_grad_enabled()
            or not _packable(weight)
            or hidden.dtype != weight.dtype
            or not _can_pack()
        ):
            return self(hidden, weight, bias)
        packed = self._laid_out("packed", weight, _pack)
        return project_top(hidden, weight, bias, lambda x: _packed_product(x, packed, None))

    def _laid_out(self, name: str, weight: Tensor, make: Callable[[Tensor], Tensor]) -> Tensor:
        kept = self._kept.get(name)
        if kept is None or kept[0] != _identity(weight):
            kept = self._kept[name] = _identity(weight), make(weight.detach())
        return kept[1]

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold no weight."""
        return {"_kept": {}}


def _pack(weight: Tensor) -> Tensor:
    packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight, 1)  # batch size: a hint
    return packed


def _packed_product(input: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    product: Tensor = torch.ops.mkldnn._linear_pointwise(input, packed, bias, "none", [], "")
    return product


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
