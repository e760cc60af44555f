"""`certdraft arbitrate`: measure an arbitration policy on problems with checkable answers."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal

from certdraft.arbitration import (
    Lockstep,
    Policy,
    Problem,
    Sandbox,
    arithmetic,
    load_policy,
    load_problems,
    split_problems,
)
from certdraft.arbitration.arbitration_report import (
    ArbitrationResult,
    arbitration_rows,
    measure_arbitration,
    summarise,
)
from certdraft.arbitration.environment import ArbitrationSettings, Court
from certdraft.data import eos_ids_of, load_target, load_tokenizer, tokenizer_fingerprint
from certdraft.drafters import load_causal_lm
from certdraft.evaluation import provenance, write_json


def run_arbitrate(
    target: str,
    drafter: str,
    policy: str,
    out: str,
    problems: str = "arithmetic",
    max_problems: int = 1000,
    threshold: float = 0.5,
    texts: ArbitrationSettings = ArbitrationSettings(),  # noqa: B008, frozen
    sandbox: Sandbox = Sandbox(),  # noqa: B008, frozen
    max_paths: int = 256,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "cpu",
    seed: int = 0,
) -> None:
    """Accuracy and speed of a policy beside target, drafter, baselines and ceiling.

    Args:
        target: folder or hub name.
        drafter: folder or hub name of a causal drafter with the target's tokenizer.
        policy: folder that `fit` wrote.
        out: file of the result, json.
        problems: "arithmetic", or a jsonl file in the shape of GSM8K, HumanEval, MBPP, or our own.
        max_problems: most problems that are measured.
        threshold: probability above which the draft token is taken.
        texts: how texts are written; use what the policy was trained with.
        sandbox: limits on programs that the verifier runs.
        max_paths: per problem, for the ceiling.
        dtype: of both models.
        device: where they run.
        seed: of arithmetic problems and of the coin.
    """
    measured, matching = _problems(problems, max_problems, seed)
    court = open_court(target, drafter, texts, sandbox, dtype=dtype, device=device)
    ours: Policy = load_policy(policy).to(device)
    result = measure_arbitration(
        court, ours, measured, matching, threshold=threshold, max_paths=max_paths, seed=seed
    )
    summary = write_arbitration(
        [result],
        out,
        {"target": target, "drafter": drafter, "policy": policy, "texts": dataclasses.asdict(texts)},
    )
    print(as_text(summary), file=sys.stdout)


def open_court(
    target: str,
    drafter: str,
    texts: ArbitrationSettings,
    sandbox: Sandbox = Sandbox(),  # noqa: B008, frozen
    *,
    dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "cpu",
) -> Court:
    """A court of two models by name.

    Args:
        target: folder or hub name.
        drafter: folder or hub name of a causal drafter.
        texts: how texts are written.
        sandbox: limits on programs that the verifier runs.
        dtype: of both models.
        device: where they run.

    Raises:
        ValueError: the two have different tokenizers.
        FileNotFoundError: one is not there.
    """
    import torch

    tokenizer = load_tokenizer(target)
    if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(load_tokenizer(drafter)):
        raise ValueError(
            f"the drafter {drafter} has another tokenizer than the target {target}: their token ids mean "
            "different text, so neither can speak for the other"
        )
    kind = getattr(torch, dtype)
    models = load_target(target, dtype=kind, device=device), load_causal_lm(drafter, dtype=kind)
    models[1].to(device).eval().requires_grad_(False)  # type: ignore[arg-type]
    eos = sorted(eos_ids_of(models[0], tokenizer))
    return Court(Lockstep(models[0]), Lockstep(models[1]), tokenizer, texts, sandbox, eos)


def write_arbitration(
    results: list[ArbitrationResult], out: str | Path, facts: dict[str, Any]
) -> dict[str, Any]:
    """The summary of some runs as json, with its provenance.

    Args:
        results: one per seed.
        out: the file.
        facts: what was measured.

    Returns:
        The summary.
    """
    summary = summarise(results)
    write_json(Path(out), {**facts, **summary, "provenance": provenance()})
    return summary


def as_text(summary: dict[str, Any]) -> str:
    """The table for a terminal."""
    rows = arbitration_rows(summary)
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )


def _problems(source: str, most: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    if most < 1:
        raise ValueError(f"max_problems is {most}; give at least 1")
    if source == "arithmetic":
        return arithmetic("test", most, seed), arithmetic("validation", max(50, most // 4), seed)
    matching, measured = split_problems(load_problems(source), (0.2, 0.8))
    return measured[:most], matching[:most]
