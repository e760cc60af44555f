"""Published checkpoints, written here by hand as their documents describe them, as the start of training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.models.decoding_models import tiny_qwen3
from oracles.models.feature_drafters import enlarge
from safetensors.torch import save_file

from certdraft.drafters import BlockConfig, BlockDrafter, EagleConfig, EagleDrafter

V = 40
TARGET = tiny_qwen3(0, V, layers=7)
SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2,
    "head_dim": 8, "rms_norm_eps": 1e-6, "hidden_act": "silu", "max_position_embeddings": 160,
    "attention_bias": False, "tie_word_embeddings": False, "rope_theta": 10000.0, "vocab_size": V,
}  # fmt: skip
EAGLE = SIZES | {
    "architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama", "num_hidden_layers": 1,
    "draft_vocab_size": 20, "eagle_aux_hidden_state_layer_ids": [2, 3, 5],
    "eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 2, 4], "use_aux_hidden_state": True},
}  # fmt: skip
DFLASH = SIZES | {
    "architectures": ["DFlashDraftModel"], "model_type": "qwen3", "num_hidden_layers": 2, "block_size": 4,
    "num_target_layers": 7, "dflash_config": {"mask_token_id": 39, "target_layer_ids": [1, 4]},
    "layer_types": ["full_attention", "full_attention"], "sliding_window": None, "use_sliding_window": False,
}  # fmt: skip
COUNTS = torch.arange(V) + 1


def eagle() -> EagleDrafter:
    config = EagleConfig(target_layer_ids=(1, 2, 4), draft_vocab_size=20)
    drafter = EagleDrafter(config, max_lost_coverage=1.0).build(V, TARGET, COUNTS)
    enlarge(drafter)
    return drafter.eval()


def block() -> BlockDrafter:
    config = BlockConfig(num_hidden_layers=2, block_size=4, mask_token_id=39, target_layer_ids=(1, 4))
    drafter = BlockDrafter(config).build(V, TARGET)
    enlarge(drafter)
    return drafter.eval()


def folder(path: Path, config: dict[str, Any], weights: dict[str, torch.Tensor]) -> str:
    path.mkdir()
    (path / "config.json").write_text(json.dumps(config))
    save_file({name: value.contiguous() for name, value in weights.items()}, path / "model.safetensors")
    return str(path)


def drafts(drafter: EagleDrafter | BlockDrafter) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(5, len(drafter.taps), 32, generator=generator)
    return drafter.draft(drafter.start([1, 2, 3, 4, 5], features), [6], [-1])


@pytest.mark.parametrize("embedded", [False, True], ids=["", "with the target's embeddings"])
def test_an_eagle_head_drafts_as_before(tmp_path: Path, embedded: bool) -> None:
    published = eagle()
    weights = dict(published.state_dict())
    if embedded:
        weights["embed_tokens.weight"] = TARGET.get_input_embeddings().weight.bfloat16()
    name = folder(tmp_path / "head", EAGLE, weights)
    started = EagleDrafter(pretrained=name, max_lost_coverage=1.0).build(V, TARGET, COUNTS).eval()
    assert started.taps == (1, 2, 4)
    assert torch.equal(started.draft_ids, published.draft_ids)
    assert torch.equal(drafts(started), drafts(published))
    assert started.short_until == 0.0, "it knows its first draft token"
    assert all(parameter.requires_grad for parameter in started.parameters())


def test_a_block_drafter_drafts_as_before(tmp_path: Path) -> None:
    published = block()
    started = BlockDrafter(pretrained=folder(tmp_path / "a", DFLASH, published.state_dict())).build(V, TARGET)
    assert torch.equal(drafts(started.eval()), drafts(published))
    assert started.short_until == 0.0
    inside = {key: value for key, value in DFLASH.items() if key != "block_size"}
    inside["dflash_config"] = DFLASH["dflash_config"] | {"block_size": 4}
    again = BlockDrafter(pretrained=folder(tmp_path / "b", inside, published.state_dict())).build(V, TARGET)
    assert torch.equal(drafts(again.eval()), drafts(published))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"vocab_size": 50}, "embeddings are 50 by 32, this one.s are 40 by 32"),
        ({"hidden_size": 64}, "embeddings are 40 by 64, this one.s are 40 by 32"),
        ({"eagle_aux_hidden_state_layer_ids": [2, 3], "eagle_config": {}}, "fuses 96 .* 2 layers .* give 64"),
        ({"eagle_aux_hidden_state_layer_ids": [2, 3, 9], "eagle_config": {}}, "layers 0 to 6"),
        ({"norm_before_fc": True}, "missing: input_norm.weight"),
        ({"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}}, "scales its rotary"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_heads_of_other_targets_are_refused(tmp_path: Path, change: dict[str, Any], said: str) -> None:
    name = folder(tmp_path / "head", EAGLE | change, eagle().state_dict())
    with pytest.raises(ValueError, match=said):
        EagleDrafter(pretrained=name).build(V, TARGET)


def test_what_else_is_refused(tmp_path: Path) -> None:
    weights = dict(eagle().state_dict())
    other = weights | {"embed_tokens.weight": torch.randn(V, 32)}
    with pytest.raises(ValueError, match="brings embed_tokens.weight, which is not this target's"):
        EagleDrafter(pretrained=folder(tmp_path / "1", EAGLE, other)).build(V, TARGET)
    missing = {key: value for key, value in weights.items() if "o_proj" not in key}
    with pytest.raises(ValueError, match="missing: midlayer.self_attn.o_proj.weight"):
        EagleDrafter(pretrained=folder(tmp_path / "2", EAGLE, missing)).build(V, TARGET)
    absolute = weights | {"d2t": weights["d2t"] + torch.arange(20)}
    with pytest.raises(ValueError, match="d2t"):
        EagleDrafter(pretrained=folder(tmp_path / "3", EAGLE, absolute)).build(V, TARGET)
    with pytest.raises(ValueError, match=r"misses too many.*lost; missed: "):
        EagleDrafter(pretrained=folder(tmp_path / "4", EAGLE, weights)).build(
            V, TARGET, torch.ones(V, dtype=torch.long)
        )
    blocks = block().state_dict()
    windows = {"layer_types": ["full_attention", "sliding_attention"], "sliding_window": 64}
    with pytest.raises(ValueError, match="transformers drops their window"):
        BlockDrafter(pretrained=folder(tmp_path / "5", DFLASH | windows, blocks)).build(V, TARGET)
    with pytest.raises(ValueError, match="target of 36 layers, this one has 7"):
        BlockDrafter(pretrained=folder(tmp_path / "6", DFLASH | {"num_target_layers": 36}, blocks)).build(
            V, TARGET
        )
    with pytest.raises(ValueError, match="not both"):
        BlockDrafter(BlockConfig(), pretrained="x")
    with pytest.raises(FileNotFoundError, match="no such folder"):
        BlockDrafter(pretrained="./nowhere").build(V, TARGET)
