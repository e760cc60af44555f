"""The first hour of a user without clone, hub or account: every command of the front pages, in order.

Then what goes wrong in it: each failure is one paragraph that says what to do, exit code 2, no traceback.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from first_hour.installed import Installed, build

pytestmark = pytest.mark.slow

SMALL = [
    "--trainer.max_steps", "4", "--trainer.val_check_interval", "2", "--trainer.limit_val_batches", "2",
    "--data.record.corpus.max_rows", "64", "--data.record.generation.max_new_tokens", "16",
    "--data.validation_rows", "4",
]  # fmt: skip


@pytest.fixture(scope="module")
def user(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """A user who has installed the wheel, read the README, and trained once."""
    folder = tmp_path_factory.mktemp("user")
    return Installed.make(build("wheel", tmp_path_factory.mktemp("built")), folder)


@pytest.fixture(scope="module")
def trained(user: Installed) -> Installed:
    done = user.run("certdraft", "fit", "--config", "demo", *SMALL)
    assert done.returncode == 0, done.stderr
    assert "best" in done.stderr + done.stdout
    assert "certdraft export" in done.stderr + done.stdout, "fit ends with the next command"
    return user


def works(user: Installed, *args: str, **env: str) -> str:
    """Run a command that must succeed; what it said, without a traceback or a foreign progress bar."""
    done = user.run(*args, **env)
    told = done.stdout + done.stderr
    assert done.returncode == 0, f"{' '.join(args)}\n{told}"
    assert "Traceback" not in told
    assert "it/s" not in told, "another library's progress bar"
    return told


def test_looking_around(user: Installed) -> None:
    told = works(user, "certdraft", "doctor")
    assert "hub" in told
    assert "problem" not in told
    assert "recipes/qwen3-8b/eagle3" in works(user, "certdraft", "configs")
    assert "H100" in works(user, "certdraft", "plan", "recipes/qwen3-8b/eagle3").upper()
    works(user, "certdraft", "init", "recipes/qwen3-8b/dflash")
    works(user, "certdraft", "--help")
    works(user, "lightning", "--version")


def test_from_a_run_to_a_report(trained: Installed) -> None:
    works(trained, "certdraft", "validate", "--config", "demo", *SMALL, "--ckpt_path", "best")
    told = works(trained, "certdraft", "export", "latest", "--out", "drafter")
    assert "drafter" in told
    works(trained, "certdraft", "lint", "drafter")
    trace = "runs/demo/traces/validation"
    told = works(trained, "certdraft", "evaluate", "drafter", "--trace", trace, "--out", "report",
                 "--target", "embedded", "--prompts", "2", "--max_new_tokens", "8")  # fmt: skip
    assert "coverage@4" in told, "the headline table is on the terminal"
    report = json.loads((trained.home / "report" / "report.json").read_text())
    assert list(report["drafters"]) == ["drafter"]
    works(trained, "certdraft", "certify", trace, "--out", "certified")
    assert (trained.home / "certified" / "certify.json").is_file()
    works(trained, "certdraft", "compare", "latest", "report", "--out", "both")
    assert (trained.home / "both" / "compare.html").is_file()


def test_a_trace_of_ones_own_texts(user: Installed) -> None:
    rows = [{"conversations": [{"from": "human", "value": f"What is {n} + {n}?"}]} for n in range(4)]
    file = user.home / "chats.jsonl"
    file.write_text("\ufeff" + "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    works(user, "certdraft", "trace", "traces/own", "--target", "embedded", "--corpus.source", "chats.jsonl",
          "--generation.max_new_tokens", "8", "--generation.loops", "keep")  # fmt: skip
    assert json.loads((user.home / "traces" / "own" / "trace.json").read_text())["target"] == "embedded"


FAILURES = {
    "fit without settings": (["fit"], "no settings; give a config"),
    "a misspelt command": (["evalute"], "did you mean 'evaluate'"),
    "a config that is nowhere": (["fit", "--config", "demmo"], "did you mean 'demo'"),
    "a YAML error": (["fit", "--config", "broken.yaml"], "broken.yaml"),
    "an unknown key": (["fit", "--config", "unknown.yaml"], "unknown.yaml"),
    "a loss that cannot be imported": (
        ["fit", "--config", "demo", "--model.loss", "my_losses.Best"],
        "my_losses",
    ),
    "an empty config": (["fit", "--config", "empty.yaml"], "empty.yaml: empty"),
    "a recipe without a hub": (
        ["fit", "--config", "recipes/qwen3-8b/eagle3"],
        "data.record.target Qwen/Qwen3-8B",
    ),
    "a GPU that is not there": (
        ["fit", "--config", "demo", "--trainer.accelerator", "gpu"],
        "sees no GPU here",
    ),
    "more processes than cores": (["fit", "--config", "demo", "--trainer.devices", "999"], "999 processes"),
    "a target without a hub": (["trace", "t", "--target", "Qwen/Qwen3-0.6B"], "Qwen/Qwen3-0.6B"),
    "a target that is no folder": (["trace", "t", "--target", "./models/mine"], "models/mine"),
    "drafters that are no dict": (["evaluate", "--drafters", "x", "--trace", "t"], "drafters"),
    "a trace that is nowhere": (["certify", "nowhere"], "nowhere"),
    "no run yet": (["export", "latest", "--out", "d"], "train first"),
    "W&B without a key": (
        ["fit", "--config", "demo", "--trainer.logger", "configs/logger/wandb.yaml"],
        "WANDB_MODE=offline",
    ),
    "a hub that is not there": (["publish", "whole", "--hub", "me/drafter"], "drafter.json"),
}


@pytest.mark.parametrize("name", FAILURES)
def test_a_failure_is_one_paragraph(name: str, user: Installed, tmp_path: Path) -> None:
    args, words = FAILURES[name]
    alone = Installed(user.bin, tmp_path)
    (tmp_path / "broken.yaml").write_text("model: {drafter: [\n")
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "unknown.yaml").write_text("model: {drafterr: x}\n")
    extra = SMALL if name.startswith("W&B") else []
    done = alone.run("certdraft", *args, *extra)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    last = done.stderr.strip().splitlines()[-3:]
    assert any(words in line for line in last), done.stderr
    assert extra or len(done.stderr.splitlines()) <= 6, done.stderr
    assert "retry" not in done.stderr.lower(), done.stderr
