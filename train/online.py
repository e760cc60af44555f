"""A target that is run beside the drafter instead of being read from a trace.

Axis letters: R rows · T tokens · H hidden · N counted steps.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Int
from torch import Tensor

from certdraft.data import Batch, load_target
from certdraft.losses import OnlineTarget


@dataclass(frozen=True)
class TargetSettings:
    """Which model is the target, and how much of its distribution a step sees.

    Args:
        name: "embedded", a local folder, or a hub name such as "Qwen/Qwen3-8B".
        revision: hub revision.
        dtype: dtype of its weights; logits are fp32 whatever it is.
        num_kept: head entries per step.
        full: also hand the loss the full distribution.
    """

    name: str = "embedded"
    revision: str | None = None
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    num_kept: int = 32
    full: bool = True


class Online:
    """The frozen target. No module: it must stay out of checkpoints, wrappers and train mode.

    Args:
        settings: which model.
    """

    def __init__(self, settings: TargetSettings) -> None:
        self.settings = settings
        dtype = getattr(torch, settings.dtype)
        self.model = load_target(settings.name, revision=settings.revision, dtype=dtype)

    @property
    def vocab_size(self) -> int:
        """V, padding rows included."""
        return int(self.model.get_output_embeddings().weight.shape[0])

    def to(self, device: torch.device) -> None:
        """Moves the target to where the drafter trains."""
        torch.nn.Module.to(self.model, device)

    @torch.no_grad()
    def at(self, batch: Batch, steps: Int[Tensor, " N"]) -> OnlineTarget:
        """The target at the counted steps, still without logits.

        Without a cache, transformers keeps packed documents apart where positions restart.
        """
        output = self.model.base_model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False
        )
        hidden = output.last_hidden_state.flatten(0, 1)[steps]
        weight = self.model.get_output_embeddings().weight
        return OnlineTarget(hidden, weight, self.settings.num_kept, self.settings.full)
