"""`certdraft compare`: real runs and a real report on one page that needs nothing but itself."""

from __future__ import annotations

import copy
import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from certdraft.train.commands.cli import main


@pytest.fixture
def runs(settings: dict[str, Any], write: Callable[..., str], tiny: Path, tmp_path: Path) -> list[Path]:
    """Two training runs of different losses, and an evaluation of the first one's export."""
    settings["trainer"].update(max_steps=4, val_check_interval=2)
    found = []
    for name, loss in (("ce", "HardCE"), ("pool", "PoolDiscountedCE")):
        own = copy.deepcopy(settings)
        own["name"], own["model"]["loss"] = name, {"class_path": loss}
        main(["fit", "--config", write(own, f"{name}.yaml")])
        found += list(Path(settings["runs_dir"], name).iterdir())
    main(["export", "--run", str(found[0]), "--out", str(tmp_path / "export")])
    main(
        ["evaluate", "--out", str(tmp_path / "report"), "--trace", str(tiny / "validation")]
        + ["--drafters", f"{{ce: {tmp_path / 'export'}}}", "--device", "cpu"]
    )
    return [*found, tmp_path / "report"]


def test_runs_and_reports_side_by_side(
    runs: list[Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    main(["compare", "--runs", json.dumps([str(run) for run in runs]), "--out", str(out)])
    data = json.loads((out / "compare.json").read_text())
    assert set(data["runs"]) == {"ce", "pool"}
    report = json.loads((runs[2] / "report.json").read_text())
    tau = report["drafters"]["ce"]["lengths"]["chain(depth=4)"]["tau"]
    assert data["drafters"]["ce"]["τ chain(depth=4)"] == tau
    tables = (out / "tables.md").read_text()
    assert re.search(
        r"loss\.class_path \| certdraft.losses.HardCE \| certdraft.losses.PoolDiscountedCE", tables
    )
    assert "seed_everything" not in tables  # the same in both
    html = (out / "compare.html").read_text()
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", html)
    assert "<script" not in html
    assert _console(out / "compare.html") == []

    # A copy of the report that was made on another trace is still shown, with a warning.
    other = tmp_path / "other"
    shutil.copytree(runs[2], other)
    report["provenance"]["sha-256 of trace.json"] = "0"
    (other / "report.json").write_text(json.dumps(report))
    main(["compare", "--runs", json.dumps([str(runs[2]), str(other)]), "--out", str(tmp_path / "second")])
    assert "different traces" in (tmp_path / "second" / "compare.html").read_text()

    for given, complaint in (
        ([runs[0]], "needs two runs"),
        ([runs[0], tmp_path], "neither metrics.csv"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["compare", "--runs", json.dumps([str(run) for run in given])])
        assert stop.value.code == 2
        assert complaint in capsys.readouterr().err


def _console(page: Path) -> list[str]:
    """What a browser complains about when it opens the page; nothing when there is no browser."""
    browser = shutil.which("chromium") or shutil.which("google-chrome")
    if browser is None:
        return []
    command = [
        browser,
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        "--enable-logging=stderr",
        "--dump-dom",
    ]
    told = subprocess.run([*command, page.as_uri()], capture_output=True, text=True, timeout=120)
    return [line for line in told.stderr.splitlines() if "CONSOLE" in line]
