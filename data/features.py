"""Features: the outputs of chosen target layers, caught while the target runs.

They are caught by hooks, because the last of transformers' `hidden_states` is taken after the final norm.

Axis letters: R rows · P positions of a pass · L chosen layers · H hidden.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import BFloat16, UInt16
from numpy import ndarray
from torch import Tensor, nn


class FeatureTaps:
    """Outputs of the chosen layers in the latest pass; `open` it around the passes.

    Args:
        body: the target without its head; its decoder layers are called layers.0, layers.1, …
        layers: 0-based, the order of the L axis.

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
        self._latest: dict[int, BFloat16[Tensor, "R P H"]] = {}

    @contextmanager
    def open(self) -> Iterator[FeatureTaps]:
        """Hooks in, hooks out."""
        handles = [
            module.register_forward_hook(self._catch(number)) for number, module in enumerate(self._modules)
        ]
        try:
            yield self
        finally:
            for handle in handles:
                handle.remove()
            self._latest.clear()

    def take(self) -> BFloat16[Tensor, "R P L H"]:
        """What the layers said in the latest pass."""
        return torch.stack([self._latest.pop(number) for number in range(len(self.layers))], dim=2)

    def _catch(self, number: int) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = output if isinstance(output, Tensor) else output[0]
            self._latest[number] = tensor.detach().to(torch.bfloat16)

        return hook


def bits_of(features: BFloat16[Tensor, "*shape"]) -> UInt16[ndarray, "*shape"]:
    """bf16 numbers as the 16-bit integers that a trace stores."""
    return features.contiguous().view(torch.uint16).cpu().numpy()
