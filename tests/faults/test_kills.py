"""Commands killed (−9) at random moments: the same command ends as if nothing had happened."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from oracles import forked

Start = Callable[[str, Path], Callable[[], None]]
COMMANDS = ("trace", "fit", "export", "certify", "evaluate")


@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", COMMANDS)
def test_the_same_command_ends_as_if_undisturbed(name: str, times: int, start: Start, tmp_path: Path) -> None:
    """With `$TMPDIR` on another file system, as on a cluster."""
    straight, killed = start(name, tmp_path / "straight"), start(name, tmp_path / "killed")
    seconds = forked.timed(straight)
    out, attempt, met = tmp_path / "killed", 0, 0
    while met < times:
        attempt += 1
        if finished(name, out):  # a kill that came too late leaves the result of an undisturbed command
            assert outcome(out) == outcome(tmp_path / "straight")
            out = tmp_path / f"killed-{attempt}"
            killed = start(name, out)
        met += forked.kill_often(killed, 1, 1.6 * seconds, seed=attempt)
    if not finished(name, out):
        assert forked.end(forked.start(killed)) == 0
    assert outcome(out) == outcome(tmp_path / "straight")
    assert not [path.name for path in out.rglob("*") if path.name.endswith((".tmp", ".partial", ".replaced"))]


def finished(name: str, out: Path) -> bool:
    """Whether the command would refuse to run again, because its result is there."""
    return name not in ("trace", "fit") and any(not path.name.startswith(".") for path in out.glob("*"))


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
