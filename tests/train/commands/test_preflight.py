"""`doctor --fit_config` passes every shipped config, and refuses what `fit` refuses, in the same words."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import certdraft
from certdraft.data.record import recording
from certdraft.train.commands import preflight as module
from certdraft.train.commands.cli import captured, main
from certdraft.train.commands.preflight import preflight
from certdraft.train.plan.model_sizes import read_config

CONFIGS = Path(certdraft.__file__).parent / "configs"
SHIPPED = sorted([*CONFIGS.glob("*.yaml"), *CONFIGS.glob("recipes/*/*.yaml"), *CONFIGS.glob("real/*.yaml")])


def resolved(config: Path) -> dict[str, Any]:
    code, text, complaint = captured(["fit", "--config", str(config), "--print_config"])
    assert not code, complaint
    settings: dict[str, Any] = yaml.safe_load(text)
    return settings


@pytest.fixture
def no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """Configs of Qwen3 targets are those that ship; no hub is asked."""
    monkeypatch.setattr(recording, "target_config", lambda name, revision=None: read_config(name))


@pytest.mark.usefixtures("no_hub")
@pytest.mark.parametrize(
    "config", [c for c in SHIPPED if c.parent.name != "real"], ids=lambda c: str(c.relative_to(CONFIGS))
)
def test_every_shipped_config_would_start(
    config: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    settings = resolved(config)
    monkeypatch.chdir(tmp_path)  # where nothing was recorded yet
    found = preflight(settings)
    assert "train trace is recorded by the first run" in found
    assert any("trainable parameters" in note for note in found)
    no_gpu = settings["trainer"]["accelerator"] == "gpu" and not torch.cuda.is_available()
    assert ("it asks for a GPU, and torch sees none here" in found) is no_gpu


def of_losses(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"certdraft.losses.{name}", "init_args": arguments}


def changed(settings: dict[str, Any], **changes: Any) -> dict[str, Any]:
    settings = copy.deepcopy(settings)
    for path, value in changes.items():
        *keys, last = path.split("__")
        part = settings
        for key in keys:
            part = part[key]
        part[last] = value
    return settings


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trainer__max_steps": -1}, "trainer.max_steps is not set"),
        ({"trainer__precision": "bf16-true"}, "most updates of half-precision weights are rounded away"),
        ({"data__init_args__record": None}, "does not exist; record it with `certdraft trace`"),
        ({"data__init_args__record__feature_layers": [1]}, r"the trace holds layers \(1,\) and lacks"),
        (
            {"data__init_args__server__url": "http://x", "data__init_args__feature_layers": [1]},
            r"the trace holds layers \(1,\) and lacks",
        ),
        ({"data__init_args__record__feature_layers": [99]}, "has layers 0 to 7"),
        ({"data__init_args__record__prompts__max_prompt_tokens": 9999}, "leaves no room"),
        ({"model__init_args__drafter__init_args__config": {"target_layer_ids": [1, 77, 6]}}, "77"),
        (
            {"model__init_args__loss": of_losses("RunnerUpForgivingCE", m=40)},
            "needs the 40 most probable target tokens .* K = 16",
        ),
        ({"model__init_args__loss": of_losses("ForwardKL", vocabulary="full")}, "full"),
        ({"model__init_args__step_weights": of_losses("LowMarginWeights", boost=-2.0)}, "boost=-2.0"),
    ],
)  # fmt: skip
def test_what_fit_would_refuse(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = resolved(CONFIGS / "eagle3-embedded.yaml")
    monkeypatch.chdir(tmp_path)
    preflight(settings)
    with pytest.raises(ValueError, match=message):
        preflight(changed(settings, **changes))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": of_losses("RunnerUpForgivingCE", m=[8, 4])}, r"RunnerUpForgivingCE: m=\[8, 4\] is"),
        ({"step_weights": of_losses("ReachWeights", candidates=[8, 4])}, r"ReachWeights: m=\[8, 4\] is"),
        (
            {"loss": of_losses("Ramp", losses=[
                of_losses("HardCE"), of_losses("RunnerUpForgivingCE", m=[8, 4])
            ], start=[1.0, 0.0], stop=[0.0, 1.0], begin=0.5)},
            r"RunnerUpForgivingCE: m=\[8, 4\] is",
        ),
    ],
)  # fmt: skip
def test_candidates_by_depth_need_draft_paths(
    changes: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Doctor says so of a causal drafter, and `fit` before it records anything."""
    settings = resolved(CONFIGS / "demo.yaml")
    monkeypatch.chdir(tmp_path)
    settings["model"]["init_args"] |= changes
    with pytest.raises(ValueError, match=message):
        preflight(settings)
    file = tmp_path / "wrong.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    code, _, said = captured(["fit", "--config", str(file)])
    assert code
    assert re.search(message, said)
    assert not any(tmp_path.rglob("*.arrow"))


def test_traces_that_are_there_are_compared_with_the_recording(
    settings: dict[str, Any], write: Callable[..., str], tiny: Path, tmp_path: Path
) -> None:
    """Another recording is refused as `fit` refuses it; one that was interrupted goes on."""
    corpus = {"source": str(tiny / "corpus.jsonl"), "split": "train", "validation_fraction": 0.2}
    generation = {"max_new_tokens": 24, "loops": "keep"}
    settings["data"] |= {
        "record": {"target": str(tiny / "target"), "corpus": corpus, "generation": generation},
        "validation_rows": None,
    }
    made = resolved(Path(write(settings)))
    assert preflight(made)[0].startswith("train trace of ")
    with pytest.raises(ValueError, match="num_kept: 32 there, 8 now"):
        preflight(changed(made, data__init_args__record__num_kept=8))
    begun = tmp_path / "begun"
    begun.mkdir()
    (begun / "shard-00000.arrow").write_bytes(b"")
    begun_run = changed(made, data__init_args__train=str(begun))
    assert preflight(begun_run)[0] == "train trace is recorded by the first run"
    with pytest.raises(ValueError, match="does not exist; record it"):
        preflight(changed(begun_run, data__init_args__record=None))


def test_a_trace_whose_target_is_elsewhere_is_no_problem(
    settings: dict[str, Any], write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def missing(*_: Any) -> None:
        raise FileNotFoundError("no config of 'x' here")

    made = resolved(Path(write(settings)))
    made["data"]["init_args"]["record"] = None
    monkeypatch.setattr(module, "meta_drafter", missing)
    assert preflight(made)[-1] == "the drafter is not checked: no config of 'x' here"


def test_a_trace_without_the_features_is_refused_as_fit_does(
    settings: dict[str, Any], write: Callable[..., str], capsys: pytest.CaptureFixture[str]
) -> None:
    config = {"num_hidden_layers": 1, "block_size": 4, "target_layer_ids": [0]}
    settings["model"]["drafter"] = {"class_path": "BlockDrafter", "init_args": {"config": config}}
    code, _, complaint = captured(["fit", "--config", write(settings)])
    assert code == 2, complaint
    with pytest.raises(SystemExit):
        main(["doctor", "--as_json", "true", "--hub", "false", "--fit_config", write(settings)])
    rows = json.loads(capsys.readouterr().out)
    found = next(row["found"] for row in rows if row["what"].startswith("config"))
    words = "the trace holds no features and lacks [0]"
    assert words in found
    assert words in " ".join(complaint.split())
