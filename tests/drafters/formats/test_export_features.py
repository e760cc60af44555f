"""Exports of EAGLE, block and DSpark drafters: every layout back, files alone draft alike, none guessed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from oracles.mathematics.rotary import LINEAR, LLAMA3, YARN
from oracles.models import drafter_layouts as layouts
from oracles.models.exported_readers import DFlashReader, DSparkReader, Eagle3Reader, speculate
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from certdraft.decoding import Chain, decode
from certdraft.drafters import (
    BlockConfig,
    BlockDrafter,
    CardFacts,
    DSparkConfig,
    DSparkDrafter,
    EagleConfig,
    EagleDrafter,
    export,
    lint_export,
    load_drafter,
    read_facts,
)
from certdraft.drafters.features.feature_folder import probe

V = layouts.V
Tokens = PreTrainedTokenizerFast
CARD = CardFacts(
    target="Qwen/Qwen3-8B",
    target_vocab_size=V,
    tokenizer_fingerprint="ab" * 32,
    target_architecture="Qwen3ForCausalLM",
)
FORMATS = [("eagle", "eagle3"), ("eagle", "speculators"), ("block", "dflash"), ("block", "speculators"),
           ("block", "transformers"), ("dspark", "dspark"), ("dspark", "speculators")]  # fmt: skip
READERS = {"eagle": Eagle3Reader, "block": DFlashReader, "dspark": DSparkReader}


# What other trainers' drafters may compute besides.
MIXED = ("sliding_attention", "full_attention")
VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    ("eagle", "eagle3", {"norm_before_residual": True, "norm_before_fc": True, "norm_output": True}),
    ("eagle", "speculators", {"norm_before_residual": True, "fc_norm": True, "rope_scaling": LLAMA3}),
    ("eagle", "speculators", {"norm_output": True, "rope_scaling": YARN}),
    ("eagle", "eagle3", {"rope_scaling": LINEAR}),
    ("block", "dflash", {"layer_types": MIXED, "sliding_window": 4}),
    ("block", "dflash", {"layer_types": MIXED, "sliding_window": 3, "causal": False, "rope_scaling": YARN}),
    ("block", "speculators", {"layer_types": MIXED, "sliding_window": 5, "causal": False}),
    ("block", "speculators", {"layer_types": MIXED[:1] * 2, "sliding_window": 5}),
]
HEADS: list[tuple[str, str, dict[str, Any]]] = [
    ("dspark", "dspark", {"sample_from_anchor": False, "markov_rank": 1}),
    ("dspark", "dspark", {"confidence_head_with_markov": False, "rope_scaling": YARN}),
    ("dspark", "speculators", {"enable_confidence_head": False, "sample_from_anchor": False}),
]


def enlarge(module: torch.nn.Module, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = 0.2 * noise if parameter.ndim > 1 else 1 + 0.3 * noise


@pytest.fixture(scope="module")
def target() -> Qwen3ForCausalLM:
    """A random target of six layers."""
    sizes = {key: value for key, value in layouts.SIZES.items() if key not in ("rope_theta", "dtype")}
    model = Qwen3ForCausalLM(Qwen3Config(**sizes, num_hidden_layers=layouts.LAYERS)).eval()
    enlarge(model, 7)
    return model.requires_grad_(False)


@pytest.fixture
def make(target: Qwen3ForCausalLM) -> Callable[..., EagleDrafter | BlockDrafter]:
    """Drafters of either family for it; keywords override the config."""

    def made(
        family: str, seed: int = 0, dtype: str = "float32", **changes: Any
    ) -> EagleDrafter | BlockDrafter:
        if family == "eagle":
            config = EagleConfig(**{"target_layer_ids": layouts.TAPS, "draft_vocab_size": 40} | changes)
            counts = torch.randperm(V, generator=torch.Generator().manual_seed(3))
            drafter: Any = EagleDrafter(config, dtype=dtype, max_lost_coverage=1.0).build(V, target, counts)
        else:
            fields = {
                "num_hidden_layers": 2,
                "block_size": 6,
                "mask_token_id": V - 1,
                "target_layer_ids": layouts.TAPS,
            }
            if family == "dspark":
                sizes = DSparkConfig(**fields | {"markov_rank": 5} | changes)
                drafter = DSparkDrafter(sizes, dtype=dtype).build(V, target)
            else:
                drafter = BlockDrafter(BlockConfig(**fields | changes), dtype=dtype).build(V, target)
        enlarge(drafter, seed)
        return drafter.to(getattr(torch, dtype)).eval()

    return made


Make = Callable[..., EagleDrafter | BlockDrafter]


@pytest.mark.parametrize(
    ("family", "format", "changes"), [*((*pair, {}) for pair in FORMATS), *VARIANTS, *HEADS], ids=str
)
def test_every_format_comes_back(
    make: Make, target: Qwen3ForCausalLM, tokenizer: Tokens, tmp_path: Path, family: str, format: str,
    changes: dict[str, Any],
) -> None:  # fmt: skip
    drafter = make(family, **changes)
    folder = export(drafter, tmp_path / "out", format, tokenizer=tokenizer, draft_length=4, card=CARD)
    loaded = load_drafter(folder, target=target)
    assert type(loaded) is type(drafter)
    assert not loaded.training
    assert loaded.config == drafter.config
    assert loaded.taps == drafter.taps == layouts.TAPS
    assert torch.equal(probe(loaded), probe(drafter))
    assert {n: v.shape for n, v in loaded.state_dict().items()} == {
        n: v.shape for n, v in drafter.state_dict().items()
    }
    prompt = [4, 8, 15, 16, 23, 42]
    mine, theirs = (decode(target, d, prompt, Chain(4), max_new_tokens=12) for d in (drafter, loaded))
    assert mine.tokens == theirs.tokens
    assert [r.accepted for r in mine.rounds] == [r.accepted for r in theirs.rounds]
    found = lint_export(folder)
    assert [finding for finding in found if finding.severity == "error"] == []
    said = bool(changes.keys() - {"rope_scaling"}) and family != "dspark"
    assert bool(found) == said, "what fewer engines compute is said"
    facts = read_facts(folder)
    assert (facts["family"], facts["format"], facts["draft_length"]) == (family, format, 4)


@pytest.mark.parametrize(
    ("family", "written"), [("eagle", "eagle3"), ("block", "dflash"), ("dspark", "dspark")]
)
def test_default_formats(make: Make, tokenizer: Tokens, tmp_path: Path, family: str, written: str) -> None:
    assert (
        read_facts(export(make(family), tmp_path / "out", tokenizer=tokenizer, draft_length=4))["format"]
        == written
    )


@pytest.mark.parametrize(
    ("family", "format", "changes"),
    [
        ("eagle", "eagle3", {}),
        ("eagle", "eagle3", {"draft_vocab_size": None}),
        ("eagle", "eagle3", {"qk_norm": True}),
        ("eagle", "eagle3", {"num_attention_heads": 2, "head_dim": 16, "rope_theta": 77.0}),
        ("eagle", "speculators", {"target_layer_ids": (0, 4)}),
        ("block", "dflash", {}),
        ("block", "dflash", {"num_hidden_layers": 1, "target_layer_ids": (2,), "rope_theta": 77.0}),
        ("block", "speculators", {"num_key_value_heads": 1}),
        *VARIANTS,
        *HEADS,
        ("dspark", "dspark", {}),
        ("dspark", "speculators", {"block_size": 5}),
    ],
    ids=str,
)  # fmt: skip
def test_the_files_alone_draft_the_same(
    make: Make, target: Qwen3ForCausalLM, tokenizer: Tokens, tmp_path: Path, family: str, format: str,
    changes: dict[str, Any],
) -> None:  # fmt: skip
    """A reader that never saw the module drafts, round by round, the same number of the same tokens."""
    drafter, length = make(family, **changes), 5
    folder = export(drafter, tmp_path / "out", format, tokenizer=tokenizer, draft_length=length, card=CARD)
    reader = READERS[family](folder, target)
    for start in (1, 30):
        prompt = [(start + 7 * i) % V for i in range(9)]
        mine = decode(target, drafter, prompt, Chain(length), max_new_tokens=16)
        tokens, rounds = speculate(target, reader, prompt, length, 16)
        assert tokens == mine.tokens
        assert rounds == [(r.nodes, r.accepted) for r in mine.rounds]
        known = target(torch.tensor([prompt]), output_hidden_states=True).hidden_states
        features = torch.stack([known[tap + 1][0, :-1] for tap in drafter.taps], 1)
        state = drafter.start(prompt[:-1], features)
        drafted, node = [], prompt[-1]
        for depth in range(1 if family == "block" else length):
            logits = drafter.draft(state, [node], [depth - 1])
            drafted += logits.argmax(-1).tolist()
            node = drafted[-1]
        assert drafted == reader.draft(prompt, [states[0] for states in known], length)


@pytest.mark.parametrize(("family", "format"), FORMATS)
def test_bf16_rounds_the_weights_and_nothing_else(
    make: Make, target: Qwen3ForCausalLM, tokenizer: Tokens, tmp_path: Path, family: str, format: str
) -> None:
    drafter = make(family)
    folder = export(
        drafter, tmp_path / "out", format, tokenizer=tokenizer, draft_length=4, card=CARD, dtype="bfloat16"
    )
    assert next(drafter.parameters()).dtype == torch.float32
    weights = load_file(folder / "model.safetensors")
    assert {str(w.dtype) for n, w in weights.items() if n not in ("d2t", "t2d")} == {"torch.bfloat16"}
    loaded = load_drafter(folder, target=target)
    assert next(loaded.parameters()).dtype == torch.bfloat16
    for name, value in drafter.state_dict().items():
        assert torch.equal(
            loaded.state_dict()[name], value.to(torch.bfloat16) if value.is_floating_point() else value
        )
    assert next(load_drafter(folder, target=target, dtype="float32").parameters()).dtype == torch.float32


@pytest.mark.parametrize(
    ("family", "format", "said"),
    [
        (
            "eagle",
            "eagle3",
            ['"method": "eagle3"', "--speculative-algorithm EAGLE3", "--spec-type draft-eagle3"],
        ),
        ("eagle", "speculators", ["vllm serve PATH_OF_THIS_FOLDER\n", '"method": "eagle3"']),
        (
            "block",
            "dflash",
            ['"method": "dflash"', "--speculative-num-draft-tokens 5", "--spec-type draft-dflash"],
        ),
        ("block", "speculators", ["vllm serve PATH_OF_THIS_FOLDER\n", '"method": "dflash"']),
        ("block", "transformers", ["MuseGlimmerAssistantModel.from_pretrained", 'speculation_type="dflash"']),
        ("dspark", "dspark", ['"method": "dspark"', "--speculative-dspark-block-size 4"]),
        ("dspark", "speculators", ["vllm serve PATH_OF_THIS_FOLDER\n", '"method": "dspark"']),
    ],
)
def test_cards_say_how_to_serve(
    make: Make, tokenizer: Tokens, tmp_path: Path, family: str, format: str, said: list[str]
) -> None:
    folder = export(make(family), tmp_path / "out", format, tokenizer=tokenizer, draft_length=4, card=CARD)
    text = ModelCard.load(folder / "README.md").text
    assert "layers 1, 3, 4" in text
    for command in said:
        assert command in text
    assert "\n\n\n" not in text
    assert ("SGLang" in text) == (format in ("eagle3", "dflash", "dspark"))


class TestRefusals:
    """What cannot be exported or loaded is refused by name, and leaves nothing behind."""

    @pytest.mark.parametrize(
        ("family", "arguments", "message"),
        [
            ("eagle", {"format": "dflash"}, "'dflash' for EagleDrafter; there is eagle3, speculators"),
            ("block", {"format": "eagle3"}, "there is dflash, speculators, transformers"),
            ("eagle", {"format": "speculators", "card": None}, "names the target and its class"),
            ("block", {"draft_length": 6}, "more than this drafter's block holds: 5"),
            ("eagle", {"adapter": True}, "for causal drafters"),
            ("dspark", {"format": "dflash"}, "there is dspark, speculators"),
            ("dspark", {"draft_length": 7}, "more than this drafter's block holds: 6"),
        ],
    )
    def test_arguments(
        self,
        make: Make,
        tokenizer: Tokens,
        tmp_path: Path,
        family: str,
        arguments: dict[str, Any],
        message: str,
    ) -> None:
        arguments = {"draft_length": 3, "card": CARD} | arguments
        with pytest.raises(ValueError, match=message):
            export(make(family), tmp_path / "out", tokenizer=tokenizer, **arguments)
        assert not list(tmp_path.iterdir())

    def test_not_finite_and_not_built(self, make: Make, tokenizer: Tokens, tmp_path: Path) -> None:
        drafter = make("eagle")
        drafter.fc.weight.data[0, 0] = torch.nan
        with pytest.raises(ValueError, match="not finite"):
            export(drafter, tmp_path / "out", tokenizer=tokenizer, draft_length=3)
        assert not list(tmp_path.iterdir())
        with pytest.raises(ValueError, match="has no target yet"):
            export(BlockDrafter(), tmp_path / "out", tokenizer=tokenizer, draft_length=3)

    def test_loading_needs_the_target(
        self, make: Make, target: Qwen3ForCausalLM, tokenizer: Tokens, tmp_path: Path
    ) -> None:
        folder = export(make("eagle"), tmp_path / "out", tokenizer=tokenizer, draft_length=3, card=CARD)
        with pytest.raises(ValueError, match="give target= the model Qwen/Qwen3-8B"):
            load_drafter(folder)
        small = Qwen3ForCausalLM(Qwen3Config(**dict(target.config.to_dict(), hidden_size=16)))
        with pytest.raises(ValueError, match="96 by 32, this one's are 96 by 16"):
            load_drafter(folder, target=small)
        short = Qwen3ForCausalLM(
            Qwen3Config(
                **{k: v for k, v in target.config.to_dict().items() if k != "layer_types"}
                | {"num_hidden_layers": 4}
            )
        )
        with pytest.raises(ValueError, match="this target has layers 0 to 3"):
            load_drafter(folder, target=short)
        weights = load_file(folder / "model.safetensors")
        weights["norm.weight"] += 1
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(ValueError, match="not the file that was exported"):
            load_drafter(folder, target=target)
