"""`make gpu` at toy size on a CPU: the command that measures a GPU must not fail on a typo."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import certdraft

SCRIPT = Path(certdraft.__file__).parent / "benchmarks" / "gpu" / "run.py"


def test_every_part_runs_at_toy_size(tmp_path: Path) -> None:
    out = tmp_path / "gpu.json"
    parts = ["kernels", "record", "texts", "train"]
    command = [sys.executable, str(SCRIPT), "--toy", "true", "--device", "cpu", "--out", str(out)]
    done = subprocess.run([*command, "--parts", *parts], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads(out.read_text())
    assert not [part for part in parts if "error" in results[part]]
    assert results["record"]["tokens_per_s"] > 0
    assert results["texts"]["texts"] == 12
    assert results["texts"]["largest_lead_nats"] < 0.5
    assert set(results["train"]) == {"causal", "eagle3", "dflash", "took_s"}
    assert results["kernels"]["forward-kl"]["of_bare"] > 0
    assert "train eagle3 tokens_per_s" in done.stdout
