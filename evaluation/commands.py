"""`certdraft evaluate` as a typed function: the signature is the command line."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import torch

from certdraft.data import load_target, open_trace
from certdraft.decoding import TreeBuilder
from certdraft.evaluation.evaluate import evaluate, refuse_builders
from certdraft.evaluation.evaluate_report import write_evaluation
from certdraft.evaluation.loading import load_checked, pick_device, show_progress
from certdraft.evaluation.provenance import provenance
from certdraft.evaluation.report import claim_directory


def run_evaluate(
    out: str,
    drafters: dict[str, str],
    trace: str,
    target: str | None = None,
    revision: str | None = None,
    builders: list[TreeBuilder] | None = None,
    prompts: int = 32,
    replay_documents: int | None = 256,
    max_documents: int | None = None,
    max_new_tokens: int | None = None,
    exact_kl: bool = False,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "auto",
    seed: int = 0,
    title: str = "",
) -> Path:
    """Drafters side by side on held-out text: certified and realised acceptance, τ, speed.

    Args:
        out: new folder for report.html, report.json, tables.md and figures.
        drafters: name → exported folder or hub name; the first is the baseline of the comparisons.
        trace: folder of a trace that no drafter was trained on.
        target: "embedded", a local folder or a hub name; decoded for real. Without it nothing is timed.
        revision: hub revision of the target.
        builders: draft trees; a chain of 4 and a best-first tree of 16 nodes when not given.
        prompts: prompts decoded for real.
        replay_documents: documents replayed for τ.
        max_documents: documents read for acceptance.
        max_new_tokens: cut continuations to this length.
        exact_kl: recompute the target's full distributions along the trace instead of using the recorded
            heads.
        dtype: of target and drafters.
        device: "auto" (CUDA when there is one), "cpu", "cuda:0" and so on.
        seed: of the bootstrap.
        title: title of the page.

    Returns:
        Path of the HTML page.

    Raises:
        ValueError: a drafter of another tokenizer, a certified step that was rejected, bad numbers.
        FileExistsError: `out` is in use.
        FileNotFoundError: no such trace, drafter or target.
    """
    opened = open_trace(trace)
    where = pick_device(device)
    loaded = {name: load_checked(path, opened, where, dtype) for name, path in drafters.items()}
    model = None
    if target is not None:
        model = load_target(target, revision=revision, dtype=getattr(torch, dtype), device=where)
        refuse_builders(builders or [], model, loaded)
    folder = claim_directory(out)
    report = evaluate(
        loaded,
        opened,
        model,
        builders=builders,
        prompts=prompts,
        replay_documents=replay_documents,
        max_documents=max_documents,
        max_new_tokens=max_new_tokens,
        exact_kl=exact_kl,
        seed=seed,
        progress=show_progress,
    )
    files: dict[str, str | Path] = {"trace.json": Path(trace) / "trace.json"}
    files |= {f"drafter {name}": path for name, path in drafters.items() if Path(path).is_dir()}
    page = write_evaluation(report, folder, {"trace": trace, **provenance(files)}, title)
    print(f"report: {page}", file=sys.stderr)
    return page
