"""Make a fresh drafter for its target, and check that drafter, target and trace fit each other."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from typing import Any, Literal, NamedTuple

import numpy as np
import pytorch_lightning as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from certdraft.data import load_target, load_target_ends, load_tokenizer, tokenizer_fingerprint
from certdraft.drafters import Drafter, TargetSource, draft_vocab_coverage
from certdraft.support import facts_of
from certdraft.train.target_outputs import Online


def fit_to_target(
    drafter: Drafter, online: Online | None, datamodule: pl.LightningDataModule | None, seed: int = 0
) -> None:
    """Make a fresh drafter's network and refuse one that cannot draft for the target.

    Args:
        drafter: what is trained.
        online: the target that is run, if any.
        datamodule: where the trace comes from; its `meta` names target, tokenizer and vocabulary.
        seed: of the weights of a fresh drafter, whatever was drawn before.

    Raises:
        ValueError: vocabularies or tokenizers of trace, target and drafter differ; the drafter reads target
            layers that neither trace nor target provides, or has fewer positions than the documents.
    """
    meta: Any = getattr(datamodule, "meta", None)
    if online is not None:
        vocab_size, name = online.vocab_size, online.settings.name
        fingerprint = _fingerprint(name)
        if meta is not None:
            _check_same_target(meta, name, fingerprint, vocab_size)
    elif meta is not None:
        vocab_size, name, fingerprint = meta.vocab_size, meta.target, meta.tokenizer_fingerprint
    else:
        return
    found = counted(datamodule, "train")
    source = target_source(
        name,
        vocab_size,
        load=lambda: load_target(name) if online is None else online.model,
        ends=lambda: load_target_ends(name) if online is None else online.model,
        greedy_counts=lambda: None if found is None else found().greedy,
        token_mass=lambda: None if found is None else found().mass,
    )
    known = drafter.notice
    with torch.random.fork_rng(devices=[]):  # weights are drawn on the CPU
        torch.manual_seed(seed)
        drafter.build_from_target(source)
    if drafter.notice and drafter.notice != known:
        print(drafter.notice, file=sys.stderr)
        judged, ids = counted(datamodule, "validation"), drafter.draft_ids
        if judged is not None and ids is not None:
            print(f"on validation text {draft_vocab_coverage(judged().greedy, ids.cpu())}", file=sys.stderr)
    if (start := drafter.tokenizer_source) and (own := _fingerprint(start)) != fingerprint:
        raise ValueError(
            f"the drafter {start} has tokenizer {own[:12]}…, the target's is {fingerprint[:12]}…: their "
            "token ids mean different text. Start from a model with the target's tokenizer, or record the "
            "trace with the target that this drafter belongs to"
        )
    if drafter.vocab_size != vocab_size:
        raise ValueError(
            f"the drafter has a vocabulary of {drafter.vocab_size}, its target of {vocab_size}; draft tokens "
            "are the target's tokens, so start from a model with the target's tokenizer and padded vocabulary"
        )
    if online is None:
        check_features(drafter, meta.feature_layers, name)
    traces = [getattr(datamodule, f"{split}_trace", None) for split in ("train", "validation")]
    lengths = [int(trace.lengths.max()) for trace in traces if trace is not None and len(trace)]
    check_positions(drafter, max(lengths, default=0), getattr(datamodule, "seq_len", None))


def target_source(
    name: str,
    vocab_size: int,
    load: Any,
    ends: Any,
    greedy_counts: Any = lambda: None,
    token_mass: Any = lambda: None,
) -> TargetSource:
    """What a drafter may read of a target whose tokenizer can be loaded by its name."""
    return TargetSource(
        name,
        vocab_size,
        load,
        lambda: max(load_tokenizer(name).get_vocab().values()) + 1,
        greedy_counts,
        token_mass,
        ends,
    )


class TokenCounts(NamedTuple):
    """What the target chose over positions in a loss mask.

    Attributes:
        greedy: how often each token was the greedy token.
        mass: probability of each token, summed over positions; that of the recorded top-k logits.
    """

    greedy: Int[Tensor, " V"]
    mass: Float[Tensor, " V"]


def counted(datamodule: Any, split: Literal["train", "validation"]) -> Callable[[], TokenCounts] | None:
    """A function that counts the documents of a split once, when it is first called; None without a trace."""
    trace = getattr(datamodule, f"{split}_trace", None)
    if trace is None:
        return None
    documents = getattr(datamodule, "documents", {}).get(split, range(len(trace)))
    return cache(partial(token_counts, trace, documents))


def token_counts(trace: Any, documents: Iterable[int]) -> TokenCounts:
    """Count greedy tokens and sum probabilities over the positions in the loss masks of documents."""
    size = trace.meta.vocab_size
    greedy, mass = np.zeros(size, np.int64), np.zeros(size)
    for document in documents:
        columns = trace.columns(int(document))
        ids = columns.top_ids[columns.loss_mask].astype(np.int64)
        gap = columns.top_gap[columns.loss_mask].astype(np.float64)
        lead = columns.lse_gap[columns.loss_mask].astype(np.float64)
        np.add.at(greedy, ids[:, 0], 1)
        np.add.at(mass, ids, np.exp(-gap - lead[:, None]))
    return TokenCounts(torch.from_numpy(greedy), torch.from_numpy(mass))


def check_features(drafter: Drafter, layers: Sequence[int], target: str) -> None:
    """Raise ValueError for a drafter that reads target layers which the trace does not hold."""
    if missing := sorted({*drafter.taps} - {*layers}):
        held = f"layers {tuple(layers)}" if layers else "no features"
        raise ValueError(
            f"the drafter reads target layers {drafter.taps}; the trace holds {held} and lacks {missing}. "
            f"Record it with feature_layers={list(drafter.taps)}, or run the target beside the drafter: "
            f"--model.target.name {target}"
        )


def check_positions(drafter: Drafter, longest: int, seq_len: int | None) -> None:
    """Refuse a drafter with fewer positions than the longest document, or the row it is cut to."""
    limit = drafter.max_context
    if limit is None or seq_len is None or min(longest, seq_len) <= limit:
        return
    if drafter.causal_lm is not None:
        facts_of(drafter.causal_lm).check_window(min(longest, seq_len))
    raise ValueError(
        f"the drafter has {limit} positions, but documents of the trace reach {longest} tokens and "
        f"data.seq_len is {seq_len}: set max_position_embeddings of the drafter to the target's, or lower "
        f"data.seq_len to {limit}"
    )


def _check_same_target(meta: Any, name: str, fingerprint: str, vocab_size: int) -> None:
    if fingerprint != meta.tokenizer_fingerprint:
        raise ValueError(
            f"model.target {name} has tokenizer {fingerprint[:12]}…, the trace was recorded with "
            f"{meta.tokenizer_fingerprint[:12]}…; use the trace's own target ({meta.target}) or record again"
        )
    if vocab_size != meta.vocab_size:
        raise ValueError(
            f"model.target {name} has {vocab_size} logits a token, the trace's target ({meta.target}) "
            f"{meta.vocab_size}; use the trace's own target or record again"
        )


def _fingerprint(name: str) -> str:
    return tokenizer_fingerprint(load_tokenizer(name))
