"""`certdraft profile`: measure the cost of drafting and verifying here, as a file for `CostAware`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Literal

import torch

from certdraft.data import load_target, load_tokenizer, tokenizer_fingerprint
from certdraft.decoding import CostModel, TargetRunner, profile
from certdraft.evaluation.loading import StageProgress, TargetVocabulary, load_checked, pick_device
from certdraft.evaluation.report.page import Table, number

_CONTEXTS = [16, 128, 512]
_NODES = [0, 1, 2, 4, 8, 16, 32, 64]


def run_profile(
    drafter: str,
    target: str = "embedded",
    out: str = "cost.json",
    revision: str | None = None,
    contexts: list[int] = _CONTEXTS,
    nodes: list[int] = _NODES,
    repeats: int = 20,
    dtype: Literal["float32", "bfloat16", "float16"] = "float32",
    device: str = "auto",
    seed: int = 0,
    overwrite: bool = False,
) -> Path:
    """Measure draft and verify latency over (draft tokens, context) and write the cost model.

    Trees use it by its path: `--builders '[{class_path: CostAware, init_args: {cost_model: cost.json}}]'`.
    Run it with the threads, the load and the dtype that decoding will have: another device, target or drafter
    shape is refused when the file is used.

    Args:
        drafter: exported folder or hub name.
        target: "embedded", a local folder or a hub name.
        out: JSON file to write.
        revision: hub revision of the target.
        contexts: context lengths to measure at, tokens, ascending.
        nodes: draft tokens verified in one pass, ascending from 0.
        repeats: samples per point; the median is kept.
        dtype: of target and drafter.
        device: "auto" (CUDA when there is one), "cpu", "cuda:0" and so on.
        seed: of the token ids.
        overwrite: replace an existing file.

    Returns:
        Path of the cost model.

    Raises:
        ValueError: a drafter of another tokenizer, contexts longer than the models read, or no such device.
        FileExistsError: `out` exists.
        FileNotFoundError: no such drafter or target.
    """
    path = Path(out)
    if path.exists() and not overwrite:
        raise FileExistsError(
            f"{path} exists already; name another file with --out, or pass --overwrite true"
        )
    where = pick_device(device)
    model = load_target(target, revision=revision, dtype=getattr(torch, dtype), device=where)
    fingerprint = tokenizer_fingerprint(load_tokenizer(target, revision=revision))
    vocabulary = TargetVocabulary(target, model.get_output_embeddings().weight.shape[0], fingerprint)
    loaded = load_checked(drafter, vocabulary, where, dtype, model)
    runner = TargetRunner(model, loaded.taps)
    with StageProgress() as progress:
        cost = profile(runner, loaded, contexts, nodes, repeats=repeats, seed=seed, progress=progress)
    cost.save(path)
    print(cost_table(cost).markdown())
    print(f"cost model: {path}", file=sys.stderr)
    return path


def cost_table(cost: CostModel) -> Table:
    """Return fitted milliseconds of a drafter pass and of a round by its draft tokens, a row per context."""
    rows = []
    for context, draft, verify in zip(cost.contexts, cost.draft, cost.verify, strict=True):
        milliseconds = [number(1000 * s, 2) for s in (*draft, *verify)]
        rows.append([str(context), *milliseconds])
    return Table(
        f"Milliseconds on {cost.device}",
        ["context", "drafter pass", "each further node", *(f"n = {n}" for n in cost.nodes)],
        rows,
        "n: the rest of a round with n draft tokens: tree, target pass over n + 1 slots, acceptance, "
        "compaction. n = 0 is a plain decoding step.",
    )
