"""Servers started by the benchmark: one at a time, ended in the end, their last words in errors."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from oracles.servers import fake_engine

from certdraft.data import ServerError, load_target, load_tokenizer
from certdraft.drafters import CausalDrafter, export
from certdraft.evaluation import run_bench
from certdraft.evaluation.serving import local_server


@pytest.fixture
def python(tmp_path: Path) -> str:
    """In place of the interpreter that has vLLM: it runs the engine without a model."""
    file = tmp_path / "python"
    file.write_text(f'#!/bin/sh\nshift 2\nexec "{sys.executable}" "{fake_engine.__file__}" "$@"\n')
    file.chmod(0o755)
    return str(file)


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[subprocess.Popen[bytes]]:
    """The processes that were started; when one is, all before it have ended."""
    found: list[subprocess.Popen[bytes]] = []
    start = subprocess.Popen

    def popen(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        process = start(*args, **options)
        if args[0][0] != "git":  # of the provenance
            assert all(before.poll() is not None for before in found)
            found.append(process)
        return process

    monkeypatch.setattr(local_server.subprocess, "Popen", popen)
    return found


SIZES = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "head_dim": 16}
SIZES |= {"num_attention_heads": 1, "num_key_value_heads": 1}
OPTIONS: dict[str, Any] = {"target": "model", "drafter": "head", "draft_length": 3, "method": "eagle3"}


@pytest.fixture(autouse=True)
def no_own_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    """There are no weights here; our loop has its own tests."""
    monkeypatch.setattr("certdraft.evaluation.serving.bench_command._own", lambda *args: None)


def test_once_with_the_drafter_and_once_without(
    python: str,
    started: list[subprocess.Popen[bytes]],
    settings: dict[str, Any],
    result: Callable[[], dict[str, Any]],
) -> None:
    run_bench(python=python, **OPTIONS, **settings)
    assert len(started) == 2
    assert all(process.poll() is not None for process in started)
    with_drafter, without = (process.args for process in started)
    told = json.loads(with_drafter[with_drafter.index("--speculative-config") + 1])
    assert told == {"method": "eagle3", "model": "head", "num_speculative_tokens": 3}
    assert "--speculative-config" not in without
    data = result()
    assert data["servers"]["drafter"]["draft_length"] == 3
    assert data["levels"][0]["texts"]["equal"] == 6


def test_a_server_that_cannot_start(
    python: str, started: list[subprocess.Popen[bytes]], settings: dict[str, Any]
) -> None:
    with pytest.raises(ServerError, match="exit code 1: ValueError: there is no room"):
        run_bench(python=python, server_options=["--fail"], **OPTIONS, **settings)
    with pytest.raises(ServerError, match="has vLLM as --python"):
        run_bench(python=str(Path(python).with_name("none")), **OPTIONS, **settings)
    assert all(process.poll() is not None for process in started)


def test_a_server_that_dies_is_quoted_and_another_goes_on(
    python: str,
    started: list[subprocess.Popen[bytes]],
    settings: dict[str, Any],
    result: Callable[[], dict[str, Any]],
) -> None:
    dying = OPTIONS | {"server_options": ["--die-after", "20"]}
    passes = Path(settings["out"], "passes")
    kept = [2, 3, 6, 7]  # passes of 6 requests that fit into 20, with those that probe and warm up
    for count in kept:
        with pytest.raises(ServerError, match="ran out of memory"):
            run_bench(python=python, **dying, **settings)
        assert len(list(passes.glob("*-*-*.json"))) == count
    run_bench(python=python, **dying, **settings)
    assert [level["texts"]["equal"] for level in result()["levels"]] == [6, 6]
    assert all(process.poll() is not None for process in started)


def test_what_vllm_is_told_follows_from_the_export(tmp_path: Path) -> None:
    drafter = CausalDrafter(SIZES, vocab_size=load_target().config.vocab_size)
    folder = export(drafter, tmp_path / "export", tokenizer=load_tokenizer(), draft_length=5)
    vllm = local_server.LocalVLLM("python", "embedded", str(folder))
    told = {"method": "draft_model", "model": str(folder.resolve()), "num_speculative_tokens": 5}
    assert vllm.speculative_config() == told
    line = vllm.command("plain", 8000)
    assert Path(line[line.index("--model") + 1], "config.json").is_file()
    facts = json.loads((folder / "drafter.json").read_text())
    for family, format, method in (("eagle", "eagle3", "eagle3"), ("block", "transformers", None)):
        (folder / "drafter.json").write_text(json.dumps(facts | {"family": family, "format": format}))
        if method is None:
            with pytest.raises(ValueError, match="does not read the format transformers"):
                vllm.speculative_config()
        else:
            assert vllm.speculative_config()["method"] == method
    with pytest.raises(ValueError, match="--draft_length"):
        local_server.LocalVLLM("python", "embedded", str(tmp_path)).speculative_config()
