"""Peak memory as `certdraft plan` foresees it for the runs of `run.py`."""

from __future__ import annotations

import contextlib
import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from work import GIB, NUM_KEPT, Size, prompts, tapped

from certdraft.train.plan.formulas import DEVICES, GB
from certdraft.train.plan.plan_command import plan


@dataclass(frozen=True)
class Expected:
    """Peak memory by `certdraft plan`, GiB, without its share for the CUDA context."""

    record: float
    train: float


def expected(size: Size, folder: Path, drafter: dict[str, Any], *, beside: bool) -> Expected:
    """Ask `certdraft plan` for a run like those of `record` and `train`.

    Args:
        size: of the models and of the work.
        folder: with the target.
        drafter: `class_path` and `init_args`.
        beside: whether the target runs in training.
    """
    target = str(folder / "target")
    config = {
        "trainer": {"precision": "bf16-mixed", "max_steps": size.steps},
        "data": {
            "seq_len": size.seq_len, "batch_size": size.rows,
            "record": {
                "target": target, "batch_size": size.batch, "num_kept": NUM_KEPT,
                "feature_layers": tapped(size),
            },
        },
        "model": {"drafter": drafter} | ({"target": {"name": target}} if beside else {}),
    }  # fmt: skip
    file = folder / "plan.yaml"
    file.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    given = sum(len(prompt.ids) for prompt in prompts(size, folder)) // size.prompts
    with contextlib.redirect_stdout(io.StringIO()):
        found = plan(str(file), device="h100", prompt_tokens=given, answer_tokens=size.new_tokens)
    sheet = DEVICES["h100"]
    train = sum(value for name, value in found.train_memory_gb.items() if name != sheet.overhead)
    return Expected((found.record_memory_gb - sheet.overhead_gb) * GB / GIB, train * GB / GIB)


def beside_plan(peak: float | None, planned: float) -> dict[str, float | None]:
    """Peak memory beside the plan's, for a result."""
    return {"peak_gib": peak, "plan_gib": planned, "of_plan": None if peak is None else peak / planned}
