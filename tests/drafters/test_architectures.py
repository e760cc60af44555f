"""Architectures as targets and as causal drafters: equal to plain passes, or refused by name."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.models.architectures import EQUAL, GEMMA, REFUSED, SIZES, V, made
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from certdraft.drafters import (
    BlockConfig,
    BlockDrafter,
    CachedLM,
    CausalDrafter,
    EagleConfig,
    EagleDrafter,
    TargetLayers,
    export,
    lint_export,
)
from certdraft.losses import OnlineTarget
from certdraft.support import context_limit, facts_of, text_body

TEXT = torch.randint(0, V, (80,), generator=torch.Generator().manual_seed(5))
NODES, PARENTS = [3, 17, 40, 41, 5, 6], [-1, 0, 0, 2, -1, 4]


def path_of(node: int) -> list[int]:
    return [] if node < 0 else [*path_of(PARENTS[node]), NODES[node]]


@torch.no_grad()
def plain(model: PreTrainedModel, ids: Tensor) -> Tensor:
    return model(input_ids=ids[None], use_cache=False).logits[0]


@pytest.mark.parametrize("case", EQUAL)
def test_trees_equal_plain_passes(case: str) -> None:
    model = made(EQUAL[case][0], **EQUAL[case][1])
    lm = CachedLM(model, taps=(0, 3))
    cache = lm.prefill(TEXT)
    assert cache.features.shape == (80, 2, 32)
    for node, logits in enumerate(lm.extend(cache, NODES, PARENTS)):
        expected = plain(model, torch.cat([TEXT, torch.tensor(path_of(node))]))[-1]
        torch.testing.assert_close(logits, expected, atol=2e-4, rtol=1e-4)
    cache.keep([0, 2])
    chain = lm.extend(cache, [7, 8])  # a chain takes the model's own causal mask
    expected = plain(model, torch.cat([TEXT, torch.tensor([3, 40, 7, 8])]))[-2:]
    torch.testing.assert_close(chain, expected, atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("case", REFUSED)
def test_what_would_differ_is_refused_by_name(case: str) -> None:
    name, changes, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        CachedLM(made(name, **changes)).prefill(TEXT)


@pytest.mark.parametrize("case", EQUAL)
def test_online_targets_equal_the_models_logits(case: str) -> None:
    model = made(EQUAL[case][0], **EQUAL[case][1])
    with torch.no_grad():
        hidden = text_body(model)(input_ids=TEXT[None], use_cache=False).last_hidden_state[0]
    head: Any = model.get_output_embeddings()
    target = OnlineTarget(hidden, head.weight, k=4, bias=head.bias)[:]
    expected = plain(model, TEXT).log_softmax(-1)
    torch.testing.assert_close(target.logp, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(target.greedy, expected.argmax(-1))


@pytest.mark.parametrize("case", [case for case in EQUAL if "bias" not in case])
def test_causal_drafters_keep_packed_documents_apart(case: str, tmp_path: Any) -> None:
    name, changes = EQUAL[case]
    model = made(name, **changes)
    model.save_pretrained(tmp_path)
    drafter = CausalDrafter(pretrained=str(tmp_path)).eval()
    assert drafter.vocab_size == V
    positions = torch.cat([torch.arange(30), torch.arange(50)])[None]
    documents = torch.tensor([[0] * 30 + [1] * 50])
    packed = drafter.logits(TEXT[None], positions, documents)[0]
    alone = torch.cat([plain(model, TEXT[:30]), plain(model, TEXT[30:])])
    torch.testing.assert_close(packed, alone, atol=2e-4, rtol=1e-4)


def test_the_text_part_of_a_multimodal_model_drafts(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = made("Gemma3", **GEMMA | {"sliding_window": 100})
    model.save_pretrained(tmp_path / "whole")
    drafter = CausalDrafter(pretrained=str(tmp_path / "whole"))
    assert type(drafter.model).__name__ == "Gemma3ForCausalLM"
    folder = export(drafter, tmp_path / "out", tokenizer=tokenizer, draft_length=3)
    assert lint_export(folder, tmp_path / "whole") == ()
    config = json.loads((folder / "config.json").read_text())
    assert (config["rope_theta"], config["rope_local_base_freq"]) == (1e6, 1e4)
    (folder / "config.json").write_text(json.dumps(config | {"rope_local_base_freq": 7.0}))
    assert ["rope_local_base_freq"] == [finding.where for finding in lint_export(folder)]
    torch.testing.assert_close(drafter.logits(TEXT[None])[0], plain(model, TEXT), atol=2e-4, rtol=1e-4)


def test_causal_drafters_refuse_packed_rows_beyond_a_window() -> None:
    drafter = CausalDrafter(config=SIZES | {"model_type": "mistral", "sliding_window": 16}).eval()
    assert drafter.max_context == 16
    with pytest.raises(ValueError, match="MistralForCausalLM has layers .* last 16 tokens only"):
        drafter.logits(TEXT[None], torch.arange(80)[None], torch.zeros(1, 80, dtype=torch.long))


def test_a_drafter_with_a_biased_head_is_refused(tmp_path: Any) -> None:
    model = made("Phi", num_key_value_heads=4)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="lm_head of PhiForCausalLM has a bias"):
        CausalDrafter(pretrained=str(tmp_path))
    head: Any = model.get_output_embeddings()
    torch.nn.init.zeros_(head.bias)
    model.save_pretrained(tmp_path)
    drafter: Any = CausalDrafter(pretrained=str(tmp_path))
    assert not drafter.model.lm_head.bias.requires_grad  # the losses would not train it


def test_targets_with_a_biased_head() -> None:
    model = made("Phi", num_key_value_heads=4)
    with pytest.raises(
        ValueError, match="PhiForCausalLM has a bias, and a BlockDrafter uses only the weight"
    ):
        BlockDrafter(BlockConfig(num_hidden_layers=1, block_size=4, mask_token_id=0)).build(V, model)
    with pytest.raises(ValueError, match="lm_head of PhiForCausalLM has a bias"):
        CausalDrafter(from_target=TargetLayers(2)).build(V, model)
    assert (
        EagleDrafter(EagleConfig(target_layer_ids=(0, 1, 2))).build(V, model).vocab_size == V
    )  # has an lm_head of its own


def test_facts_of_a_multimodal_config_are_those_of_its_text() -> None:
    facts = facts_of(made("Gemma3", **GEMMA))
    assert (facts.num_layers, facts.hidden_size, facts.vocab_size) == (4, 32, V)
    assert (facts.max_positions, facts.window, facts.context_limit) == (128, 16, 16)
    assert context_limit(made("Llama")) == 128
    assert context_limit(object()) is None


@pytest.mark.parametrize(("dtype", "refused"), [(torch.float32, True), (torch.bfloat16, False)])
def test_one_node_may_differ_in_16_bits(
    dtype: torch.dtype, refused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As where a router's near-tie falls the other way; trees of a model with a wrong mask differ at most."""
    extend = CachedLM.extend

    def flipped(self: CachedLM, *args: Any) -> Tensor:
        logits = extend(self, *args)
        logits[3] = logits[3].flip(0)
        return logits

    monkeypatch.setattr(CachedLM, "extend", flipped)
    if refused:
        with pytest.raises(ValueError, match="LlamaForCausalLM does not decode token trees"):
            CachedLM(made("Llama").to(dtype))
    else:
        CachedLM(made("Llama").to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_probe_finds_what_no_config_states(dtype: torch.dtype) -> None:
    model = made("Llama").to(dtype)
    CachedLM(model)  # as it is, it passes in both dtypes

    class Rounded(type(model)):  # type: ignore[misc]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits.tanh()
            return output

    model = made("Llama").to(dtype)
    model.__class__ = Rounded
    with pytest.raises(ValueError, match="Rounded does not decode token trees as it reads plain text"):
        CachedLM(model)
    model = made("Llama").to(dtype)
    attention = model.model.layers[1].self_attn.forward
    model.model.layers[1].self_attn.forward = lambda *args, **kwargs: attention(
        *args, **(kwargs | {"attention_mask": None})
    )
    with pytest.raises(ValueError, match="LlamaForCausalLM does not decode token trees"):
        CachedLM(model)
