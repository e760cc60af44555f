"""Commands killed (−9) at random moments: the same command ends as if nothing had happened."""

from __future__ import annotations

from pathlib import Path

import pytest
from oracles.runs import forked
from oracles.runs.outcomes import COMMANDS, Start, outcome


@pytest.mark.parametrize("times", [1, pytest.param(20, marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", COMMANDS)
def test_the_same_command_ends_as_if_undisturbed(name: str, times: int, start: Start, tmp_path: Path) -> None:
    """With `$TMPDIR` on another file system, as on a cluster."""
    straight, killed = start(name, tmp_path / "straight"), start(name, tmp_path / "killed")
    seconds = forked.timed(straight)
    out, attempt, met = tmp_path / "killed", 0, 0
    while met < times:
        attempt += 1
        hit = forked.kill_often(killed, 1, 1.6 * seconds, seed=attempt)
        met += hit
        if met < times and (not hit or finished(name, out)):  # it was done: begin another
            assert outcome(out) == outcome(tmp_path / "straight")
            out = tmp_path / f"killed-{attempt}"
            killed = start(name, out)
    if not finished(name, out):
        assert forked.end(forked.start(killed)) == 0
    assert outcome(out) == outcome(tmp_path / "straight")
    # a run that was killed before its first checkpoint is begun anew beside it
    ended = [path.parent.parent for path in out.rglob("last.ckpt")] or [out]
    left = [path.name for folder in ended for path in folder.rglob("*")]
    assert not [name for name in left if name.endswith((".tmp", ".partial", ".replaced"))]


def finished(name: str, out: Path) -> bool:
    """Whether the command would refuse to run again, because its result is there."""
    return name not in ("trace", "fit") and any(not path.name.startswith(".") for path in out.glob("*"))
