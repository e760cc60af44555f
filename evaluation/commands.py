"""`certdraft certify` and `certdraft evaluate` as typed functions: the signature is the command line."""

from __future__ import annotations

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
    out: str,
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
    """Certificates of a target: the tables and figures of arXiv 2606.30265, for any target, without a
    drafter.

    Give a recorded trace, or a target and a corpus to record one first (kept in OUT/trace; a killed recording
    goes on where it stopped when the same command is run again).

    Args:
        out: new folder for certify.html, certify.json, tables.md, figures.
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
    folder = Path(out)
    recording = folder / "trace"
    if trace is not None or not recording.is_dir() or (folder / "certify.json").exists():
        claim_directory(folder)
    if target is not None:
        from certdraft.data import record_trace  # brings Lightning, which reading a trace does not need

        record_trace(
            str(recording),
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
    source = recording if trace is None else Path(trace)
    opened = open_trace(source)
    widest = max(protocol.coverage, default=1)
    if opened.meta.vocab_size > widest:
        opened.check_num_kept(widest + 1, f"coverage(m={widest})")
    report = certify(select(opened, max_documents, min_prompt_tokens), protocol)
    facts = provenance({"trace.json": source / "trace.json"})
    return write_certify(report, folder, {"trace": str(source), **facts}, title)
