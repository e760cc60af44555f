"""Causal drafters cut from the target: which layers, equal where all are kept, trained and exported."""

import json
from pathlib import Path
from typing import Any

import jsonargparse
import pytest
import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from certdraft.drafters import CausalDrafter, Drafter, TargetLayers, export, lint_export, load_drafter

V = 96
TOKENS = torch.randint(0, V, (2, 12), generator=torch.Generator().manual_seed(1))


def random_target(sizes: dict[str, Any], kind: str = "Qwen3", **changes: Any) -> PreTrainedModel:
    torch.manual_seed(2)
    keys = sizes | {"num_hidden_layers": 4, "vocab_size": V} | changes
    config = getattr(transformers, f"{kind}Config")(**keys)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    return model


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [(1, [0]), (2, [0, 29]), (3, [0, 14, 29]), (30, list(range(30))), ([0, 1, 29], [0, 1, 29])],
)
def test_layers_are_named_or_evenly_spaced(layers: Any, chosen: list[int]) -> None:
    assert TargetLayers(layers).chosen(30) == chosen


@pytest.mark.parametrize("layers", [0, 31, [], [1, 0], [0, 0], [0, 30], [-1, 2]])
def test_layers_that_are_not_there_are_refused(layers: Any) -> None:
    with pytest.raises(ValueError, match=r"from_target.layers is .* give .*(30|29)"):
        TargetLayers(layers).chosen(30)


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("Qwen3", {"tie_word_embeddings": True}),
        ("Llama", {"tie_word_embeddings": False}),
        (
            "Qwen3Moe",
            {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16, "mlp_only_layers": [1]},
        ),
    ],
)
def test_all_layers_are_the_target(sizes: dict[str, Any], kind: str, changes: dict[str, Any]) -> None:
    target = random_target(sizes, kind, **changes)
    drafter = CausalDrafter(from_target=TargetLayers(4)).build(V, target).eval()
    assert torch.equal(drafter.logits(TOKENS), target(TOKENS).logits)
    assert drafter.model.config.tie_word_embeddings == target.config.tie_word_embeddings


def test_the_layers_kept_are_those_of_the_target(sizes: dict[str, Any]) -> None:
    target: Any = random_target(sizes)
    drafter: Any = CausalDrafter(from_target={"layers": [1, 3]}).build(V, target).eval()
    found = drafter.model.model
    assert len(found.layers) == drafter.model.config.num_hidden_layers == 2
    for layer, number in zip(found.layers, (1, 3), strict=True):
        expected = target.model.layers[number].state_dict()
        assert all(torch.equal(value, expected[name]) for name, value in layer.state_dict().items())
    target.model.layers = torch.nn.ModuleList([target.model.layers[1], target.model.layers[3]])
    target.config.num_hidden_layers = 2
    torch.testing.assert_close(drafter.logits(TOKENS), target(TOKENS, use_cache=False).logits)


def test_it_trains_exports_and_loads_again(
    sizes: dict[str, Any], tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    target = random_target(sizes)
    before = {name: value.clone() for name, value in target.state_dict().items()}
    drafter = CausalDrafter(from_target=TargetLayers(2)).build(V, target).train()
    optimiser = torch.optim.AdamW(drafter.parameters(), 1e-2)
    losses = []
    for _ in range(5):
        losses.append(
            torch.nn.functional.cross_entropy(drafter.logits(TOKENS).flatten(0, 1), TOKENS.flatten())
        )
        losses[-1].backward()
        assert all(parameter.grad is not None for parameter in drafter.parameters())
        optimiser.step()
        optimiser.zero_grad()
    assert losses[-1] < losses[0]
    assert all(torch.equal(value, before[name]) for name, value in target.state_dict().items())
    folder = export(drafter.eval(), tmp_path / "out", tokenizer=tokenizer, draft_length=3)
    assert not [finding for finding in lint_export(folder) if finding.level == "error"]
    assert torch.equal(load_drafter(folder).logits(TOKENS), drafter.logits(TOKENS))
    assert transformers.AutoModelForCausalLM.from_pretrained(folder).config.num_hidden_layers == 2


def test_a_target_is_needed(sizes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="from_target needs the target model"):
        CausalDrafter(from_target=TargetLayers(2)).build(V)
    with pytest.raises(ValueError, match="vocabulary of 96, the target of 97"):
        CausalDrafter(from_target=TargetLayers(2)).build(97, random_target(sizes))


def made(drafter: Drafter) -> Drafter:
    """A command with a drafter among its options."""
    return drafter


@pytest.mark.parametrize("layers", [2, [0, 3]])
def test_options_cut_a_drafter(sizes: dict[str, Any], layers: Any) -> None:
    options = {"class_path": "CausalDrafter", "init_args": {"from_target": {"layers": layers}}}
    drafter: Any = jsonargparse.auto_cli(made, args=[f"--drafter={json.dumps(options)}"], as_positional=False)
    drafter.build(V, Qwen3ForCausalLM(Qwen3Config(**sizes | {"num_hidden_layers": 4, "vocab_size": V})))
    assert drafter.model.config.num_hidden_layers == 2


def test_frozen_embeddings_stay_as_they_are(sizes: dict[str, Any]) -> None:
    target = random_target(sizes, tie_word_embeddings=False)
    drafter: Any = CausalDrafter(from_target={"layers": [0, 3]}, freeze_embeddings=True).build(V, target)
    trained = {name for name, parameter in drafter.named_parameters() if parameter.requires_grad}
    everything = {name for name, _ in drafter.named_parameters()}
    assert {name.removeprefix("network.") for name in everything - trained} == {
        "model.embed_tokens.weight", "lm_head.weight"
    }  # fmt: skip
    loss = torch.nn.functional.cross_entropy(drafter.train().logits(TOKENS).flatten(0, 1), TOKENS.flatten())
    loss.backward()
    assert all((p.grad is not None) == p.requires_grad for p in drafter.parameters())
