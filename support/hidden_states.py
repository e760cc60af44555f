"""Outputs of chosen decoder layers, kept by forward hooks while a model runs.

Layer l is 0-based; its output is what transformers calls `hidden_states[l + 1]`, except after the last layer,
where transformers applies the final norm first. Hooks see it before.

Axis letters: R rows · P positions of a pass · L chosen layers · H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import BFloat16, Float, UInt16
from numpy import ndarray
from torch import Tensor, nn


class HiddenStates:
    """Outputs of the chosen layers in the latest pass; `recorded` is opened around the passes.

    Args:
        body: a model without its language-model head; its decoder layers are named layers.0, layers.1, …
        layers: 0-based, in the order of the L axis; may be empty.

    Raises:
        ValueError: no such layer.
    """

    def __init__(self, body: nn.Module, layers: Sequence[int]) -> None:
        self.layers = tuple(layers)
        known = {name for name, _ in body.named_modules()}
        missing = [layer for layer in self.layers if f"layers.{layer}" not in known]
        if missing:
            raise ValueError(f"{type(body).__name__} has no layer {missing[0]}; feature_layers count from 0")
        self._modules = [body.get_submodule(f"layers.{layer}") for layer in self.layers]
        self._latest: dict[int, Tensor] = {}

    @contextmanager
    def recorded(self) -> Iterator[HiddenStates]:
        """Register the forward hooks on entry and remove them on exit."""
        handles = [
            module.register_forward_hook(self._keep(number)) for number, module in enumerate(self._modules)
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self._latest.clear()

    def take(self) -> Float[Tensor, "R P L H"]:
        """Outputs of the layers in the latest pass, in the dtype of the model."""
        return torch.stack([self._latest.pop(number) for number in range(len(self.layers))], dim=2)

    def _keep(self, number: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = output if isinstance(output, Tensor) else output[0]
            self._latest[number] = tensor.detach()

        return hook


def bits_of(features: BFloat16[Tensor, "*shape"]) -> UInt16[ndarray, "*shape"]:
    """bf16 numbers as the 16-bit integers that a trace stores."""
    return features.contiguous().view(torch.uint16).cpu().numpy()
