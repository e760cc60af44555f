"""`certdraft arbitrate`: measure an arbitration policy on problems with checkable answers."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal

from certdraft.arbitration import (
    Lockstep,
    Problem,
    Sandbox,
    arithmetic,
    load_policy,
    load_problems,
    split_problems,
)
from certdraft.arbitration.arbitration_report import (
    ArbitrationResult,
    arbitration_table,
    measure_arbitration,
    summarise,
)
from certdraft.arbitration.environment import ArbitrationEnv, ArbitrationSettings
from certdraft.data import eos_ids_of, load_target, load_tokenizer, tokenizer_fingerprint
from certdraft.evaluation import provenance, write_json

DType = Literal["float32", "bfloat16", "float16"]


def run_arbitrate(
    policy: str,
    out: str,
    target: str | None = None,
    drafter: str | None = None,
    problems: str = "arithmetic",
    max_problems: int = 1000,
    threshold: float = 0.5,
    texts: ArbitrationSettings | None = None,
    sandbox: Sandbox = Sandbox(),  # noqa: B008, frozen
    max_paths: int = 256,
    dtype: DType | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> None:
    """Measure accuracy and speed of an arbitration policy beside target, drafter, baselines and ceiling.

    Args:
        policy: folder that `fit` wrote.
        out: file of the result, json.
        target: folder or hub name; the one the policy was trained with if not given.
        drafter: folder or hub name of a causal drafter with the target's tokenizer; the one the policy was
            trained with if not given.
        problems: "arithmetic", or a jsonl file in the shape of GSM8K, HumanEval, MBPP, or our own.
        max_problems: most problems that are measured.
        threshold: probability above which the draft token is taken.
        texts: how texts are written; as in the policy's training if not given.
        sandbox: limits on programs that the verifier runs.
        max_paths: per problem, for the ceiling.
        dtype: of both models; each one's in the policy's training if not given.
        device: where they run.
        seed: of arithmetic problems and of the coin.

    Raises:
        ValueError: the policy does not name its target or drafter and they are not given, or tokenizers
            differ.
        FileNotFoundError: no such policy, model or problems file.
    """
    loaded = load_policy(policy).to(device)
    target, drafter = target or loaded.facts.get("target"), drafter or loaded.facts.get("drafter")
    if not target or not drafter:
        raise ValueError(
            f"{policy} does not say which models it was trained with: give --target and --drafter"
        )
    if texts is None:
        texts = ArbitrationSettings(**loaded.texts)
    elif loaded.texts and (changed := _changed(loaded.texts, texts)):
        print(f"note: the policy was trained with other settings of texts: {changed}", file=sys.stderr)
    measured, matching = _problems(problems, max_problems, seed)
    kinds = [dtype or loaded.facts.get(f"{model}_dtype", "float32") for model in ("target", "drafter")]
    env = open_env(target, drafter, texts, sandbox, dtype=kinds[0], drafter_dtype=kinds[1], device=device)
    result = measure_arbitration(
        env, loaded, measured, matching, threshold=threshold, max_paths=max_paths, seed=seed
    )
    summary = write_arbitration(
        [result],
        out,
        {
            "target": target,
            "drafter": drafter,
            "policy": policy,
            "target_dtype": kinds[0],
            "drafter_dtype": kinds[1],
            "texts": dataclasses.asdict(texts),
        },
    )
    print(as_text(summary), file=sys.stdout)


def open_env(
    target: str,
    drafter: str,
    texts: ArbitrationSettings,
    sandbox: Sandbox = Sandbox(),  # noqa: B008, frozen
    *,
    dtype: DType = "float32",
    drafter_dtype: DType | None = None,
    device: str = "cpu",
) -> ArbitrationEnv:
    """Load a target and a causal drafter by folder or hub name into an environment.

    Args:
        target: folder, GGUF file or hub name.
        drafter: folder or hub name of a causal drafter.
        texts: how texts are written.
        sandbox: limits on programs that the verifier runs.
        dtype: of the target's weights.
        drafter_dtype: of the drafter's; the target's if not given.
        device: where both run.

    Raises:
        ValueError: the two have different tokenizers.
        FileNotFoundError: one does not exist.
    """
    import torch

    tokenizer = load_tokenizer(target)
    if tokenizer_fingerprint(tokenizer) != tokenizer_fingerprint(load_tokenizer(drafter)):
        raise ValueError(
            f"the drafter {drafter} has another tokenizer than the target {target}: their token ids mean "
            "different text; use a drafter with the target's tokenizer"
        )
    kinds = ((target, dtype), (drafter, drafter_dtype or dtype))
    models = [load_target(name, dtype=getattr(torch, kind), device=device) for name, kind in kinds]
    eos = sorted(eos_ids_of(models[0], tokenizer))
    return ArbitrationEnv(Lockstep(models[0]), Lockstep(models[1]), tokenizer, texts, sandbox, eos)


def write_arbitration(
    results: list[ArbitrationResult], out: str | Path, facts: dict[str, Any]
) -> dict[str, Any]:
    """Write the summary of runs (one per seed) as json, with facts and provenance; return the summary."""
    summary = summarise(results)
    write_json(Path(out), {**facts, **summary, "provenance": provenance()})
    return summary


def as_text(summary: dict[str, Any]) -> str:
    """Return the table of a summary for a terminal."""
    return arbitration_table(summary).text()


def _changed(trained: dict[str, Any], texts: ArbitrationSettings) -> str:
    """The settings that decide which text is written and differ from the policy's training."""
    return ", ".join(
        f"{name} {trained[name]} there, {value} here"
        for name, value in dataclasses.asdict(texts).items()
        if name not in ("texts_at_once", "branches") and name in trained and trained[name] != value
    )


def _problems(source: str, most: int, seed: int) -> tuple[list[Problem], list[Problem]]:
    if most < 1:
        raise ValueError(f"max_problems is {most}; give at least 1")
    if source == "arithmetic":
        return arithmetic("test", most, seed), arithmetic("validation", max(50, most // 4), seed)
    matching, measured = split_problems(load_problems(source), (0.2, 0.8))
    return measured[:most], matching[:most]
