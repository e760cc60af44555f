"""What commands leave behind, without what may differ between two equal ones; what they say when refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from certdraft.train.commands.cli import main

Start = Callable[[str, Path], Callable[[], None]]
COMMANDS = ("trace", "fit", "export", "certify", "evaluate")


def fails(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """stderr of a command that must end with exit code 2."""
    with pytest.raises(SystemExit) as stop:
        main(list(args))
    said = capsys.readouterr().err
    assert stop.value.code == 2, said
    assert "Traceback" not in said
    return said


def with_other_tokenizer(drafter: Path, folder: Path) -> Path:
    """A copy of an exported drafter that was trained with a tokenizer of fingerprint ffff…"""
    shutil.copytree(drafter, folder)
    facts = json.loads((drafter / "drafter.json").read_text())
    facts["facts"]["tokenizer_fingerprint"] = "f" * 64
    (folder / "drafter.json").write_text(json.dumps(facts))
    return folder


def outcome(out: Path) -> dict[str, Any]:
    """What must be equal: all bytes, but for dates, names of folders and the commands that worked on it."""
    found: dict[str, Any] = {}
    for file in sorted(path for path in out.rglob("*") if path.is_file()):
        parts = file.relative_to(out).parts
        if parts[0] == "tiny":  # the run folder is named by its time
            found |= of_run(file, "/".join(parts[2:]))
        elif file.suffix == ".json" and "provenance" in (data := json.loads(file.read_text())):
            found["/".join(parts)] = {key: value for key, value in data.items() if key != "provenance"}
        elif file.suffix == ".html":  # the numbers of the JSON, and their provenance
            found["/".join(parts)] = "a page"
        else:
            found["/".join(parts)] = file.read_bytes()
    return found


def of_run(file: Path, name: str) -> dict[str, Any]:
    """Weights, optimiser state and best score of a checkpoint; metrics."""
    if name == "metrics.csv":
        return {name: file.read_text()}
    if name not in ("checkpoints/last.ckpt", "checkpoints/best.ckpt"):
        return {}
    content = torch.load(file, weights_only=True)
    weights = {key: value.numpy().tobytes() for key, value in content["state_dict"].items()}
    moments = [
        torch.as_tensor(value).numpy().tobytes()
        for state in content["optimizer_states"]
        for _, entry in sorted(state["state"].items())
        for _, value in sorted(entry.items())
    ]
    return {name: (content["global_step"], weights, moments, content["certdraft"]["metrics"])}
