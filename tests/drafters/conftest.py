"""Tiny networks and a tokenizer for the drafter tests."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import nn
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from certdraft.drafters import CausalDrafter

V = 96
SIZES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
}


def enlarge(module: nn.Module, seed: int = 0) -> None:
    """Random matrices so large that attention to a wrong token, or a wrong weight, shows in the logits."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=0.25, generator=generator)


@pytest.fixture
def sizes() -> dict[str, Any]:
    """Config of a fresh drafter, without its vocabulary."""
    return dict(SIZES)


@pytest.fixture
def make_drafter() -> Callable[..., CausalDrafter]:
    """Fresh drafters in eval mode; keywords override the config."""

    def make(attention: str = "sdpa", seed: int = 0, **changes: Any) -> CausalDrafter:
        drafter = CausalDrafter(config=SIZES | changes, vocab_size=V, attention=attention)
        enlarge(drafter, seed)
        return drafter.eval()

    return make


@pytest.fixture
def target() -> Qwen3ForCausalLM:
    """A random target of three layers."""
    model = Qwen3ForCausalLM(Qwen3Config(**(SIZES | {"num_hidden_layers": 3, "vocab_size": V}))).eval()
    enlarge(model, seed=7)
    return model


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """Whole words only, ids 0 to 89, with a chat template."""
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(90)}, unk_token="w89"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="w89", eos_token="w88")
    fast.chat_template = "{% for m in messages %}{{ m.content }} {% endfor %}"
    return fast


@pytest.fixture
def pretrained(tmp_path: Path, make_drafter: Callable[..., CausalDrafter]) -> Path:
    """A folder with a small causal LM."""
    folder = tmp_path / "pretrained"
    make_drafter(seed=3).model.save_pretrained(folder)
    return folder
