"""The tables of the loss studies on a real target: the docs show what is stored."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path

import pytest

import certdraft

ROOT = Path(certdraft.__file__).parent


@pytest.mark.skipif(
    not (ROOT / "benchmarks").is_dir(), reason="benchmarks are not part of an installed package"
)
def test_the_docs_hold_the_tables_of_the_stored_counts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = ROOT / "benchmarks" / "real_loss_tables.py"
    monkeypatch.setattr(sys, "argv", [str(script)])
    runpy.run_path(str(script), run_name="__main__")
    printed = re.findall(r"<!-- (?!end).*?<!-- end .*? -->", capsys.readouterr().out, re.DOTALL)
    page = (ROOT / "docs" / "losses-real-target.md").read_text(encoding="utf-8")
    assert len(printed) >= 6
    for table in printed:
        assert table in page, table
