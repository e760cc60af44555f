"""`certdraft certify` as a typed function: the signature is the command line."""

from __future__ import annotations

import sys
from datetime import datetime
from pathlib import Path
from typing import Literal

from certdraft.data import Corpus, Generation, Prompts, open_trace
from certdraft.evaluation.certify import CertifyProtocol, certify
from certdraft.evaluation.certify_report import write_certify
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
