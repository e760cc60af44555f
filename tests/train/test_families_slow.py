"""The families against each other at equal training time, as `benchmarks/families.py` measures it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import certdraft

SCRIPT = Path(certdraft.__file__).parent / "benchmarks" / "families.py"


@pytest.mark.slow
def test_reading_the_target_pays_within_minutes(tmp_path: Path) -> None:
    """Loss falls in all families, a tree accepts more than a chain, an EAGLE-3 head drafts longer texts than
    a causal drafter of its size and training time.

    A block drafter does not after this little time; it is asked for what its trees are worth.
    """
    out = tmp_path / "families.json"
    arguments = ["--seconds", "150", "--rows", "120", "--prompts", "24", "--new", "32", "--out", str(out)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, SCRIPT, *arguments], cwd=tmp_path, env=env, check=True)
    runs = {run["family"]: run for run in json.loads(out.read_text())["runs"]}
    for run in runs.values():
        assert run["last_loss_nats"] < 0.9 * run["first_loss_nats"], run
        assert run["tau"]["best_first_32"] > run["tau"]["chain_4"], run
    assert runs["eagle"]["tau"]["chain_4"] > runs["causal"]["tau"]["chain_4"]
    assert runs["block"]["tau"]["best_first_32"] > 1.3 * runs["block"]["tau"]["chain_7"]
