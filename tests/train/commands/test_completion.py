"""Completion scripts know the commands and their options, and the shells accept them."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from certdraft.train.commands.cli import COMMANDS
from certdraft.train.commands.parsing.completion import options_of, script

OPTIONS = {name: ["--config", "--out"] for name in COMMANDS} | {
    "fit": ["--trainer.max_steps", "--model.loss"]
}
SUMMARIES = {name: command.summary for name, command in COMMANDS.items()}


def test_the_options_are_those_of_the_help() -> None:
    assert {"--run", "--out", "--format", "--draft_length"} <= set(options_of("export"))
    assert not {"--", "---"} & set(options_of("export"))


def complete(tmp_path: Path, line: str) -> list[str]:
    (tmp_path / "completion").write_text(script("bash", OPTIONS, SUMMARIES))
    words = line.split(" ")
    ask = (
        f"source {tmp_path / 'completion'}; COMP_WORDS=({' '.join(repr(w) for w in words)}); "
        f'COMP_CWORD={len(words) - 1}; _shtab_certdraft; printf "%s\\n" "${{COMPREPLY[@]}}"'
    )
    told = subprocess.run(["bash", "-c", ask], capture_output=True, text=True, check=True, cwd=tmp_path)
    return told.stdout.split()


def test_bash_completes(tmp_path: Path) -> None:
    assert complete(tmp_path, "certdraft ev") == ["evaluate"]
    assert complete(tmp_path, "certdraft fit --tr") == ["--trainer.max_steps"]
    assert complete(tmp_path, "certdraft evaluate --tr") == []
    assert complete(tmp_path, "certdraft export --config comp") == ["completion"]  # a file


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_can_read_theirs(shell: str, tmp_path: Path) -> None:
    text = script(shell, OPTIONS, SUMMARIES)
    assert all(name in text for name in COMMANDS)
    assert "trainer.max_steps" in text
    if binary := shutil.which(shell):
        (tmp_path / "script").write_text(text)
        subprocess.run([binary, "-n", str(tmp_path / "script")], check=True)
