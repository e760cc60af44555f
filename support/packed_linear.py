"""Weights that are laid out for the CPU once, instead of in every product."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

from certdraft.support.fp32 import project_fp32, project_top

_LARGE = 1 << 16  # values of an fp32 weight from which oneDNN is faster than the BLAS behind `F.linear`


def pack_linears(model: nn.Module) -> None:
    """Let linear layers on a CPU multiply with packed weights when nothing is trained.

    oneDNN reorders a bf16 weight in every product, which costs as much as multiplying it with a few tokens,
    and its fp32 products with a large weight that was reordered before are faster than those of a BLAS. The
    packed weights take as much memory again. Does nothing on other devices, for small fp32 weights and
    inference tensors, or where this torch cannot.

    Args:
        model: its `nn.Linear` layers become `PackedLinear`, in place.
    """
    for module in model.modules():
        if type(module) is nn.Linear and _pays(module.weight, module.weight.dtype):
            module.__class__ = PackedLinear
        if type(module) is PackedLinear:
            module.pack()


class PackedLinear(nn.Linear):
    """A linear layer that multiplies with packed weights while those are what was packed.

    With gradients, under autocast, in another dtype, on another device, or once the weight has changed
    (writes through `.data` are not seen), it is an `nn.Linear`.
    """

    def pack(self) -> None:
        """Pack the weight, unless that was done."""
        if _pays(self.weight, self.weight.dtype) and self._packed() is None:
            self.__dict__["packed"] = _Packed(self.weight, self.weight.dtype)

    def forward(self, input: Float[Tensor, "*step I"]) -> Float[Tensor, "*step O"]:
        """input Wᵀ + b."""
        usual = (
            torch.is_grad_enabled() or torch.is_autocast_enabled("cpu") or input.dtype != self.weight.dtype
        )
        packed = None if usual else self._packed()
        if packed is None:
            return F.linear(input, self.weight, self.bias)
        return _product(input, packed, self.bias)

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold only the weight."""
        return {key: value for key, value in self.__dict__.items() if key != "packed"}

    def _packed(self) -> Tensor | None:
        packed: _Packed | None = self.__dict__.get("packed")
        return packed.laid_out if packed is not None and packed.is_of(self.weight) else None


def packed_product(layer: nn.Module | None) -> PackedLinear | None:
    """The layer as the product with its weight alone, where it may have that packed."""
    return layer if isinstance(layer, PackedLinear) and layer.bias is None else None


class OutputLayer:
    """The projections of one output layer; a CPU lays its weight out once when nothing is trained.

    In a pass with few tokens both spend most of their time laying the weight out. A copy in fp32, or packed
    in bf16, is made when it is first needed. With gradients, in float64, on another device, and of fp32
    weights that are small or trained, nothing is kept; a weight that was replaced or written to is laid out
    again.
    """

    def __init__(self) -> None:
        self._kept: dict[torch.dtype, _Packed] = {}

    def __call__(
        self,
        hidden: Float[Tensor, "*step H"],
        weight: Float[Tensor, "V H"],
        bias: Tensor | None = None,
        layer: nn.Module | None = None,
    ) -> Float[Tensor, "*step V"]:
        """All logits; see `project_fp32`.

        Args:
            hidden: as there.
            weight: as there.
            bias: as there.
            layer: whose weight this is; what it has packed in fp32 is used, and nothing kept beside it.
        """
        product = packed_product(layer)
        own = weight.dtype == torch.float32 and (product is not None or weight.requires_grad)
        exact = torch.float64 in (hidden.dtype, weight.dtype)
        if torch.is_grad_enabled() or own or exact or not _pays(weight, torch.float32):
            return project_fp32(hidden, weight, bias, product)
        wide = self._laid_out(weight, torch.float32)
        with torch.autocast("cpu", enabled=False):
            return _product(hidden.float(), wide, None if bias is None else bias.float())

    def top(
        self, hidden: Float[Tensor, "*step H"], weight: Float[Tensor, "V H"], bias: Tensor | None = None
    ) -> Float[Tensor, "*step V"]:
        """Logits for drafting; see `project_top`."""
        rounded = hidden.dtype == weight.dtype == torch.bfloat16
        if torch.is_grad_enabled() or not rounded or not _pays(weight, torch.bfloat16):
            return self(hidden, weight, bias)
        packed = self._laid_out(weight, torch.bfloat16)
        return project_top(hidden, weight, bias, lambda x: _product(x, packed, None))

    def _laid_out(self, weight: Tensor, dtype: torch.dtype) -> Tensor:
        kept = self._kept.get(dtype)
        if kept is None or not kept.is_of(weight):
            kept = self._kept[dtype] = _Packed(weight, dtype)
        return kept.laid_out

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles hold no weight."""
        return {"_kept": {}}


class _Packed:
    """A weight, laid out for the products of a CPU in this dtype."""

    def __init__(self, weight: Tensor, dtype: torch.dtype) -> None:
        self._weight = weight.detach()  # held, so that no other weight gets its address
        self._version = weight._version
        self.laid_out = self._weight.to(dtype)
        if _can_pack():
            self.laid_out = torch.ops.mkldnn._reorder_linear_weight(self.laid_out, 1)  # batch size: a hint

    def is_of(self, weight: Tensor) -> bool:
        """False once the weight was replaced or written to."""
        return (weight.data_ptr(), weight._version) == (self._weight.data_ptr(), self._version)


def _product(input: Tensor, laid_out: Tensor, bias: Tensor | None) -> Tensor:
    if not laid_out.is_mkldnn:
        return F.linear(input, laid_out, bias)
    product: Tensor = torch.ops.mkldnn._linear_pointwise(input, laid_out, bias, "none", [], "")
    return product


def _pays(weight: Tensor, dtype: torch.dtype) -> bool:
    """Whether products with this weight in this dtype are faster once it is laid out, here."""
    # changes of inference tensors are not counted, so their packed copies could go stale
    if weight.device.type != "cpu" or weight.is_inference():
        return False
    if dtype == torch.float32:
        return weight.dtype != dtype or (weight.numel() >= _LARGE and _can_pack())
    return dtype == torch.bfloat16 and _can_pack() and has_bfloat16_products(weight.device)


def has_bfloat16_products(device: torch.device) -> bool:
    """Whether a device multiplies bfloat16 matrices itself; a CPU without such instructions emulates them."""
    ops: Any = torch.ops.mkldnn
    return device.type != "cpu" or bool(ops._is_mkldnn_bf16_supported())


def _can_pack() -> bool:
    ops: Any = torch.ops.mkldnn
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(ops, "_reorder_linear_weight")
        and hasattr(ops, "_linear_pointwise")
    )
