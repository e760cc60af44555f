"""`certdraft export` and `certdraft lint` on runs of drafters that read their target."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles.models.gguf_checkpoints import random_llama, write_gguf

from certdraft.data import Generation, Prompts, TraceMeta, load_target, record_trace
from certdraft.drafters import lint_export, load_drafter, read_facts
from certdraft.train.commands.cli import main

EAGLE = {
    "class_path": "EagleDrafter",
    "init_args": {
        "unroll": 2,
        "max_lost_coverage": 1.0,
        "config": {"target_layer_ids": [0], "draft_vocab_size": 200},
    },
}
BLOCK = {
    "class_path": "BlockDrafter",
    "init_args": {
        "num_anchors": 8,
        "config": {"num_hidden_layers": 1, "block_size": 4, "target_layer_ids": [0]},
    },
}


@pytest.mark.parametrize(("drafter", "format", "length"), [(EAGLE, "eagle3", 4), (BLOCK, "dflash", 3)])
def test_a_run_becomes_a_folder(
    tiny: Path,
    settings: dict[str, Any],
    write: Callable[..., str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    drafter: dict[str, Any],
    format: str,
    length: int,
) -> None:
    settings["model"] |= {"drafter": drafter, "target": {"name": str(tiny / "target")}}
    settings["trainer"] |= {"max_steps": 2, "val_check_interval": 2}
    main(["fit", "--config", write(settings)])
    run, out = next((tmp_path / "runs" / "tiny").iterdir()), tmp_path / "out"
    main(["export", "--run", str(run), "--out", str(out)])
    main(["export", str(run)])
    assert read_facts(run / "export")["facts"]["name"] == "tiny"
    facts = read_facts(out)
    assert (facts["format"], facts["draft_length"]) == (format, length)
    assert facts["facts"]["target_architecture"] == "Qwen3ForCausalLM"

    loaded = load_drafter(out, target=load_target(str(tiny / "target")))
    content = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)
    trained = {n.removeprefix("drafter."): v for n, v in content["state_dict"].items() if "drafter." in n}
    assert trained.keys() == loaded.state_dict().keys()
    best = run / "checkpoints" / "best.ckpt"
    if not best.exists():
        assert all(torch.equal(loaded.state_dict()[name], value) for name, value in trained.items())

    capsys.readouterr()
    main(["lint", "--path", str(out), "--target", str(tiny / "target")])
    assert f"{out}: no error" in capsys.readouterr().out
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"rope_theta": 7.0}))
    with pytest.raises(SystemExit) as stop:
        main(["lint", "--path", str(out)])
    assert stop.value.code == 2
    assert "error: rope_theta: is 7.0" in capsys.readouterr().err


@pytest.mark.parametrize(("steps", "measured"), [(4, True), (5, False)])
def test_the_card_tells_metrics_of_these_weights_alone(
    settings: dict[str, Any], write: Callable[..., str], tmp_path: Path, steps: int, measured: bool
) -> None:
    """Of five steps the fourth was validated: the fifth's weights have no metrics."""
    settings["trainer"] |= {"max_steps": steps, "val_check_interval": 4}
    main(["fit", "--config", write(settings)])
    run = next((tmp_path / "runs" / "tiny").iterdir())
    main(["export", "--run", str(run / "checkpoints" / "last.ckpt"), "--out", str(tmp_path / "out")])
    facts = read_facts(tmp_path / "out")["facts"]
    assert bool(facts["metrics"]) is measured
    assert ("at step 4" in facts["evaluated_on"]) is measured


def test_dequantised_targets_are_stated_in_trace_and_card(
    settings: dict[str, Any], write: Callable[..., str], tmp_path: Path
) -> None:
    """A drafter learns the text of the rounded weights; who serves it with others must know."""
    target, trace = tmp_path / "target", tmp_path / "trace"
    target.mkdir()
    write_gguf(random_llama(), target / "tiny.Q8_0.gguf")
    meta = record_trace(
        str(trace), str(target), prompts=Prompts(template="none", max_prompt_tokens=20),
        generation=Generation(max_new_tokens=16, max_length=64, loops="keep"), num_kept=8, accelerator="cpu",
        rows=[{"prompt": word} for word in ("abcd", "xyz", "cdab", "hello", "world", "drafter")],
    )  # fmt: skip
    assert meta.weights_origin == TraceMeta.read(trace / "trace.json").weights_origin
    assert meta.weights_origin == "dequantised from Q8_0 GGUF"
    settings["data"] |= {"train": str(trace), "validation": str(trace), "batch_size": 2}
    settings["trainer"] |= {"max_steps": 1, "limit_val_batches": 0}
    main(["fit", "--config", write(settings)])
    run, out = next((tmp_path / "runs" / "tiny").iterdir()), tmp_path / "out"
    main(["export", "--run", str(run), "--out", str(out)])
    assert read_facts(out)["facts"]["target_weights"] == meta.weights_origin
    assert "a target with weights dequantised from Q8_0 GGUF" in (out / "README.md").read_text()
    assert not [finding for finding in lint_export(out) if finding.severity == "error"]
