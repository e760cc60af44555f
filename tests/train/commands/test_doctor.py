"""doctor says what is there, what is missing and what to do, and its exit code is for scripts."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from certdraft.train.commands.cli import main


def examine(capsys: pytest.CaptureFixture[str], *args: str) -> tuple[int, dict[str, dict[str, str]]]:
    code: Any = 0
    try:
        main(["doctor", "--as_json", "true", "--hub", "false", *args])
    except SystemExit as stop:
        code = stop.code
    return code, {row["what"]: row for row in json.loads(capsys.readouterr().out)}


def test_a_machine_that_runs_the_tests_is_ready(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, settings: dict[str, Any], write: Callable[..., str]
) -> None:
    code, rows = examine(
        capsys, "--target", "embedded", "--fit_config", write(settings), "--directory", str(tmp_path / "runs")
    )
    assert code == 0
    assert {row["status"] for row in rows.values()} <= {"ok", "note"}
    assert rows["target embedded"]["found"].startswith("qwen3, vocabulary 2,048")
    assert "train trace of" in next(row["found"] for name, row in rows.items() if name.startswith("config"))


def test_what_will_fail_is_a_problem_and_exit_code_1(
    capsys: pytest.CaptureFixture[str], settings: dict[str, Any], write: Callable[..., str]
) -> None:
    settings["data"]["train"] = "nowhere"
    code, rows = examine(capsys, "--target", "no/such/folder", "--fit_config", write(settings))
    assert code == 1
    problems = {name: row["found"] for name, row in rows.items() if row["status"] == "problem"}
    assert set(problems) == {"target no/such/folder", f"config {write(settings)}"}
    assert "nowhere does not exist; record it" in problems[f"config {write(settings)}"]


def test_a_package_out_of_range_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 1 also where Ctrl-C is ignored, as in a script's background jobs."""
    from certdraft.train.commands import doctor

    real = doctor.version
    monkeypatch.setattr(doctor, "version", lambda name: "0.1.0" if name == "peft" else real(name))
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        code, rows = examine(capsys)
    finally:
        signal.signal(signal.SIGINT, before)
    assert code == 1
    assert rows["peft"]["status"] == "problem"
    assert "certdraft is made for peft>=" in rows["peft"]["found"]


def test_another_owner_of_the_lightning_command_is_noted(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    script = tmp_path / "lightning"
    script.write_text("#!/usr/bin/env python\nfrom lightning_sdk.cli import main\n")
    script.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    _, rows = examine(capsys)
    assert "belongs to another package" in rows["lightning command"]["found"]
