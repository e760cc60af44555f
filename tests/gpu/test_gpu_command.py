"""`make gpu` at toy size on a CPU: the command that measures a GPU must not fail on a typo."""

from __future__ import annotations

import importlib
import importlib.util
import json
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import certdraft
from certdraft.drafters import drafter_kinds

SCRIPT = Path(certdraft.__file__).parent / "benchmarks" / "gpu" / "run.py"


@pytest.fixture
def parts(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The modules beside the script, as it imports them."""
    monkeypatch.syspath_prepend(SCRIPT.parent)
    names = ("work", "planned", "training_steps")
    return SimpleNamespace(**{name: importlib.import_module(name) for name in names})


def test_every_part_runs_at_toy_size(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    chosen = ["kernels", "texts", "train", "record"]  # record last: what is recorded before must not help it
    command = [sys.executable, str(SCRIPT), "--toy", "true", "--device", "cpu", "--out", str(out)]
    done = subprocess.run([*command, "--parts", *chosen], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())
    assert not [part for part in chosen if "error" in results[part]]
    record = results["record"]
    assert 0 < record["tokens_per_s"] < 2 * record["bare_tokens_per_s"], "only passes cost time"
    assert record["of_generate"] > 0
    assert results["texts"]["texts"] == 12
    assert results["texts"]["largest_lead_nats"] < 0.5
    kinds = {"causal", "eagle3", "dflash", "dspark"}
    assert set(results["train"]) == {*kinds, "took_s"}
    for part in (record, *(results["train"][kind] for kind in kinds)):
        assert part["plan_gib"] > 0
        assert part["peak_gib"] is part["of_plan"] is None, "a CPU has no peak"
    for name in ("hard-ce", "forward-kl", "ce+kl"):
        assert results["kernels"][name]["of_bare"] > 0
        assert results["kernels"][name]["readable"]["of_bare"] > 0
    installed = importlib.util.find_spec("liger_kernel") is not None
    assert isinstance(results["kernels"]["liger forward-kl"], dict) == installed
    assert "train eagle3 tokens_per_s" in done.stdout


def test_every_shipped_kind_is_trained(parts: SimpleNamespace) -> None:
    for size in (parts.work.TOY, parts.work.FULL):
        made = {
            name: parts.training_steps.make_drafter(settings)
            for name, settings in parts.work.drafters(size).items()
        }
        shipped = {k for k in drafter_kinds().values() if k.__module__.startswith("certdraft.drafters")}
        assert {type(drafter) for drafter in made.values()} == shipped


def test_synchronisations_count_from_the_fetching_of_the_batch(parts: SimpleNamespace) -> None:
    steps = parts.training_steps.Steps(parts.work.Meter(torch.device("cpu")))

    def wait(times: int) -> None:
        for _ in range(times):
            warnings.warn("called a synchronizing CUDA operation", stacklevel=1)

    steps.on_train_start()
    for transfer, step in ((1, 2), (4, 8)):
        wait(transfer)
        steps.on_train_batch_start()
        wait(step)
        steps.on_train_batch_end()
    wait(1)
    steps.on_train_end()
    assert steps.syncs == [3, 12]
    assert len(steps.seconds) == 2


def test_a_peak_is_compared_with_the_plan_of_the_same_run(parts: SimpleNamespace, tmp_path: Path) -> None:
    """More rows a step, a larger batch and a target beside the drafter each raise what is planned."""
    size: Any = parts.work.TOY
    parts.work.make_target(tmp_path, size)
    drafter = parts.work.drafters(size)["dflash"]
    small = parts.planned.expected(size, tmp_path, drafter, beside=False)
    beside = parts.planned.expected(size, tmp_path, drafter, beside=True)
    large = parts.planned.expected(replace(size, rows=20, batch=40), tmp_path, drafter, beside=False)
    assert 0 < small.train < beside.train
    assert small.train < large.train < 20 * small.train
    assert 0 < small.record < large.record
    assert parts.planned.beside_plan(3.0, 2.0) == {"peak_gib": 3.0, "plan_gib": 2.0, "of_plan": 1.5}
