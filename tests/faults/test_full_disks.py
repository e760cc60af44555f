"""A disk that fills up at any writer: one sentence, nothing is lost, and the same command goes on."""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from oracles.runs import forked
from oracles.runs.outcomes import COMMANDS, Start, outcome


@contextlib.contextmanager
def disk_of(folder: Path, kilobytes: int) -> Iterator[None]:
    """A file system of that size at `folder`; without the right to mount one, the test is skipped."""
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kilobytes}k", "tmpfs", str(folder)]
    try:
        subprocess.run(mount, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("only root can mount a small file system")
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def said_by(act: Callable[[], None], file: Path) -> tuple[int, str]:
    """Exit code and standard error of a fork."""

    def run() -> None:
        sys.stderr = file.open("w", buffering=1)
        os.dup2(sys.stderr.fileno(), 2)
        act()

    code = forked.end(forked.start(run))
    return code, file.read_text()


@pytest.mark.parametrize("share", [0.5, *(pytest.param(s, marks=pytest.mark.slow) for s in (0.05, 0.2, 0.9))])
@pytest.mark.parametrize("name", COMMANDS)
def test_a_full_file_system(name: str, share: float, start: Start, tmp_path: Path) -> None:
    """With room for a share of what the command writes; then with room enough."""
    assert forked.timed(start(name, tmp_path / "straight"))
    needed = sum(file.stat().st_size for file in (tmp_path / "straight").rglob("*") if file.is_file())
    out = tmp_path / "small"
    with disk_of(out, max(8, int(share * needed / 1024))):
        code, said = said_by(start(name, out), tmp_path / "said")
        assert code == 2, said
        assert "Traceback" not in said
        assert any(words in said for words in ("o space left", "disk is full", "may not hold")), said
        leftovers = [path for path in out.rglob("*") if path.name.endswith((".tmp", ".partial"))]
        assert leftovers == []
        room = ["mount", "-o", f"remount,size={4 * needed // 1024 + 64}k", str(out)]
        subprocess.run(room, check=True)
        assert forked.end(forked.start(start(name, out))) == 0
        assert outcome(out) == outcome(tmp_path / "straight")


@pytest.mark.parametrize("name", ["export", "evaluate"])
def test_files_may_not_grow(name: str, start: Start, tmp_path: Path) -> None:
    """The kernel refuses more than 4,000 bytes in any file, as a quota does; needs no rights."""

    def starved() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4_000, 4_000))
        start(name, tmp_path / "out")()

    code, said = said_by(starved, tmp_path / "said")
    assert code == 2, said
    assert "Traceback" not in said
    assert "file too large" in said.lower()
    assert not [path for path in (tmp_path / "out").rglob("*") if path.is_file()]
