"""`certdraft evaluate` as a typed function: the signature is the command line."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch

from certdraft.data import (
    Generation,
    Prompts,
    load_target,
    load_tokenizer,
    open_trace,
    tokenizer_fingerprint,
)
from certdraft.decoding import TreeBuilder, context_limit
from certdraft.evaluation.evaluate import evaluate, refuse_builders
from certdraft.evaluation.generate_answers import WrittenMeta, write_texts
from certdraft.evaluation.loading import TargetVocabulary, load_checked, pick_device, show_progress
from certdraft.evaluation.prompts import read_questions
from certdraft.evaluation.report.evaluate_report import write_evaluation
from certdraft.evaluation.report.page import claim_directory, write_json
from certdraft.evaluation.report.provenance import provenance
from certdraft.evaluation.report.publish import headline, publish

_RENDERING = Prompts(turns="all")


def run_evaluate(
    out: str | None = None,
    drafters: dict[str, str] | None = None,
    trace: str | None = None,
    target: str | None = None,
    prompts_files: list[str] | None = None,
    revision: str | None = None,
    builders: list[TreeBuilder] | None = None,
    prompts: int = 32,
    replay_documents: int | None = 256,
    max_documents: int | None = None,
    max_new_tokens: int | None = None,
    rendering: Prompts = _RENDERING,
    exact_kl: bool = False,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "auto",
    seed: int = 0,
    title: str = "",
    wandb_project: str | None = None,
) -> Path:
    """Drafters side by side on held-out text: certified and realised acceptance, τ, speed.

    Texts come from a recorded trace, or the target writes them: greedy answers to the questions of prompts
    files, taken as Spec-Bench, MT-Bench, GSM8K, HumanEval and MBPP publish them. Numbers are then shown for
    each file and category too.

    Args:
        out: new folder for report.html, report.json, tables.md and figures; runs/evaluate/TIME if not given.
        drafters: name → exported folder or hub name; the first is the baseline of the comparisons.
        trace: folder of a trace that no drafter was trained on.
        target: "embedded", a local folder or a hub name; decoded for real. Without it nothing is timed.
        prompts_files: jsonl files of questions, instead of a trace; they need the target.
        revision: hub revision of the target.
        builders: draft trees; a chain of 4 and a best-first tree of 16 nodes when not given.
        prompts: prompts decoded for real, spread evenly; of each file when there are prompts files.
        replay_documents: documents replayed for τ.
        max_documents: documents read for acceptance.
        max_new_tokens: cut continuations to this length; with prompts files the longest answer, 128 when not
            given.
        rendering: how questions of prompts files become token ids.
        exact_kl: recompute the target's full distributions along the trace instead of using the recorded
            heads.
        dtype: of target and drafters.
        device: "auto" (CUDA when there is one), "cpu", "cuda:0" and so on.
        seed: of the bootstrap.
        title: title of the page.
        wandb_project: also publish the report to this W&B project; sweeps rank by its eval/… numbers.

    Returns:
        Path of the HTML page.

    Raises:
        ValueError: no drafter, neither or both of trace and prompts files, a row of another shape than its
            file, a drafter of another tokenizer, a cost model of another device, a certified step that was
            rejected, bad numbers.
        FileExistsError: `out` is in use.
        FileNotFoundError: no such trace, prompts file, drafter or target.
    """
    if not drafters:
        raise ValueError("evaluate needs a drafter: --drafters '{name: exported folder or hub name}'")
    if (trace is None) == (not prompts_files):
        raise ValueError(
            "evaluate needs either --trace (recorded texts) or --prompts_files (the target answers them), "
            f"and not both; got {'both' if trace else 'neither'}"
        )
    if prompts_files and target is None:
        raise ValueError("prompts files need --target: it writes the texts that drafters are measured on")
    questions = [q for file in prompts_files or [] for q in read_questions(file, prompts)]
    where = pick_device(device)
    model = None
    if target is not None:
        model = load_target(target, revision=revision, dtype=getattr(torch, dtype), device=where)
    known: Any
    if trace is not None:
        known = open_trace(trace)
    else:
        assert target is not None
        assert model is not None
        tokenizer = load_tokenizer(target, revision=revision)
        head = model.get_output_embeddings().weight.shape[0]
        known = TargetVocabulary(target, head, tokenizer_fingerprint(tokenizer))
    loaded = {name: load_checked(path, known, where, dtype, model) for name, path in drafters.items()}
    if model is not None:
        refuse_builders(builders or [], model, loaded)
    folder = claim_directory(out or Path("runs", "evaluate", f"{datetime.now():%Y-%m-%d_%H-%M-%S_%f}"))
    if trace is None:
        assert model is not None
        limit = max_new_tokens or 128
        limits = [context_limit(model), *(getattr(d, "max_context", None) for d in loaded.values())]
        opened: Any = write_texts(
            model,
            tokenizer,
            questions,
            rendering,
            Generation(limit, min([n for n in limits if n] or [1 << 20])),
            WrittenMeta(known.name, known.fingerprint, dtype, min(32, head), head, revision),
            progress=show_progress,
        )
    else:
        opened = known
    report = evaluate(
        loaded,
        opened,
        model,
        builders=builders,
        prompts=prompts if trace is not None else None,
        replay_documents=replay_documents,
        max_documents=max_documents,
        max_new_tokens=max_new_tokens,
        exact_kl=exact_kl,
        seed=seed,
        progress=show_progress,
    )
    files: dict[str, str | Path] = {f"prompts {Path(f).name}": f for f in prompts_files or []}
    if trace is not None:
        files["trace.json"] = Path(trace) / "trace.json"
    files |= {f"drafter {name}": path for name, path in drafters.items() if Path(path).is_dir()}
    source = {"trace": trace} if trace is not None else {"prompts files": ", ".join(prompts_files or [])}
    page = write_evaluation(report, folder, {**source, **provenance(files)}, title)
    write_json(folder / "metrics.json", headline(report.data))
    print(f"report: {page}", file=sys.stderr)
    if wandb_project is not None:
        publish(str(folder), wandb_project)
    return page
