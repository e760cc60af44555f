"""Limits that drafter, target and data must agree on are refused in words, before anything is loaded."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import yaml
from jsonargparse import ArgumentParser
from transformers import PreTrainedTokenizerFast, Qwen3ForCausalLM

import certdraft
from certdraft.data import Recording
from certdraft.data.record.recording import check_settings
from certdraft.drafters import (
    BlockConfig,
    BlockDrafter,
    CausalDrafter,
    EagleConfig,
    EagleDrafter,
    TargetSource,
    export,
    lint_export,
)
from certdraft.train import DrafterModule, Online, TargetSettings, fit_to_target

V = 96
CONFIGS = Path(certdraft.__file__).parent / "configs"
RECORDING = [
    path
    for path in sorted([*CONFIGS.glob("*.yaml"), *CONFIGS.glob("recipes/*/*.yaml")])
    if "record" in yaml.safe_load(path.read_text("utf-8")).get("data", {})
]


@pytest.mark.parametrize("path", RECORDING, ids=lambda path: str(path.relative_to(CONFIGS)))
def test_shipped_configs_can_record(path: Path) -> None:
    """Prompts leave room for an answer, and rows for both."""
    data = yaml.safe_load(path.read_text("utf-8"))["data"]
    parser = ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(Recording, "record")
    record = data["record"]
    check_settings(parser.instantiate(parser.parse_object({"record": record})).record)


def test_the_target_is_loaded_after_the_settings_are_checked() -> None:
    module = DrafterModule(EagleDrafter(), target=TargetSettings("./nowhere"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        fit_to_target(module.drafter, module.online, None)
    assert isinstance(module.online, Online)


def data_of(length: int, seq_len: int) -> Any:
    facts = {"target": "t", "tokenizer_fingerprint": "ab" * 32, "feature_layers": (0, 1)}
    meta = SimpleNamespace(vocab_size=V, **facts)
    return SimpleNamespace(meta=meta, seq_len=seq_len, train_trace=Lengths(length), validation_trace=None)


class Lengths:
    """The lengths of a trace of two documents."""

    def __init__(self, longest: int) -> None:
        self.lengths = np.array([7, longest])

    def __len__(self) -> int:
        return len(self.lengths)


def test_fewer_positions_than_the_documents(sizes: dict[str, Any]) -> None:
    drafter = CausalDrafter(config=sizes | {"max_position_embeddings": 64}, vocab_size=V)
    with pytest.raises(ValueError, match=r"has 64 positions.*reach 100 tokens.*lower data.seq_len to 64"):
        fit_to_target(drafter, None, data_of(100, 512))
    fit_to_target(drafter, None, data_of(64, 512))
    fit_to_target(drafter, None, data_of(100, 64))  # rows cut documents


def test_feature_drafters_have_the_targets_positions(target: Qwen3ForCausalLM) -> None:
    eagle = EagleDrafter(EagleConfig(target_layer_ids=(0, 1))).build(V, target)
    block = BlockDrafter(BlockConfig(mask_token_id=95, target_layer_ids=(0, 1))).build(V, target)
    assert eagle.max_context == block.max_context == target.config.max_position_embeddings == 256


@pytest.mark.parametrize("family", ["causal", "eagle", "block"])
def test_lint_names_fewer_positions(
    family: str,
    sizes: dict[str, Any],
    target: Qwen3ForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    short: dict[str, Any] = {"target_layer_ids": (0, 1), "max_position_embeddings": 64}
    if family == "causal":
        drafter: Any = CausalDrafter(config=sizes | {"max_position_embeddings": 64}, vocab_size=V)
    elif family == "eagle":
        drafter = EagleDrafter(EagleConfig(**short)).build(V, target)
    else:
        drafter = BlockDrafter(BlockConfig(num_hidden_layers=1, mask_token_id=95, **short)).build(V, target)
    folder = export(drafter, tmp_path / "out", tokenizer=tokenizer, draft_length=3)
    config = tmp_path / "target.json"
    config.write_text(json.dumps(target.config.to_dict()))
    found = [str(finding) for finding in lint_export(folder, config)]
    assert any("max_position_embeddings: is 64, the target's 256" in line for line in found), found
    assert not any("max_position_embeddings" in str(finding) for finding in lint_export(folder))


def test_a_tokenizer_that_fills_the_vocabulary(target: Qwen3ForCausalLM) -> None:
    source = TargetSource("target", V, lambda: target, num_ids=lambda: V)
    fresh = BlockDrafter(BlockConfig(target_layer_ids=(0, 1)))
    with pytest.raises(ValueError, match=rf"tokenizer uses all {V} ids, set mask_token_id .* reserved token"):
        fresh.build_from_target(source)
    named = BlockDrafter(BlockConfig(target_layer_ids=(0, 1), mask_token_id=5)).build_from_target(source)
    assert named.config.mask_token_id == 5
    spare = TargetSource("target", V, lambda: target, num_ids=lambda: 90)
    found = BlockDrafter(BlockConfig(target_layer_ids=(0, 1))).build_from_target(spare)
    assert found.config.mask_token_id == 90
