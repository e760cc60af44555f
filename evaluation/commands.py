"""`certdraft evaluate` and `certdraft certify` as typed functions: each signature is the command line."""

from __future__ import annotations

import math
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch

from certdraft.data import (
    Corpus,
    Generation,
    Prompts,
    load_target,
    load_target_ends,
    load_tokenizer,
    open_trace,
    tokenizer_fingerprint,
)
from certdraft.decoding import TreeBuilder, context_limit
from certdraft.drafters import drafter_kinds, read_facts
from certdraft.evaluation.certify.certify import CertifyProtocol, certify
from certdraft.evaluation.certify.certify_report import headline_of_certificates, write_certify
from certdraft.evaluation.evaluate import evaluate, refuse_builders
from certdraft.evaluation.generate_answers import WrittenMeta, write_texts
from certdraft.evaluation.held_out import refuse_training_texts
from certdraft.evaluation.loading import StageProgress, TargetVocabulary, load_checked, pick_device
from certdraft.evaluation.measure.trace_reading import select_documents
from certdraft.evaluation.prompts import read_questions
from certdraft.evaluation.report.evaluate_report import differences, write_evaluation
from certdraft.evaluation.report.page import refuse_folder_in_use, report_folder, write_json
from certdraft.evaluation.report.provenance import provenance
from certdraft.evaluation.report.publish import headline_metrics, publish

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from certdraft.data import TraceMeta

_TURNS, _CORPUS, _PROMPTS, _GENERATION = Prompts(turns="all"), Corpus(), Prompts(), Generation()
_PROTOCOL = CertifyProtocol()
Dtype = Literal["float32", "bfloat16", "float16"]


class NotLossless(ValueError):
    """A decoded text differs from the target's greedy text where the target is not tied."""


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
    rendering: Prompts = _TURNS,
    exact_kl: bool = False,
    dtype: Dtype = "float32",
    device: str = "auto",
    seed: int = 0,
    title: str = "",
    wandb_project: str | None = None,
) -> Path:
    """Compare drafters on held-out text: certified and realised acceptance, acceptance length τ, speed.

    Texts come from a recorded trace, or from the target's greedy answers to the questions of prompts files,
    read as Spec-Bench, MT-Bench, GSM8K, HumanEval and MBPP publish them; numbers are then shown for each file
    and category too.

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
        NotLossless: a decoded text differs from the target's greedy text by more than a numerical tie; the
            report is written first.
        ValueError: no drafter, neither or both of trace and prompts files, a trace that a drafter was trained
            on, a row of another shape than its file, a drafter of another tokenizer, a cost model of another
            device, a certified step that was rejected, bad numbers.
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
    path = refuse_folder_in_use(out or Path("runs", "evaluate", f"{datetime.now():%Y-%m-%d_%H-%M-%S_%f}"))
    if trace is not None:
        refuse_training_texts(drafters, trace)
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
        num_tokens = model.get_output_embeddings().weight.shape[0]
        known = TargetVocabulary(target, num_tokens, tokenizer_fingerprint(tokenizer))
    loaded = {name: load_checked(path, known, where, dtype, model) for name, path in drafters.items()}
    if model is not None:
        refuse_builders(builders or [], model, loaded)
    with report_folder(path) as folder, StageProgress() as progress:
        opened: Any = known
        if trace is None:
            assert model is not None
            limits = [context_limit(model), *(getattr(d, "max_context", None) for d in loaded.values())]
            opened = write_texts(
                model,
                tokenizer,
                questions,
                rendering,
                Generation(max_new_tokens or 128, min([n for n in limits if n] or [1 << 20])),
                WrittenMeta(known.name, known.fingerprint, dtype, min(32, num_tokens), num_tokens, revision),
                progress=progress,
            )
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
            progress=progress,
        )
        files: dict[str, str | Path] = {f"prompts {Path(f).name}": f for f in prompts_files or []}
        if trace is not None:
            files["trace.json"] = Path(trace) / "trace.json"
        files |= {f"drafter {name}": found for name, found in drafters.items() if Path(found).is_dir()}
        source = {"trace": trace} if trace is not None else {"prompts files": ", ".join(prompts_files or [])}
        name = write_evaluation(report, folder, {**source, **provenance(files)}, title).name
        write_json(folder / "metrics.json", headline_metrics(report.data))
    print(report)
    print(f"report: {path / name}", file=sys.stderr)
    if wandb_project is not None:
        publish(str(path), wandb_project)
    faults, ties = differences(report.data)
    if ties:
        print(ties, file=sys.stderr)
    if faults:
        raise NotLossless(f"{faults} The report is in {path}.")
    return path / name


def run_certify(
    out: str | None = None,
    trace: str | None = None,
    target: str | None = None,
    corpus: Corpus = _CORPUS,
    prompts: Prompts = _PROMPTS,
    generation: Generation = _GENERATION,
    revision: str | None = None,
    dtype: Dtype = "float32",
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
    tie_gap: float | None = None,
    replay_documents: int | None = 256,
    drafter_dtype: Literal["float32", "bfloat16"] = "float32",
    device: str = "auto",
    title: str = "",
) -> Path:
    """Certify a target without a drafter: the tables and figures of arXiv 2606.30265.

    Give a recorded trace, or a target and a corpus to record one first (kept in OUT/trace; a killed recording
    resumes when the same command is run again). With a drafter the page also shows, for every rule and
    margin, which steps are certified and which are accepted, and the causes of rejections.

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
        batch_size: prompts continued side by side while recording.
        accelerator: Lightning accelerator for the recording.
        devices: devices for the recording.
        max_documents: use the first so many documents.
        min_prompt_tokens: leave out documents with a shorter prompt.
        protocol: rules, sizes and budgets to tabulate.
        drafter: exported folder or hub name, not trained on this text; adds the joined view. EAGLE heads and
            block drafters need a trace that holds the hidden states they read.
        builders: draft trees whose rounds are replayed; a chain of 4 and a best-first tree of 16 nodes when
            not given.
        top_m: drafter ranks that count as "in top-m" among its rejections.
        tie_gap: lead of the target's greedy token, nats, up to which a rejection is a numerical tie; when not
            given 0.001 for a trace of a float32 target, 0.1 for one in half precision.
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
    if tie_gap is not None and not 0 <= tie_gap < math.inf:
        raise ValueError(f"tie_gap={tie_gap} is a lead in nats: 0 or more, and finite")
    if drafter is not None and drafter.startswith(("/", "./", "../", "~")) and not Path(drafter).is_dir():
        raise FileNotFoundError(f"drafter {drafter}: no such folder; give one written by `certdraft export`")
    path = Path(out or Path("runs", "certify", f"{datetime.now():%Y-%m-%d_%H-%M-%S}"))
    source = path / "trace" if trace is None else Path(trace)
    if trace is not None or not source.is_dir() or (path / "certify.json").exists():
        refuse_folder_in_use(path)
    if target is not None:
        from certdraft.data import record_trace  # brings Lightning, which reading a trace does not need

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
    chosen = select_documents(opened, max_documents, min_prompt_tokens)
    files: dict[str, str | Path] = {"trace.json": source / "trace.json"}
    loaded: dict[str, Any] = {}
    if drafter is not None:
        name = Path(drafter).name
        place = pick_device(device)
        model = _target_of(drafter, opened.meta, drafter_dtype)
        loaded[name] = load_checked(drafter, opened, place, drafter_dtype, model)
        files |= {f"drafter {name}": drafter} if Path(drafter).is_dir() else {}
    made = report_folder(path) if trace is not None else _beside_the_trace(path)
    with made as folder, StageProgress() as progress:
        report = certify(chosen, protocol, progress=progress)
        if loaded:
            joined = evaluate(
                loaded,
                chosen,
                builders=builders,
                replay_documents=replay_documents,
                top_m=top_m,
                tie_gap=tie_gap,
                progress=progress,
            )
            report.data["drafter"] = {"name": name, **joined.data["drafters"][name]}
        page = path / write_certify(report, folder, {"trace": str(source), **provenance(files)}, title).name
    print(headline_of_certificates(report).text())
    print(f"report: {page}", file=sys.stderr)
    return page


def _target_of(drafter: str, meta: TraceMeta, dtype: str) -> PreTrainedModel | None:
    """Embeddings, norm and lm_head of the trace's target, for an export that shares them.

    Hidden states come from the trace, so no layer is read.
    """
    exported = (Path(drafter) / "drafter.json").is_file()
    kind = drafter_kinds().get(read_facts(drafter)["family"]) if exported else None
    if kind is None or not kind.reads_target:
        return None
    ends = load_target_ends(meta.target, revision=meta.target_revision)
    for weight in ends.parameters():
        if not weight.is_meta:  # nothing but the ends was read; the drafter takes them to its device
            weight.data = weight.data.to(getattr(torch, dtype))
    return ends


@contextmanager
def _beside_the_trace(path: Path) -> Iterator[Path]:
    """A temporary folder in `path` whose files move up at the end of the block, certify.json last."""
    folder = path / ".report.partial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
        for file in sorted(folder.iterdir(), key=lambda file: file.name == "certify.json"):
            file.replace(path / file.name)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check_counts(**counts: int | None) -> None:
    """Raise for a count below 1, before anything is recorded."""
    for name, value in counts.items():
        if value is not None and value < 1:
            raise ValueError(f"{name}={value} must be 1 or more; leave it out for its default")
