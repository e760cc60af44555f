"""Exports of EAGLE heads and block drafters: every layout back, the files alone draft alike, none guessed."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from oracles import drafter_layouts as layouts
from oracles.exported_readers import DFlashReader, Eagle3Reader, speculate
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from certdraft.decoding import Chain, decode
from certdraft.drafters import (
    BlockConfig,
    BlockDrafter,
    CardFacts,
    EagleConfig,
    EagleDrafter,
    export,
    lint_export,
    load_drafter,
    read_facts,
)
from certdraft.drafters.dflash.export import read_dflash
from certdraft.drafters.eagle3.export import read_eagle3
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
           ("block", "transformers")]  # fmt: skip


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
            drafter = BlockDrafter(BlockConfig(**fields | changes), dtype=dtype).build(V, target)
        enlarge(drafter, seed)
        return drafter.to(getattr(torch, dtype)).eval()

    return made


Make = Callable[..., EagleDrafter | BlockDrafter]


@pytest.mark.parametrize(("family", "format"), FORMATS)
def test_every_format_comes_back(
    make: Make, target: Qwen3ForCausalLM, tokenizer: Tokens, tmp_path: Path, family: str, format: str
) -> None:
    drafter = make(family)
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
    assert lint_export(folder) == ()
    facts = read_facts(folder)
    assert (facts["family"], facts["format"], facts["draft_length"]) == (family, format, 4)


@pytest.mark.parametrize(("family", "written"), [("eagle", "eagle3"), ("block", "dflash")])
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
    reader = (Eagle3Reader if family == "eagle" else DFlashReader)(folder, target)
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
        for depth in range(length if family == "eagle" else 1):
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
    assert ("SGLang" in text) == (format in ("eagle3", "dflash"))


class TestRefusals:
    """What cannot be exported or loaded is refused by name, and leaves nothing behind."""

    @pytest.mark.parametrize(
        ("family", "arguments", "message"),
        [
            ("eagle", {"format": "dflash"}, "'dflash' for EagleDrafter; there is eagle3, speculators"),
            ("block", {"format": "eagle3"}, "there is dflash, speculators, transformers"),
            ("eagle", {"format": "speculators", "card": None}, "names the target and its class"),
            ("block", {"draft_length": 6}, "more than a block of 6 holds"),
            ("eagle", {"adapter": True}, "for causal drafters"),
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


def changed(
    parts: tuple[dict[str, Any], dict[str, Any]], **keys: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    return {k: v for k, v in (parts[0] | keys).items() if v is not KeyError}, parts[1]


class TestFoldersOfOthers:
    """Folders written by hand are read for what they say, and refused where they say something else."""

    @pytest.mark.parametrize("speculators", [False, True])
    def test_eagle3(self, tmp_path: Path, speculators: bool) -> None:
        config, vocab, weights = read_eagle3(
            layouts.write(tmp_path / "out", *layouts.eagle3(speculators=speculators))
        )
        assert (config.target_layer_ids, config.draft_vocab_size, vocab) == (layouts.TAPS, layouts.DV, V)
        assert (config.rope_theta, config.head_dim, config.qk_norm) == (5000.0, layouts.D, False)
        assert "midlayer.self_attn.q_proj.weight" in weights

    @pytest.mark.parametrize("layout", ["dflash", "speculators", "transformers"])
    def test_dflash(self, tmp_path: Path, layout: str) -> None:
        config, _, weights = read_dflash(layouts.write(tmp_path / "out", *layouts.dflash(layout)))
        assert (config.target_layer_ids, config.block_size, config.mask_token_id) == (layouts.TAPS, 6, V - 1)
        assert {"fc.weight", "hidden_norm.weight"} < weights.keys()

    def test_older_spellings(self, tmp_path: Path) -> None:
        """Published folders leave out what they can; what is left still has one meaning."""
        parts = changed(
            layouts.eagle3(),
            rope_parameters=KeyError,
            head_dim=KeyError,
            eagle_config=KeyError,
            bos_token_id=1,
        )
        config, *_ = read_eagle3(layouts.write(tmp_path / "a", *parts))
        assert (config.rope_theta, config.head_dim, config.target_layer_ids) == (
            5000.0,
            layouts.D,
            layouts.TAPS,
        )
        bare = changed(parts, eagle_aux_hidden_state_layer_ids=KeyError)
        assert read_eagle3(layouts.write(tmp_path / "b", *bare))[0].target_layer_ids is None
        section = {"mask_token_id": 5, "target_layer_ids": [1, 3, 4], "block_size": 6}
        nested = changed(layouts.dflash(), block_size=KeyError, dflash_config=section)
        assert read_dflash(layouts.write(tmp_path / "c", *nested))[0].block_size == 6

    @pytest.mark.parametrize(
        ("keys", "message"),
        [
            ({"norm_before_residual": True}, "norm_before_residual True, which certdraft does not compute"),
            ({"norm_output": True}, "norm_output True"),
            ({"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}, "name different layers"),
            ({"attention_bias": True}, "attention_bias True"),
            ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
            ({"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "scales its rotary positions"),
            ({"rope_theta": 1e4}, "needs one rope_theta"),
            ({"rms_norm_eps": KeyError}, "lacks rms_norm_eps"),
            ({"vocab_size": KeyError}, "lacks vocab_size"),
            ({"temperature_scale": 2.0}, "does not know: temperature_scale"),
            ({"num_hidden_layers": 2}, "not an EAGLE-3 head"),
            ({"model_type": "gpt2"}, "not an EAGLE-3 head"),
            ({"target_hidden_size": 64}, "not the target's 64"),
        ],
    )
    def test_eagle3_that_means_something_else(
        self, tmp_path: Path, keys: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            read_eagle3(layouts.write(tmp_path / "out", *changed(layouts.eagle3(), **keys)))

    @pytest.mark.parametrize(
        ("layout", "keys", "message"),
        [
            ("dflash", {"layer_types": ["full_attention", "sliding_attention"]}, "sliding-window layers"),
            ("dflash", {"sliding_window": 64, "use_sliding_window": True}, "sliding-window layers"),
            ("dflash", {"dflash_config": {"mask_token_id": 5}}, "lacks target_layer_ids"),
            ("dflash", {"dflash_config": {"use_swa": True}}, "does not know: use_swa"),
            ("dflash", {"block_size": KeyError}, "lacks block_size"),
            ("dflash", {"is_causal": True}, "is_causal True"),
            ("speculators", {"sample_from_anchor": True}, "sample_from_anchor True"),
            ("speculators", {"draft_vocab_size": 40}, "draft vocabulary 40 of 96"),
            ("speculators", {"max_anchors": 3}, r"unknown keys \['max_anchors'\]"),
            ("transformers", {"block_size": KeyError}, "lacks block_size"),
        ],
    )
    def test_dflash_that_means_something_else(
        self, tmp_path: Path, layout: str, keys: dict[str, Any], message: str
    ) -> None:
        with pytest.raises(ValueError, match=message):
            read_dflash(layouts.write(tmp_path / "out", *changed(layouts.dflash(layout), **keys)))
