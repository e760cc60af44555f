"""The shipped recipes: every one parses, and its drafter fits a shrunken copy of the real architecture."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
import yaml

import certdraft
from certdraft.drafters import (
    BlockConfig,
    BlockDrafter,
    DSparkConfig,
    DSparkDrafter,
    EagleConfig,
    EagleDrafter,
)
from certdraft.train.commands.cli import main

ROOT = Path(certdraft.__file__).parent
FOLDER = ROOT / "configs" / "recipes"
RECIPES = {path.relative_to(FOLDER).with_suffix("").as_posix(): path for path in FOLDER.rglob("*.yaml")}
SHRUNKEN = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 8,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
}  # fmt: skip


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("recipes", ROOT / "benchmarks" / "recipes.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules["recipes"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_there_is_one_for_every_target_and_family(script: ModuleType) -> None:
    assert {recipe.place for recipe in script.recipes()} == set(RECIPES)
    assert len(RECIPES) == 34


def parse(path: Path, capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    with pytest.raises(SystemExit) as stop:
        main(["fit", "--config", str(path), "--data.record.corpus.source", "p.jsonl", "--print_config"])
    told = capsys.readouterr()
    assert stop.value.code == 0, told.err
    return yaml.safe_load(told.out)


@pytest.mark.parametrize("name", [name for name in RECIPES if name.startswith("qwen3-8b/")])
def test_the_command_line_takes_it(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(RECIPES[name], capsys)["name"] == name.replace("/", "-")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(RECIPES))
def test_the_command_line_takes_every_one(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(RECIPES[name], capsys)["name"] == name.replace("/", "-")


@pytest.mark.slow
def test_the_files_are_what_the_script_writes() -> None:
    command = [sys.executable, str(ROOT / "benchmarks" / "recipes.py"), "--check"]
    subprocess.run(command, check=True, cwd=ROOT)


@pytest.mark.parametrize("family", ["causal", "causal-lora", "eagle3", "dflash", "dspark"])
def test_headers_are_written_from_the_plan(family: str, script: ModuleType) -> None:
    recipe = script.Recipe("8B", family)
    assert script.text(recipe) == recipe.path.read_text(encoding="utf-8")


@pytest.mark.parametrize("name", ["qwen3-8b/eagle3", "qwen3-32b/dflash"])
def test_the_command_in_a_header_prints_its_numbers(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    text = RECIPES[name].read_text(encoding="utf-8")
    command = re.search(r"^# +certdraft (plan .+)$", text, re.M)
    header = re.search(
        r"recording .*: (\d+) GB, ([\d.]+) hours(?s:.*)training .*: (\d+) GB.*, ([\d.]+) hours", text
    )
    assert command is not None
    assert header is not None
    main(command[1].split())
    told = capsys.readouterr().out
    memory = re.findall(r"([\d.]+) GB +a device", told)
    hours = re.findall(r"time +([\d.]+) h", told)
    assert [f"{float(memory[0]):.0f}", hours[0]] == [header[1], header[2]]
    assert [f"{float(memory[1]):.0f}", hours[1]] == [header[3], header[4]]
    assert "DOES NOT FIT" not in told


@pytest.mark.parametrize("size", ["0.6B", "1.7B", "4B", "8B", "14B", "32B", "30B-A3B"])
def test_its_drafter_fits_a_shrunken_target(size: str, script: ModuleType) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    keys = script.shipped_config(size)
    small = {key: SHRUNKEN.get(key, value) for key, value in keys.items()}
    target = AutoModelForCausalLM.from_config(AutoConfig.for_model(small.pop("model_type"), **small)).eval()
    ids = torch.randint(64, (1, 24), generator=torch.Generator().manual_seed(0))
    place = torch.arange(24)[None]
    for family in ("eagle3", "dflash", "dspark"):
        file = RECIPES[f"qwen3-{size.lower()}/{family}"]
        init = yaml.safe_load(file.read_text(encoding="utf-8"))["model"]["drafter"]["init_args"]
        config = init.pop("config")
        drafter: EagleDrafter | BlockDrafter
        if family == "eagle3":
            config["draft_vocab_size"] = 40
            counts = torch.arange(64) + 1_000
            drafter = EagleDrafter(EagleConfig(**config), **init, max_lost_coverage=1.0)
            drafter.build(64, target, counts)
        else:
            config["mask_token_id"] = 63
            corrected = family == "dspark"
            kind, sizes = (DSparkDrafter, DSparkConfig) if corrected else (BlockDrafter, BlockConfig)
            drafter = kind(sizes(**config), **init).build(64, target)
        features = torch.randn(1, 24, len(drafter.taps), 32, generator=torch.Generator().manual_seed(1))
        mask = torch.ones(1, 24, dtype=torch.bool)
        paths = drafter.paths(ids, place, torch.zeros_like(ids), mask, features)
        logits = drafter.head(paths.hidden[paths.mask])
        assert len(logits)
        assert logits.isfinite().all()


def test_parameters_are_those_of_the_real_sizes(script: ModuleType) -> None:
    """DFlash for Qwen3-8B, counted by hand: five layers, the fusion of five features, three norms."""
    _, found = script.planned(script.body(script.Recipe("8B", "dflash")))
    trained = found.drafter.trained
    attention = 4096 * (32 + 8 + 8) * 128 + 32 * 128 * 4096 + 2 * 128
    layer = attention + 3 * 4096 * 12288 + 2 * 4096
    assert trained == 5 * layer + 5 * 4096 * 4096 + 2 * 4096
