"""The documentation builds without a warning: no dead link, no page left out, every reference name found."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import certdraft

ROOT = Path(certdraft.__file__).parent


def test_the_site_builds_without_warnings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mkdocs")
    if not (ROOT / "mkdocs.yml").is_file():
        pytest.skip("an installed package has no documentation sources")
    monkeypatch.setenv("NO_MKDOCS_2_WARNING", "1")
    links = ROOT / ".cache" / "types" / "certdraft"
    if not links.exists():
        subprocess.run(["make", "-s", ".cache/types/certdraft"], cwd=ROOT, check=True)
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-d", str(tmp_path / "site")]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert told.returncode == 0, told.stderr
    assert "WARNING" not in told.stderr  # `-q` would hide warnings from --strict, too
    page = (tmp_path / "site" / "reference" / "certificates" / "index.html").read_text()
    assert re.search(r"<h2[^>]*>\s*<span[^>]*>radius</span>|id=\"certdraft.certificates.*radius\"", page)
