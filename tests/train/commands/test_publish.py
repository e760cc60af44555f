"""Reports go to W&B as tables, figures and artifacts; offline, so that the test needs no server."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from certdraft.evaluation.report.publish import headline_metrics, tables
from certdraft.train.commands.cli import main


def test_a_report_an_export_and_its_run(
    settings: dict[str, Any],
    write: Callable[..., str],
    tiny: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    settings["trainer"]["max_steps"] = 4
    main(["fit", "--config", write(settings)])
    (run,) = Path(settings["runs_dir"], "tiny").iterdir()
    export, report = tmp_path / "export", tmp_path / "report"
    main(["export", "--run", str(run), "--out", str(export)])
    main(
        ["evaluate", "--out", str(report), "--trace", str(tiny / "validation"), "--device", "cpu"]
        + ["--drafters", f"{{tiny: {export}}}"]
    )
    data = json.loads((report / "report.json").read_text())
    found = tables(data)
    assert all(len(row) == len(columns) for columns, rows in found.values() for row in rows)
    strict = [row for row in found["by_margin"][1] if row[1] == "strict"]
    assert sum(row[4] for row in strict) == data["drafters"]["tiny"]["acceptance"]["steps"]
    assert json.loads((report / "metrics.json").read_text()) == headline_metrics(data)
    assert (
        headline_metrics(data)["eval/tau"]
        == data["drafters"]["tiny"]["lengths"]["chain(depth=4)"]["tau"]["value"]
    )

    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    main(["publish", "--folder", str(report), "--export", str(export), "--run", str(run)])
    media = {path.name.split("_")[0] for path in report.rglob("media/*/*")}
    assert {"coverage", "by", "lengths", "report"} <= media
    assert list(report.rglob("run-*.wandb"))


def test_no_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["publish", "--folder", str(tmp_path)])
    assert stop.value.code == 2
    assert "give the folder of a report" in capsys.readouterr().err
