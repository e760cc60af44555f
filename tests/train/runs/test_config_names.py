"""Configs by name, copies of them, and paths as typed on the command line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from certdraft.train.commands.cli import COMMANDS, captured
from certdraft.train.commands.parsing.typed_paths import explicit
from certdraft.train.plan.plan_command import load_config
from certdraft.train.runs.config_files import CONFIGS, config_names, find_config, newest_run

RECIPE, GROUP = "recipes/qwen3-8b/causal-lora", "drafter/qwen3-0.6b-lora.yaml"


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run_at(folder: str, time: int) -> Path:
    path = Path(folder)
    path.mkdir(parents=True)
    for name in ("config.yaml", "run.yaml"):
        (path / name).write_text("{}")
        os.utime(path / name, (time, time))
    return path


def settings_of(*args: str) -> dict:
    code, out, err = captured(["fit", *args, "--print_config"])
    assert code == 0, err
    return yaml.safe_load(out)


@pytest.mark.parametrize("name", ["demo", "demo.yaml", "configs/demo.yaml"])
def test_a_name_is_the_config_that_ships(name: str) -> None:
    assert find_config(name) == CONFIGS / "demo.yaml"


def test_a_file_comes_before_the_config_that_ships() -> None:
    Path("demo").mkdir()  # a folder is no config
    assert find_config("demo") == CONFIGS / "demo.yaml"
    Path("demo.yaml").write_text("name: mine")
    assert find_config("demo.yaml") == Path("demo.yaml")


def test_pipes_inline_settings_and_null_are_no_names() -> None:
    os.mkfifo("pipe")
    assert find_config("pipe") == Path("pipe")
    args = ["--config", "{name: x}", "--config=null", "--config", "-"]
    assert explicit(args) == args


@pytest.mark.parametrize(
    ("typed", "meant"), [("dmeo", "demo"), ("qwen3-32b-eagle3", "recipes/qwen3-32b/eagle3")]
)
def test_a_wrong_name_gets_the_nearest(typed: str, meant: str) -> None:
    code, _, said = captured(["fit", "--config", typed])
    assert code == 2
    assert f"no config {typed}" in said
    assert f"did you mean '{meant}'?" in said
    assert "certdraft configs" in said


def test_fit_takes_names_without_a_clone() -> None:
    config = settings_of("demo", "--model.loss", "configs/loss/ce-kl.yaml")
    assert config["name"] == "demo"
    shipped = settings_of("--config", str(CONFIGS / "demo.yaml"), f"--model.loss={CONFIGS}/loss/ce-kl.yaml")
    assert config == shipped


def test_a_copy_elsewhere_finds_its_groups_and_prefers_its_own() -> None:
    copy = Path("mine/recipes/deep/recipe.yaml")
    copy.parent.mkdir(parents=True)
    copy.write_bytes((CONFIGS / f"{RECIPE}.yaml").read_bytes())
    drafter = settings_of("--config", str(copy))["model"]["init_args"]["drafter"]
    assert drafter == settings_of("--config", RECIPE)["model"]["init_args"]["drafter"]
    assert load_config(copy)["model"]["drafter"]["class_path"] == "CausalDrafter"
    own = Path("mine", GROUP)
    own.parent.mkdir()
    own.write_text("class_path: BlockDrafter")
    found = settings_of("--config", str(copy))["model"]["init_args"]["drafter"]
    assert found["class_path"].endswith("BlockDrafter")
    assert load_config(copy)["model"]["drafter"]["class_path"] == "BlockDrafter"


def test_a_group_that_exists_nowhere_is_an_error() -> None:
    Path("mine.yaml").write_text("model: {loss: loss/nothing.yaml}")
    code, _, said = captured(["fit", "mine.yaml", "--print_config"])
    assert code == 2
    assert "loss/nothing.yaml" in said


def test_configs_lists_each_with_its_first_line() -> None:
    code, out, _ = captured(["configs"])
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == config_names()
    assert "An EAGLE-3 head on Qwen3-8B." in out
    code, out, _ = captured(["configs", "recipes/qwen3-8b"])
    assert out.splitlines()
    assert all(line.startswith("recipes/qwen3-8b") for line in out.splitlines())
    assert captured(["configs", "nothing"])[0] == 2


def test_init_copies_a_config_with_its_groups() -> None:
    code, out, err = captured(["init", RECIPE, "--out", "mine"])
    assert code == 0, err
    files = [f"mine/{GROUP}", f"mine/{RECIPE}.yaml"]
    assert sorted(out.split()) == files
    for file in files:
        assert Path(file).read_bytes() == (CONFIGS / file.removeprefix("mine/")).read_bytes()


def test_init_overwrites_nothing() -> None:
    Path("configs/drafter").mkdir(parents=True)
    Path("configs", GROUP).write_text("mine")
    code, _, said = captured(["init", RECIPE])
    assert code == 2
    assert f"configs/{GROUP}" in said
    assert not Path("configs/recipes").exists()


def test_latest_is_the_run_started_last() -> None:
    with pytest.raises(FileNotFoundError, match="no run under runs/"):
        newest_run()
    old, new = run_at("runs/b/2026-01-01", 1000), run_at("runs/a/2026-02-02", 2000)
    Path("runs/evaluate/now").mkdir(parents=True)  # a report is no run
    Path("runs/evaluate/now/config.yaml").write_text("{}")
    assert newest_run() == new
    command = COMMANDS["compare"]
    typed = ["latest", str(old)]
    assert explicit(typed, command.argument, command.configs, command.runs) == [
        "--runs",
        f'["{new}", "{old}"]',
    ]
    for name in ("export", "reproduce"):
        command = COMMANDS[name]
        assert explicit(["latest"], command.argument, command.configs, command.runs) == ["--run", str(new)]
    (old / "metrics.csv").write_text("step\n")
    assert newest_run() == old, "the newer one was refused before it trained"
    (new / "checkpoints").mkdir()
    (new / "checkpoints" / "last.ckpt").write_bytes(b"")
    assert newest_run() == new


def test_latest_in_another_name_or_option_stays() -> None:
    run_at("runs/a/1", 1000)
    args = ["--out", "latest", "--run", "runs/latest/x"]
    assert explicit(args, "run", runs=("run",)) == args


def test_a_file_to_write_is_never_one_that_ships() -> None:
    args = ["--out", "demo.yaml", "--out=configs/demo.yaml"]
    assert explicit(args) == args


def test_paths_stand_directly_behind_the_command() -> None:
    code, _, said = captured(["lint", "nowhere"])
    assert code == 2
    assert "nowhere" in said
    assert "unrecognized" not in said
    code, _, said = captured(["evaluate", "one/drafter", "--trace", "nowhere"])
    assert code == 2
    assert "unrecognized" not in said
    assert "nowhere" in said
    code, _, said = captured(["trace", "out", "--target", "no/where/folder"])
    assert code == 2
    assert "no/where/folder" in said
    code, _, said = captured(["compare", "one", "two"])
    assert code == 2
    assert "one: neither metrics.csv" in said
