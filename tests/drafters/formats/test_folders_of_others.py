"""Folders written by hand are read for what they say, and refused where they say something else."""

from pathlib import Path
from typing import Any

import pytest
from oracles.mathematics.rotary import LINEAR
from oracles.models import drafter_layouts as layouts

from certdraft.drafters.dflash.export import read_dflash
from certdraft.drafters.eagle3.export import read_eagle3

V = layouts.V
MIXED = ("sliding_attention", "full_attention")


def changed(
    parts: tuple[dict[str, Any], dict[str, Any]], **keys: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    return {k: v for k, v in (parts[0] | keys).items() if v is not KeyError}, parts[1]


@pytest.mark.parametrize("speculators", [False, True])
def test_eagle3(tmp_path: Path, speculators: bool) -> None:
    config, vocab, weights = read_eagle3(
        layouts.write(tmp_path / "out", *layouts.eagle3(speculators=speculators))
    )
    assert (config.target_layer_ids, config.draft_vocab_size, vocab) == (layouts.TAPS, layouts.DV, V)
    assert (config.rope_theta, config.head_dim, config.qk_norm) == (5000.0, layouts.D, False)
    assert "midlayer.self_attn.q_proj.weight" in weights


@pytest.mark.parametrize("layout", ["dflash", "speculators", "transformers"])
def test_dflash(tmp_path: Path, layout: str) -> None:
    config, _, weights = read_dflash(layouts.write(tmp_path / "out", *layouts.dflash(layout)))
    assert (config.target_layer_ids, config.block_size, config.mask_token_id) == (layouts.TAPS, 6, V - 1)
    assert {"fc.weight", "hidden_norm.weight"} < weights.keys()


def test_older_spellings(tmp_path: Path) -> None:
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
        ({"norm_before_residual": "yes"}, "norm_before_residual is yes; must be true or false"),
        ({"norm_before_fc": True, "fc_norm": True}, "choose one of them"),
        ({"eagle_config": {"use_mtp_layernorm": True}}, "eagle_config says use_mtp_layernorm True"),
        (
            {"layer_types": ["sliding_attention"], "sliding_window": 8},
            "only DFlash drafters may have windo",
        ),
        ({"eagle_aux_hidden_state_layer_ids": [1, 3, 4]}, "name different layers"),
        ({"attention_bias": True}, "attention_bias True"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu'"),
        ({"rope_scaling": LINEAR}, "scale rotary positions differently"),
        ({"rope_scaling": LINEAR, "rope_parameters": {"rope_type": "dynamic"}}, "positions by 'dynamic'"),
        (
            {"rope_parameters": {"rope_type": "llama3", "factor": 8.0}},
            r"missing \['high_freq_factor', 'lo",
        ),
        ({"rope_parameters": LINEAR | {"beta": 1}}, r"unknown \['beta'\]"),
        ({"rope_parameters": {"full_attention": {}}}, "for each kind of layer"),
        ({"rope_theta": 1e4}, "needs one rope_theta"),
        ({"rms_norm_eps": KeyError}, "lacks rms_norm_eps"),
        ({"vocab_size": KeyError}, "lacks vocab_size"),
        ({"temperature_scale": 2.0}, "does not know: temperature_scale"),
        ({"num_hidden_layers": 2}, "not an EAGLE-3 head"),
        ({"model_type": "gpt2"}, "not an EAGLE-3 head"),
        ({"target_hidden_size": 64}, "not the target's 64"),
    ],
)
def test_eagle3_that_means_something_else(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_eagle3(layouts.write(tmp_path / "out", *changed(layouts.eagle3(), **keys)))


@pytest.mark.parametrize(
    ("layout", "keys", "message"),
    [
        (
            "dflash",
            {"layer_types": MIXED, "use_sliding_window": True},
            "sliding_window None; must be a nu",
        ),
        ("dflash", {"layer_types": MIXED, "sliding_window": 8}, "use_sliding_window false"),
        ("dflash", {"layer_types": ["full_attention"]}, "do not fit a drafter of 2 layers"),
        ("dflash", {"layer_types": ["chunked_attention"] * 2}, "do not fit a drafter of 2 layers"),
        (
            "dflash",
            {"layer_types": KeyError, "sliding_window": 8, "use_sliding_window": True},
            "no layer_types",
        ),
        ("dflash", {"is_causal": True, "dflash_config": {"causal": False}}, "must be one true or false"),
        ("dflash", {"dflash_config": {"mask_token_id": 5}}, "lacks target_layer_ids"),
        ("dflash", {"dflash_config": {"use_swa": True}}, "sliding_window None; must be a number"),
        (
            "dflash",
            {"dflash_config": {"attention_sink_bias": True}},
            "does not know: attention_sink_bias",
        ),
        ("dflash", {"block_size": KeyError}, "lacks block_size"),
        ("speculators", {"sample_from_anchor": True}, "sample_from_anchor True"),
        ("speculators", {"draft_vocab_size": 40}, "draft vocabulary 40 of 96"),
        ("speculators", {"max_anchors": 3}, r"unknown keys \['max_anchors'\]"),
        ("transformers", {"block_size": KeyError}, "lacks block_size"),
        ("transformers", {"layer_types": KeyError}, "would give every layer a window"),
    ],
)
def test_dflash_that_means_something_else(
    tmp_path: Path, layout: str, keys: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        read_dflash(layouts.write(tmp_path / "out", *changed(layouts.dflash(layout), **keys)))
