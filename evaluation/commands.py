"""`certdraft certify` and `certdraft evaluate` as typed functions: the signature is the command line."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

import torch

from certdraft.data import (
    Corpus,
    Generation,
    Prompts,
    Trace,
    load_target,
    load_tokenizer,
    open_trace,
    tokenizer_fingerprint,
)
from certdraft.decoding import TreeBuilder
from certdraft.drafters import CausalDrafter, load_drafter, read_facts
from certdraft.evaluation.certify import CertifyProtocol, certify
from certdraft.evaluation.certify_report import write_certify
from certdraft.evaluation.evaluate import evaluate
from certdraft.evaluation.evaluate_report import write_evaluation
from certdraft.evaluation.provenance import provenance
from certdraft.evaluation.reading import select
from certdraft.evaluation.report import claim_directory

_CORPUS, _PROMPTS, _GENERATION, _PROTOCOL = Corpus(), Prompts(), Generation(), CertifyProtocol()


def run_certify(
    out: str | None = None,
    trace: str | None = None,
    target: str | None = None,
    corpus: Corpus = _CORPUS,
    prompts: Prompts = _PROMPTS,
    generation: Generation = _GENERATION,
    revision: str | None = None,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    num_kept: int = 64,
    batch_size: int = 32,
    accelerator: str = "auto",
    devices: int = 1,
    max_documents: int | None = None,
    min_prompt_tokens: int = 0,
    protocol: CertifyProtocol = _PROTOCOL,
    title: str = "",
) -> Path:
    """Certificates of a target, no drafter needed: the tables and figures of arXiv 2606.30265.

    Give a recorded trace, or a target and a corpus to record one first (kept in OUT/trace; a killed recording
    goes on where it stopped when the same command is run again).

    Args:
        out: new folder for certify.html, certify.json, tables.md and figures; runs/certify/TIME if not given.
        trace: folder of a recorded trace; then target and corpus are not used.
        target: "embedded", a local folder or a hub name; its greedy continuations are recorded first.
        corpus: which rows become prompts.
        prompts: how rows become token ids.
        generation: what the target writes.
        revision: hub revision of the target.
        dtype: dtype of the target's weights; logits are fp32 whatever it is.
        num_kept: head entries recorded per step.
        batch_size: prompts per forward pass while recording.
        accelerator: Lightning accelerator for the recording.
        devices: devices for the recording.
        max_documents: use the first so many documents.
        min_prompt_tokens: leave out documents with a shorter prompt.
        protocol: rules, sizes and budgets to tabulate.
        title: title of the page.

    Returns:
        Path of the HTML page.

    Raises:
        ValueError: neither or both of trace and target, a head too short for the protocol's widths, or no
            counted step.
        FileExistsError: `out` is in use.
        FileNotFoundError: no such trace, target or corpus.
    """
    if (trace is None) == (target is None):
        raise ValueError(
            "certify needs either --trace (a recorded trace) or --target (a model whose continuations are "
            f"recorded first), and not both; got {'both' if trace else 'neither'}"
        )
    now = datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    folder = Path(out) if out else Path("runs") / "certify" / now
    source = folder / "trace" if trace is None else Path(trace)
    if target is not None:
        from certdraft.data import record_trace  # brings Lightning, which reading a trace does not need

        if not source.is_dir() or (folder / "certify.json").exists():
            claim_directory(folder)
        record_trace(
            str(source),
            target,
            corpus,
            prompts,
            generation,
            revision=revision,
            dtype=dtype,
            num_kept=num_kept,
            batch_size=batch_size,
            accelerator=accelerator,
            devices=devices,
        )
    opened = open_trace(source)
    widest = max(protocol.coverage, default=1)
    if opened.meta.vocab_size > widest:
        opened.check_num_kept(widest + 1, f"coverage(m={widest})")
    chosen = select(opened, max_documents, min_prompt_tokens)
    if trace is not None:
        claim_directory(folder)
    facts = provenance({"trace.json": source / "trace.json"})
    page = write_certify(certify(chosen, protocol), folder, {"trace": str(source), **facts}, title)
    print(f"report: {page}", file=sys.stderr)
    return page


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
    where = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
    loaded = {name: load_checked(path, opened, where, dtype) for name, path in drafters.items()}
    model = None
    if target is not None:
        model = load_target(target, revision=revision, dtype=getattr(torch, dtype), device=where)
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


def load_checked(path: str, trace: Trace, device: torch.device, dtype: str) -> CausalDrafter:
    """A drafter on its device, once its tokenizer is known to be the trace's.

    Raises:
        FileNotFoundError: no such drafter.
        ValueError: another tokenizer or vocabulary, both are shown.
    """
    exported = (Path(path) / "drafter.json").is_file()
    facts = (read_facts(path)["facts"] or {}) if exported else {}
    fingerprint = facts.get("tokenizer_fingerprint") or tokenizer_fingerprint(load_tokenizer(path))
    trace.check_tokenizer(fingerprint, f"that of the drafter {path},")
    wanted: Any = None if dtype == "float16" else dtype
    drafter = load_drafter(path, dtype=wanted) if exported else CausalDrafter(pretrained=path, dtype=wanted)
    drafter.build(trace.meta.vocab_size)
    return drafter.to(device).eval()


def show_progress(stage: str, done: int, total: int) -> None:
    """One line on standard error, rewritten in place; nothing when that is not a terminal."""
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r{stage}: {done}/{total}\033[K", end=end, file=sys.stderr, flush=True)
