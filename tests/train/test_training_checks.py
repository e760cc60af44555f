"""Precision, optimiser and gradients: a setting works, or is refused with the way out."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from certdraft.train import OptimizerSettings
from certdraft.train.commands.cli import main
from certdraft.train.runs.checkpoint_file import read_checkpoint

Write = Callable[..., str]


@pytest.fixture
def settings(settings: dict[str, Any]) -> dict[str, Any]:
    settings["trainer"] |= {"max_steps": 2, "limit_val_batches": 0}
    return settings


def refusal(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *args])
    said = capsys.readouterr().err
    assert stop.value.code == 2, said
    return said


def test_half_precision_weights_are_refused(
    settings: dict[str, Any], write: Write, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write(settings)
    said = refusal(capsys, "--config", config, "--trainer.precision", "bf16-true")
    assert "trainer.precision is bf16-true" in said
    assert "Use bf16-mixed" in said
    said = refusal(capsys, "--config", config, "--model.drafter.dtype", "bfloat16")
    assert "trainable weights are in half precision" in said
    assert "trainer.precision: bf16-mixed" in said


def test_norms_move_under_mixed_precision(settings: dict[str, Any], write: Write) -> None:
    settings["trainer"] |= {"precision": "bf16-mixed", "max_steps": 4}
    settings["model"]["optimizer"] = {"lr": 1e-4, "warmup_steps": 0}
    main(["fit", "--config", write(settings)])
    state = read_checkpoint(next(Path(settings["runs_dir"]).rglob("last.ckpt")))["state_dict"]
    norms = [value for name, value in state.items() if "norm" in name]
    assert norms
    assert all((value != 1).any() for value in norms)


def test_a_weight_without_a_gradient_is_named(
    settings: dict[str, Any], write: Write, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from transformers import AutoConfig, Qwen3ForCausalLM

    shutil.copytree(tiny / "target", tmp_path / "untied")
    config = AutoConfig.from_pretrained(tiny / "target", tie_word_embeddings=False)
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "untied")
    lora = {"rank": 2, "target_modules": ["q_proj", "lm_head"]}
    init = {"pretrained": str(tmp_path / "untied"), "lora": lora}
    settings["model"]["drafter"] = {"class_path": "CausalDrafter", "init_args": init}
    said = refusal(capsys, "--config", write(settings))
    assert "lm_head" in said
    assert "lora.target_modules" in said


def test_a_fused_optimiser_clips_under_mixed_precision(
    settings: dict[str, Any], write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on CUDA, where Lightning itself refuses the pair."""
    build = OptimizerSettings.build
    norms: list[float] = []

    def fused(self: OptimizerSettings, module: Any, max_steps: int, fused: bool = False) -> Any:
        built = build(self, module, max_steps, fused=True)

        def note(*_: Any) -> None:
            grads = [p.grad.flatten() for p in module.parameters() if p.grad is not None]
            norms.append(float(torch.cat(grads).norm()))

        built["optimizer"].register_step_post_hook(note)
        return built

    monkeypatch.setattr(OptimizerSettings, "build", fused)
    settings["trainer"] |= {"precision": "bf16-mixed", "gradient_clip_val": 0.01}
    main(["fit", "--config", write(settings)])
    assert max(norms) == pytest.approx(0.01, rel=1e-3)  # the first batch has no learned position


def test_the_test_split_has_the_metrics_of_validation(
    settings: dict[str, Any], write: Write, tiny: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    main(["fit", "--config", write(settings)])
    settings["trainer"]["limit_val_batches"] = 1.0
    config = write(settings)
    ask = ["--config", config, "--ckpt_path", "last"]
    with pytest.raises(SystemExit):
        main(["test", *ask])
    assert "name one with --data.test" in capsys.readouterr().err

    main(["validate", *ask])
    validated = metrics(capsys.readouterr().out)
    main(["test", *ask, "--data.test", str(tiny / "validation")])
    tested = metrics(capsys.readouterr().out)
    assert set(tested) >= {"tau_expected", "coverage@4", "kl_nats"}
    assert tested == validated


def metrics(table: str) -> dict[str, str]:
    rows = [line.split() for line in table.splitlines()]
    assert all(len(row) == 2 and len(row[1].partition(".")[2]) == 4 for row in rows), "each once, four digits"
    assert len({row[0] for row in rows}) == len(rows)
    return {row[0].partition("/")[2]: row[1] for row in rows}
