"""Drafters of other trainers: read, trained further, decoded, exported, linted and read again."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from oracles.mathematics.rotary import LLAMA3, YARN
from oracles.models import drafter_layouts as layouts
from transformers import PreTrainedTokenizerFast

from certdraft.data import Corpus, Generation, TraceDataModule, record_trace
from certdraft.decoding import Chain, decode, greedy
from certdraft.drafters import BlockDrafter, CardFacts, EagleDrafter, export, load_causal_lm, load_drafter
from certdraft.drafters.features.feature_folder import probe
from certdraft.losses import HardCE
from certdraft.train import DrafterModule
from certdraft.train.commands.cli import main

pytestmark = pytest.mark.filterwarnings("ignore:.*LeafSpec")
MIXED = ["sliding_attention", "full_attention"]
WINDOW = {"sliding_window": 5, "use_sliding_window": True}
EAGLE_31 = {"norm_before_residual": True, "norm_before_fc": True, "norm_output": True}
# Layout, keys of the folder's own config, keys of its network.
VARIANTS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "EAGLE-3.1 of speculators, yarn": ("eagle-speculators", EAGLE_31, {"rope_parameters": YARN}),
    "EAGLE-3 with a norm a layer, llama3": ("eagle3", {"fc_norm": True}, {"rope_scaling": LLAMA3}),
    "EAGLE-3 of ModelOpt": (
        "eagle3", {"eagle_config": {"norm_before_fc": True, "use_last_layernorm": True}}, {},
    ),
    "DFlash of z-lab, windows": ("dflash", {}, {"layer_types": MIXED, **WINDOW}),
    "DFlash of ModelOpt, windows everywhere": (
        "dflash",
        {"dflash_config": {"use_swa": True, "swa_window_size": 6, "causal": False}},
        {"sliding_window": 6},
    ),
    "DFlash of speculators, windows": (
        "speculators", {"sliding_window_non_causal": False}, {"layer_types": MIXED, **WINDOW},
    ),
    "DFlash of speculators, in both directions": ("speculators", {}, {"layer_types": MIXED, **WINDOW}),
    "DFlash of transformers, windows": ("transformers", {}, {"layer_types": MIXED, "sliding_window": 4}),
}  # fmt: skip


@pytest.fixture(scope="module")
def trace(tiny: Path) -> Path:
    """The tiny target's text with the output of its first layer."""
    folder = tiny / "theirs"
    if not folder.exists():
        record_trace(
            str(folder), str(tiny / "target"), Corpus(source=str(tiny / "corpus.jsonl")),
            generation=Generation(max_new_tokens=24, loops="keep"), accelerator="cpu", feature_layers=(0,),
        )  # fmt: skip
    return folder


def published(path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as its trainer writes it, for the tiny target."""
    layout, own, network = VARIANTS[name]
    for key, value in {"V": 304, "TAPS": (0,), "LAYERS": 2}.items():
        monkeypatch.setattr(layouts, key, value)
    monkeypatch.setitem(layouts.SIZES, "vocab_size", 304)
    if layout.startswith("eagle"):
        config, weights = layouts.eagle3(speculators="-" in layout)
    else:
        config, weights = layouts.dflash(layout)
    config = json.loads(json.dumps(config))
    inner = config.get("transformer_layer_config", config)
    if network.keys() & {"rope_scaling", "rope_parameters"}:
        inner.pop("rope_parameters")
    inner |= network
    for key, value in own.items():
        config[key] = config[key] | value if isinstance(value, dict) else value
    flags = own | own.get("eagle_config", {})
    if flags.get("norm_before_fc"):
        weights["input_norm.weight"] = torch.rand(layouts.H) + 0.5
    if flags.get("fc_norm"):
        weights["fc_norm.0.weight"] = torch.rand(layouts.H) + 0.5
    return layouts.write(path, config, weights)


@pytest.mark.parametrize("name", VARIANTS)
def test_round_trip(
    name: str, tiny: Path, trace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    source = published(tmp_path / "theirs", name, monkeypatch)
    kind: Any = EagleDrafter if VARIANTS[name][0].startswith("eagle") else BlockDrafter
    more = {"unroll": 3, "max_lost_coverage": 1.0} if kind is EagleDrafter else {"num_anchors": 8}
    drafter = kind(pretrained=str(source), **more)
    data = TraceDataModule(str(trace), seq_len=64, batch_size=4)
    trainer = pl.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(DrafterModule(drafter, HardCE()), data)
    first = kind(pretrained=str(source), **more).build(304, load_causal_lm(tiny / "target"))
    moved = [
        key for key, value in first.state_dict().items() if not torch.equal(value, drafter.state_dict()[key])
    ]
    assert {key for key, value in first.named_parameters()} == set(moved), "everything of theirs is trained"

    drafter.eval()
    target = load_causal_lm(tiny / "target")
    prompt = list(range(40, 72))
    text = greedy(target, prompt, 24)
    mine = decode(target, drafter, prompt, Chain(3), max_new_tokens=24)
    assert mine.tokens == text

    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny / "target")
    card = CardFacts("target", 304, "ab" * 32, target_architecture="Qwen3ForCausalLM")
    wanted = {"eagle-speculators": "speculators"}.get(VARIANTS[name][0], VARIANTS[name][0])
    format = "dflash" if name == "DFlash of speculators, windows" else wanted
    if format != wanted:  # its windows in order, its full layers in both directions: vLLM reads another flag
        with pytest.raises(ValueError, match="Export it as dflash"):
            export(drafter, tmp_path / "no", wanted, tokenizer=tokenizer, draft_length=3, card=card)
    folder = export(drafter, tmp_path / "ours", format, tokenizer=tokenizer, draft_length=3, card=card)
    main(["lint", "--path", str(folder), "--target", str(tiny / "target")])
    assert f"{folder}: no error" in capsys.readouterr().out
    loaded = load_drafter(folder, target=target)
    assert loaded.config == drafter.config
    assert torch.equal(probe(loaded), probe(drafter))
    again = decode(target, loaded, prompt, Chain(3), max_new_tokens=24)
    assert [r.accepted for r in again.rounds] == [r.accepted for r in mine.rounds]
