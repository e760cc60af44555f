"""`certdraft certify` as a typed function: the signature is the command line."""

from __future__ import annotations

import math
import sys
from datetime import datetime
from pathlib import Path
from typing import Literal

from certdraft.data import Corpus, Generation, Prompts, open_trace
from certdraft.decoding import TreeBuilder
from certdraft.evaluation.certify.certify import CertifyProtocol, certify
from certdraft.evaluation.certify.certify_drafter import join_drafter
from certdraft.evaluation.certify.certify_report import write_certify
from certdraft.evaluation.loading import load_checked, pick_device, show_progress
from certdraft.evaluation.measure.trace_reading import select
from certdraft.evaluation.report.page import claim_directory
from certdraft.evaluation.report.provenance import provenance

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
    drafter: str | None = None,
    builders: list[TreeBuilder] | None = None,
    top_m: int = 4,
    tie_gap: float = 1e-3,
    replay_documents: int | None = 256,
    drafter_dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "auto",
    title: str = "",
) -> Path:
    """Certificates of a target, no drafter needed: the tables and figures of arXiv 2606.30265.

    Give a recorded trace, or a target and a corpus to record one first (kept in OUT/trace; a killed recording
    goes on where it stopped when the same command is run again). With a drafter the page also says, for every
    rule and margin, which steps are certified and which are accepted, and why each rejection happened.

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
        drafter: exported folder or hub name, not trained on this text; adds the joined view.
        builders: draft trees whose rounds are replayed; a chain of 4 and a best-first tree of 16 nodes when
            not given.
        top_m: drafter ranks that count as "in top-m" among its rejections.
        tie_gap: lead of the target's greedy token, nats, up to which a rejection is a numerical tie; 0.1
            suits a bfloat16 target.
        replay_documents: documents replayed through the trees.
        drafter_dtype: of the drafter's weights.
        device: of the drafter: "auto" (CUDA when there is one), "cpu", "cuda:0" and so on.
        title: title of the page.

    Returns:
        Path of the HTML page.

    Raises:
        ValueError: neither or both of trace and target, a head too short for the protocol's widths, no
            counted step, a drafter of another tokenizer, or a certified step that was rejected.
        FileExistsError: `out` is in use.
        FileNotFoundError: no such trace, target, corpus or drafter.
    """
    if (trace is None) == (target is None):
        raise ValueError(
            "certify needs either --trace (a recorded trace) or --target (a model whose continuations are "
            f"recorded first), and not both; got {'both' if trace else 'neither'}"
        )
    _check_counts(max_documents=max_documents, top_m=top_m, replay_documents=replay_documents)
    if not 0 <= tie_gap < math.inf:
        raise ValueError(f"tie_gap={tie_gap} is a lead in nats: 0 or more, and finite")
    if drafter is not None and drafter.startswith(("/", "./", "../", "~")) and not Path(drafter).is_dir():
        raise FileNotFoundError(f"drafter {drafter}: no such folder; give one written by `certdraft export`")
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
    loaded = None
    if drafter is not None:
        loaded = load_checked(drafter, opened, pick_device(device), drafter_dtype)
    if trace is not None:
        claim_directory(folder)
    report = certify(chosen, protocol)
    files: dict[str, str | Path] = {"trace.json": source / "trace.json"}
    if drafter is not None:
        name = Path(drafter).name
        report.data["drafter"] = join_drafter(
            name,
            loaded,
            chosen,
            builders=builders,
            replay_documents=replay_documents,
            top_m=top_m,
            tie_gap=tie_gap,
            progress=show_progress,
        )
        files |= {f"drafter {name}": drafter} if Path(drafter).is_dir() else {}
    page = write_certify(report, folder, {"trace": str(source), **provenance(files)}, title)
    print(f"report: {page}", file=sys.stderr)
    return page


def _check_counts(**counts: int | None) -> None:
    """Refuses a count below 1, before anything is recorded."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be 1 or more; leave it out for its default")
