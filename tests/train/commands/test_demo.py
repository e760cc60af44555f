"""The demo from end to end, on a target so small that it takes seconds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from certdraft.decoding import CostModel
from certdraft.train.commands.cli import main
from certdraft.train.commands.demo import LOSSES, _fit


def test_demo_shows_the_whole_promise(
    settings: dict[str, Any],
    write: Callable[..., str],
    tiny: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    settings["data"] |= {
        "seq_len": 192,
        "validation_rows": 4,
        "record": {
            "target": str(tiny / "target"),
            "corpus": {
                "source": str(tiny / "corpus.jsonl"),
                "validation_fraction": 0.2,
                "test_fraction": 0.2,
            },
            "generation": {"max_new_tokens": 20, "loops": "keep"},
        },
    }
    del settings["name"], settings["runs_dir"]
    recipe = write(settings)
    main(["demo", "--out", str(tmp_path / "demo"), "--recipe", recipe, "--test_rows", "6", "--prompts", "2"])
    said = capsys.readouterr()
    assert "hard-ce" in said.out
    assert "runner-up" in said.out
    assert "12 of 12 speculative texts equal" in said.out
    assert "assistant_model) too" in said.out
    (report,) = (tmp_path / "demo" / "reports").iterdir()
    assert (report / "report.html").stat().st_size > 10_000
    data = json.loads((report / "report.json").read_text())
    assert list(data["drafters"]) == ["hard-ce", "runner-up"]
    decoders = ["chain(depth=4)", "best_first(budget=16, max_depth=8)", "cost_aware(stop=lambda, budget=32)"]
    for drafter in data["drafters"].values():
        assert list(drafter["lengths"]) == decoders
    for decoder in decoders:
        assert said.out.count(decoder) == 3, "chain, tree and cost-aware side by side, and their difference"
    assert CostModel.load(tmp_path / "demo" / "cost.json").contexts == (32, 96)
    again = _fit(Path(recipe), tmp_path / "demo", "hard-ce", LOSSES["hard-ce"])
    assert again == tmp_path / "demo" / "hard-ce" / again.parts[-3] / "checkpoints" / "last.ckpt"
    assert "12/12 steps" not in capsys.readouterr().err, "what was finished is used again"
    assert len(list((tmp_path / "demo" / "hard-ce").iterdir())) == 1
