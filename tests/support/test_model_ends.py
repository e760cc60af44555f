"""Embeddings, final norm and lm_head of a target, read without its layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, Qwen3Config

from certdraft.drafters import BlockConfig, BlockDrafter, EagleConfig, EagleDrafter
from certdraft.drafters.features.feature_drafter import TargetEnds
from certdraft.support import load_causal_lm, load_model_ends

SIZES: dict[str, Any] = {
    "vocab_size": 61, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip
CONFIGS = {
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
    "qwen3, tied": Qwen3Config(**SIZES, tie_word_embeddings=True),
    "gemma3, tied": Gemma3TextConfig(**SIZES),
}


def save(folder: Path, config: Any, **how: Any) -> Path:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    model.to(torch.bfloat16).save_pretrained(folder, **how)
    return folder


@pytest.mark.parametrize("shards", [None, "8KB"])
@pytest.mark.parametrize("name", CONFIGS)
def test_ends_are_those_of_the_whole_model(name: str, shards: str | None, tmp_path: Path) -> None:
    save(tmp_path, CONFIGS[name], **({} if shards is None else {"max_shard_size": shards}))
    whole, ends = load_causal_lm(tmp_path, dtype=torch.float32), load_model_ends(tmp_path)
    assert ends.model.layers[1].self_attn.q_proj.weight.is_meta
    found, expected = TargetEnds.of(ends), TargetEnds.of(whole)
    for part in ("embeddings", "head", "norm"):
        got, want = getattr(found, part), getattr(expected, part)
        assert got.dtype == torch.float32
        assert torch.equal(got, want)
    assert (found.head is found.embeddings) == ("tied" in name)


def test_files_of_the_layers_are_not_opened(tmp_path: Path) -> None:
    save(tmp_path, CONFIGS["llama"], max_shard_size="8KB")
    places = json.loads((tmp_path / "model.safetensors.index.json").read_text())["weight_map"]
    needed = {file for key, file in places.items() if "layers" not in key}
    unread = set(places.values()) - needed
    assert unread
    for file in unread:
        (tmp_path / file).unlink()
    assert TargetEnds.of(load_model_ends(tmp_path)).embeddings.shape == (61, 32)
    (tmp_path / places["lm_head.weight"]).unlink()
    with pytest.raises(FileNotFoundError, match="cannot be loaded"):
        load_model_ends(tmp_path)


def test_other_names_and_shapes_are_left_to_the_whole_model(tmp_path: Path) -> None:
    """A checkpoint whose tensors are renamed on loading, and one that does not fit its config."""
    from safetensors.torch import load_file, save_file

    save(tmp_path, CONFIGS["llama"])
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    old = {key.removeprefix("model."): value for key, value in tensors.items()}
    save_file(old, file, {"format": "pt"})
    assert not load_model_ends(tmp_path).model.layers[1].self_attn.q_proj.weight.is_meta
    tensors["lm_head.weight"] = tensors["lm_head.weight"][:60].clone()
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match="do not fit its config"):
        load_model_ends(tmp_path)


@pytest.mark.parametrize("kind", ["eagle", "block"])
def test_a_drafter_is_built_from_the_ends(kind: str, tmp_path: Path) -> None:
    save(tmp_path, CONFIGS["llama"])
    made = []
    for target in (load_causal_lm(tmp_path, dtype=torch.float32), load_model_ends(tmp_path)):
        drafter: Any = (
            EagleDrafter(EagleConfig(target_layer_ids=(0,)), init_from_target=True)
            if kind == "eagle"
            else BlockDrafter(
                BlockConfig(num_hidden_layers=1, target_layer_ids=(0,), block_size=4, mask_token_id=60),
                init_from_target=True,
            )
        )
        torch.manual_seed(1)
        made.append(drafter.build(61, target))
    for (name, one), (_, other) in zip(made[0].named_parameters(), made[1].named_parameters(), strict=True):
        assert torch.equal(one, other), name
    ids, places = torch.randint(0, 60, (1, 9)), torch.arange(9)[None]
    features = torch.randn(1, 9, 1, 32)
    documents, mask = torch.zeros(1, 9, dtype=torch.long), torch.ones(1, 9, dtype=torch.bool)
    logits = [d.head(d.paths(ids, places, documents, mask, features, every=True).hidden) for d in made]
    assert torch.equal(*logits)
