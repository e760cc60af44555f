"""The static check: right folders pass, every defect that files can show is found and named."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.models import drafter_layouts as layouts
from torch import Tensor

from certdraft.drafters import lint_export
from certdraft.drafters.formats.lint_export import layout_of
from certdraft.drafters.formats.lint_files import read_folder

Parts = tuple[dict[str, Any], dict[str, Tensor]]
MAKE: dict[str, Callable[[], Parts]] = {
    "eagle3": layouts.eagle3,
    "eagle3-speculators": lambda: layouts.eagle3(speculators=True),
    "dflash": layouts.dflash,
    "dflash-speculators": lambda: layouts.dflash("speculators"),
    "dflash-transformers": lambda: layouts.dflash("transformers"),
    "dspark": layouts.dspark,
    "dspark-speculators": lambda: layouts.dspark("speculators"),
}


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """config.json of the target of `layouts`."""
    file = tmp_path / "target.json"
    file.write_text(json.dumps(layouts.TARGET))
    return file


@pytest.mark.parametrize("layout", MAKE)
def test_right_folders_pass(tmp_path: Path, target: Path, layout: str) -> None:
    folder = layouts.write(tmp_path / "out", *MAKE[layout]())
    assert layout_of(read_folder(folder)).name == layout
    assert lint_export(folder) == ()
    assert lint_export(folder, target) == ()


def absolute(config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    weights["d2t"] += torch.arange(layouts.DV)


def other_marks(config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    weights["t2d"] = weights["t2d"].roll(1)


def unsorted(config: dict[str, Any], weights: dict[str, Tensor]) -> None:
    weights["d2t"][3] = 90


def drop(*names: str) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda config, weights: [weights.pop(name) for name in names] and None


def put(key: str, value: Any) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def change(config: dict[str, Any], weights: dict[str, Tensor]) -> None:
        *path, last = key.split("/")
        for step in path:
            config = config[int(step)] if isinstance(config, list) else config[step]
        if value is KeyError:
            del config[last]
        else:
            config[last] = value

    return change


def prefixed(prefix: str) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    def change(config: dict[str, Any], weights: dict[str, Tensor]) -> None:
        for name in list(weights):
            weights[prefix + name] = weights.pop(name)

    return change


def extra(name: str, shape: tuple[int, ...]) -> Callable[[dict[str, Any], dict[str, Tensor]], None]:
    return lambda config, weights: weights.update({name: torch.zeros(shape)})


STRETCHED = {"rope_type": "linear", "factor": 2.0, "rope_theta": 5000.0}
IDS = "eagle_aux_hidden_state_layer_ids"
INNER = "transformer_layer_config"
METHOD, VERIFIER = "speculators_config/proposal_methods/0", "speculators_config/verifier"
BROKEN: list[tuple[str, str, Callable[..., None], str]] = [
    ("eagle3", "ids off by one", put(IDS, [1, 3, 4]), r"is \[1, 3, 4\]; must be \[0, 2, 3\]"),
    ("eagle3", "ids missing", put(IDS, KeyError), f"{IDS}: is None"),
    ("eagle3", "ids not ascending", put(IDS, [4, 2, 5]), "ascending"),
    ("eagle3", "ids of embeddings", put(IDS, [0, 4, 5]), "each from 1 on"),
    ("eagle3", "nested missing", put("eagle_config", KeyError), f"eagle_config.{IDS}: is None"),
    ("eagle3", "use_aux off", put("eagle_config/use_aux_hidden_state", False), "must be True"),
    ("eagle3", "residual flag wrong", put("norm_before_residual", 1), "norm_before_residual: is 1"),
    ("eagle3", "residual flag missing", put("norm_before_residual", KeyError), "residual: is None; must"),
    ("eagle3", "optional flag", put("fc_norm", True), "fc_norm.0.weight: is missing"),
    ("eagle3", "norm of no flag", extra("input_norm.weight", (96,)), "input_norm.weight: is not a tensor"),
    ("eagle3", "scaling of old readers", put("rope_scaling", {"rope_type": "yarn"}), "rope_scaling: is {'ro"),
    ("eagle3", "scaling of new readers", put("rope_parameters", STRETCHED), "write the same to both"),
    ("eagle3", "d2t absolute", absolute, "d2t: holds token ids"),
    ("eagle3", "d2t out of order", unsorted, "d2t: the token ids"),
    ("eagle3", "t2d of others", other_marks, "t2d: marks 40 tokens that are not"),
    ("eagle3", "d2t missing", drop("d2t"), "d2t: is missing"),
    ("eagle3", "both tables missing", drop("d2t", "t2d"), "t2d: is missing"),
    ("eagle3", "head missing", drop("lm_head.weight"), "lm_head.weight: is missing"),
    ("eagle3", "trainer prefix", prefixed("draft_model."), "drop the prefix 'draft_model.'"),
    ("eagle3", "speculators' names", prefixed("layers.0."), "is missing"),
    ("eagle3", "unknown tensor", extra("mask_hidden", (1,)), "mask_hidden: is not a tensor of this format"),
    ("eagle3", "full head", put("draft_vocab_size", layouts.V), "lm_head.weight: has shape"),
    ("eagle3", "rope of old readers", put("rope_theta", 1e4), "rope_theta: is 10000.0"),
    ("eagle3", "rope of new readers", put("rope_parameters", None), "rope_parameters: must hold"),
    ("eagle3", "architecture", put("architectures", ["LlamaForCausalLM"]), "LlamaForCausalLMEagle3"),
    ("eagle3", "layers", put("num_hidden_layers", 2), "an EAGLE-3 head has 1"),
    ("eagle3", "tied", put("tie_word_embeddings", True), "tie_word_embeddings: must be False"),
    ("eagle3", "size", put("head_dim", KeyError), "head_dim: must be a positive integer"),
    ("eagle3", "columns of fc", put(IDS, [2, 4, 5, 6]), r"fc.weight: has shape \[32, 96\]"),
    ("eagle3-speculators", "residual", put("norm_before_residual", KeyError), "speculators default diff"),
    ("eagle3-speculators", "K", put(f"{METHOD}/speculative_tokens", 0), "positive"),
    ("eagle3-speculators", "target missing", put(f"{VERIFIER}/name_or_path", ""), "verifier"),
    ("eagle3-speculators", "version", put("speculators_version", KeyError), "version: is missing"),
    ("eagle3-speculators", "model type", put(f"{INNER}/model_type", KeyError), "must be llama"),
    ("eagle3-speculators", "flat names", prefixed("midlayer."), "fc.weight: is missing"),
    ("dflash", "ids out of range", put("dflash_config/target_layer_ids", [2, 4, 5]), "hands out of 6 is 4"),
    ("dflash", "ids not ascending", put("dflash_config/target_layer_ids", [4, 3, 1]), "ascending"),
    ("dflash", "ids missing", put("dflash_config/target_layer_ids", KeyError), "another default"),
    ("dflash", "mask beyond V", put("dflash_config/mask_token_id", layouts.V), "mask_token_id: is 96"),
    ("dflash", "mask missing", put("dflash_config/mask_token_id", None), "mask_token_id: is None"),
    ("dflash", "block size missing", put("block_size", KeyError), "block_size: is None"),
    ("dflash", "block sizes differ", put("dflash_config/block_size", 8), "in dflash_config 8"),
    ("dflash", "window", put("sliding_window", 128), "sliding_window: is set"),
    ("dflash", "window layers", put("layer_types", ["sliding_attention"] * 2), "is None, but layers slide"),
    ("dflash", "window dropped", put("layer_types", ["sliding_attention"] * 2), "window: is not true"),
    ("dflash", "kinds of layers", put("layer_types", ["full_attention"]), "or sliding_attention, 2 times"),
    ("dflash", "order", put("dflash_config/causal", True), "dflash_config.causal: is True, is_causal None"),
    ("dflash", "window twice", put("dflash_config/swa_window_size", 9), "swa_window_size: is 9, sliding_w"),
    ("dflash", "prefix", prefixed("model."), "drop the prefix 'model.'"),
    ("dflash", "mask_hidden", extra("mask_hidden", (32,)), "mask_hidden: is not a tensor"),
    ("dflash", "own head", extra("lm_head.weight", (96, 32)), "lm_head.weight: is not"),
    ("dflash", "own embeddings", extra("embed_tokens.weight", (96, 32)), "embed_tokens.weight: is not"),
    ("dflash", "target layers unknown", put("num_target_layers", KeyError), "must be a positive"),
    ("dflash", "no q_norm", drop("layers.1.self_attn.q_norm.weight"), "q_norm.weight: is missing"),
    ("dflash-speculators", "causal", put("sliding_window_non_causal", False), "makes every layer causal"),
    ("dflash-speculators", "ids", put("aux_hidden_state_layer_ids", [0, 3]), "names layers"),
    ("dflash-speculators", "draft vocabulary", put("draft_vocab_size", 40), "must be vocab_size, 96"),
    ("dspark", "ids out of range", put("target_layer_ids", [2, 4, 5]), "hands out of 6 is 4"),
    ("dspark", "anchor twice", put("dspark_bonus_anchor", True), "one is not the other"),
    ("dspark", "another head", put("markov_head_type", "gated"), "must be 'vanilla'"),
    ("dspark", "confidence unsaid", put("enable_confidence_head", KeyError), "must be true or false"),
    ("dspark", "what it reads", put("confidence_head_with_markov", KeyError), "default is false"),
    ("dspark", "what it read", put("confidence_head_with_markov", False), "confidence_head.proj.weight: has"),
    ("dspark", "rank", put("markov_rank", 4), "markov_w1.weight: has shape"),
    ("dspark", "no correction", drop("markov_head.markov_w2.weight"), "markov_w2.weight: is missing"),
    ("dspark", "windows", put("layer_types", ["sliding_attention"] * 2), "readers of this format"),
    ("dspark", "architecture", put("architectures", ["DSparkDraftModel"]), "Qwen3DSparkModel"),
    ("dspark-speculators", "anchor unsaid", put("sample_from_anchor", KeyError), "defaults differ"),
    ("dspark-speculators", "ids", put("aux_hidden_state_layer_ids", [0, 3]), "names layers"),
    ("dspark-speculators", "own head", extra("lm_head.weight", (96, 32)), "lm_head.weight: is not"),
    ("dflash-transformers", "names", prefixed("encoder."), "encoder.fc.weight: is missing"),
    ("dflash-transformers", "mask", put("mask_token_id", -1), "mask_token_id: is -1"),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "change", "message"), [(a, c, d) for a, _, c, d in BROKEN],
                         ids=[f"{a}: {b}" for a, b, *_ in BROKEN])  # fmt: skip
def test_defects_are_named(tmp_path: Path, layout: str, change: Callable[..., None], message: str) -> None:
    config, weights = MAKE[layout]()
    change(config, weights)
    found = lint_export(layouts.write(tmp_path / "out", config, weights))
    assert any(f.severity == "error" and re.search(message, str(f)) for f in found), "\n".join(
        map(str, found)
    )


@pytest.mark.parametrize(
    ("layout", "change", "message"),
    [
        ("eagle3", {"hidden_size": 64}, "the target has 64"),
        ("eagle3", {"vocab_size": 128}, "vocab_size: is 96, the target's 128"),
        ("eagle3", {"num_hidden_layers": 5}, "before the final norm is 4"),
        ("dflash", {"num_hidden_layers": 5}, "num_target_layers: is 6, the target has 5"),
        ("dflash", {"hidden_size": 64}, "96 by 64"),
        ("dflash-speculators", {"num_hidden_layers": 5}, "hands out of 5 is 3"),
        ("dspark", {"num_hidden_layers": 5}, "num_target_layers: is 6, the target has 5"),
        ("dspark-speculators", {"hidden_size": 64}, "96 by 64"),
        ("dflash-transformers", {"vocab_size": 90}, "mask_token_id: is 95"),
    ],
)
def test_another_target(tmp_path: Path, layout: str, change: dict[str, int], message: str) -> None:
    folder = layouts.write(tmp_path / "out", *MAKE[layout]())
    (tmp_path / "config.json").write_text(json.dumps(layouts.TARGET | change))
    assert message in "\n".join(map(str, lint_export(folder, tmp_path)))


def test_what_only_vllm_reads_is_a_warning(tmp_path: Path) -> None:
    config, weights = layouts.eagle3(speculators=True)
    config["norm_before_residual"] = True
    (finding,) = lint_export(layouts.write(tmp_path / "out", config, weights))
    assert str(finding).startswith("warning: norm_before_residual: is true, which only vLLM")
    config, weights = layouts.dflash()
    config |= {"layer_types": ["sliding_attention"] * 2, "sliding_window": 8, "use_sliding_window": True}
    (finding,) = lint_export(layouts.write(tmp_path / "out", config, weights))
    assert str(finding).startswith("warning: layer_types: has windows")


def test_unreadable_folders(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such folder"):
        lint_export(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=r"no config.json there"):
        lint_export(tmp_path)
    config, weights = layouts.dflash()
    folder = layouts.write(tmp_path / "out", config, weights)
    with pytest.raises(FileNotFoundError, match="give the target's folder"):
        lint_export(folder, tmp_path / "nowhere")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    for content, message in [
        (whole[:100], "only the beginning"),
        (b"\x08" + 15 * b"\0", "unreadable header"),
    ]:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            lint_export(folder)
    file.unlink()
    with pytest.raises(FileNotFoundError, match=r"no model.safetensors there; engines load safetensors"):
        lint_export(folder)
    (folder / "config.json").write_text("[]")
    with pytest.raises(ValueError, match="holds a list"):
        lint_export(folder)
