"""Low-rank adapters (LoRA, arXiv 2106.09685) on a causal LM, through peft."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING

from transformers import PreTrainedModel

if TYPE_CHECKING:
    from peft import PeftModel


@dataclass(frozen=True)
class LoraSettings:
    """Size of the adapters, and the layers that get one.

    Attributes:
        rank: columns of the two factors, ≥ 1.
        alpha: scale; the adapter adds alpha / rank · B A to a weight.
        dropout: probability of zeroing an adapter's input in training, in [0, 1).
        target_modules: names of the linear layers that get one.
    """

    rank: int = 16
    alpha: int = 32
    dropout: float = 0.0
    target_modules: tuple[str, ...] = (
        "q_proj",
        "k_proj",
        "v_proj",
        "o_proj",
        "gate_proj",
        "up_proj",
        "down_proj",
    )

    def __post_init__(self) -> None:
        if self.rank < 1:
            raise ValueError(f"LoRA rank {self.rank} must be at least 1.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"LoRA dropout {self.dropout} must be in [0, 1).")
        if not self.target_modules:
            raise ValueError("LoRA target_modules is empty, so nothing would be trained; name linear layers.")


def add_adapters(model: PreTrainedModel, settings: LoraSettings) -> PeftModel:
    """`model` with frozen weights and trainable fp32 adapters, which start as the identity.

    Raises:
        ValueError: no layer is called like one of `target_modules`.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,
        lora_dropout=settings.dropout,
        target_modules=list(settings.target_modules),
        task_type="CAUSAL_LM",
    )
    with warnings.catch_warnings():  # peft 0.21 asks transformers 5.23 by a deprecated name
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
        return get_peft_model(model, config)


def merged(model: PeftModel) -> PreTrainedModel:
    """An fp32 copy of the base model with the adapters added into its weights; `model` stays as it is.

    Raises:
        ValueError: an adapter holds NaN or infinity.
    """
    plain: PreTrainedModel = copy.deepcopy(model).float().merge_and_unload(safe_merge=True)
    return plain
