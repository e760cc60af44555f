"""run.yaml says what a run depended on, and `certdraft reproduce` ends in the same weights."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from certdraft.evaluation import read_parts
from certdraft.train.commands.cli import main
from certdraft.train.commands.reproduce import changes, largest_difference


@pytest.fixture
def run(settings: dict[str, Any], write: Callable[..., str]) -> Path:
    settings["trainer"]["max_steps"] = 4
    main(["fit", "--config", write(settings)])
    (folder,) = Path(settings["runs_dir"], "tiny").iterdir()
    return folder


def test_a_run_is_reproduced_from_its_record(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (part,) = read_parts(run)
    assert part["packages"]["torch"] == torch.__version__
    assert set(part["data"]) == {"train", "validation"}
    assert part["argv"]
    main(["reproduce", "--run", str(run), "--runs_dir", str(tmp_path / "again")])
    assert "bit for bit" in capsys.readouterr().out
    (again,) = (tmp_path / "again" / "tiny-again").iterdir()
    assert largest_difference(run / "checkpoints/last.ckpt", again / "checkpoints/last.ckpt") == 0.0

    main(["export", "--run", str(run), "--out", str(tmp_path / "export")])
    assert read_parts(tmp_path / "export") == [part]
    assert (tmp_path / "export" / "training.yaml").read_text() == (run / "config.yaml").read_text()

    # Another seed ends elsewhere, and that is an error.
    config = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump({**config, "seed_everything": 4}))
    with pytest.raises(SystemExit) as stop:
        main(["reproduce", "--run", str(run), "--runs_dir", str(tmp_path / "third")])
    assert stop.value.code == 2
    assert "differ from those of" in capsys.readouterr().err


def test_what_changed_since_is_said(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (part,) = read_parts(run)
    assert changes(part) == []
    copied = tmp_path / "trace"
    shutil.copytree(part["data"]["train"]["path"], copied)
    (copied / "trace.json").write_text("{}")
    part["data"]["train"]["path"] = str(copied)
    part["data"]["validation"]["path"] = str(tmp_path / "gone")
    part["packages"]["torch"] = "1.0"
    (run / "run.yaml").write_text(yaml.safe_dump({"parts": [part]}))
    main(["reproduce", "--run", str(run), "--dry_run", "true"])
    said = capsys.readouterr().err
    assert f"torch is {torch.__version__}, was 1.0" in said
    assert f"the train trace {copied} was recorded again" in said
    assert "gone is gone" in said
    assert "certdraft fit --config" in said


def test_no_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["reproduce", "--run", str(tmp_path)])
    assert stop.value.code == 2
    assert "has no run.yaml" in capsys.readouterr().err
