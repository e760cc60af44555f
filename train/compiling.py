"""torch.compile as a switch: a callback, named in `trainer.callbacks`."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch
from pytorch_lightning.callbacks import Callback

from certdraft.train.sharding import decoder_layers

_MOST_GRAPHS = 64  # of a layer


class CompileLayers(Callback):
    """Compile each decoder layer of the drafter before the first step.

    Layer by layer, because equal layers share one compilation, and because losses, masks and packing change
    shape from batch to batch. Checkpoints do not change.

    Args:
        backend: of torch.compile.
        dynamic: compile for any batch shape at once; when not given, after the first change of shape.
    """

    def __init__(self, backend: str = "inductor", dynamic: bool | None = None) -> None:
        self.backend, self.dynamic = backend, dynamic

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Compile the layers, once the network is built and on its devices.

        Raises:
            ValueError: the drafter has no decoder layers, of a transformers model or of ours.
        """
        drafter: Any = pl_module.drafter
        layers = decoder_layers(drafter)
        if not layers:
            raise ValueError(
                f"CompileLayers: {type(drafter).__name__} has no decoder layers to "
                "compile; leave the callback out"
            )
        # unroll steps and validation each make graphs; past its limit of 8 torch would run layers uncompiled
        config: Any = torch.compiler.config
        config.recompile_limit = max(config.recompile_limit, _MOST_GRAPHS)
        for layer in layers:
            layer.compile(backend=self.backend, dynamic=self.dynamic)
