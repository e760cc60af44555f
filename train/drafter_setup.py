"""Whether drafter, target and trace fit each other, and what a fresh drafter is told about the other two."""

from __future__ import annotations

import sys
from typing import Any

import pytorch_lightning as pl
import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedModel

from certdraft.data import load_target, load_tokenizer, tokenizer_fingerprint
from certdraft.drafters import BlockDrafter, CausalDrafter, Drafter, EagleDrafter
from certdraft.train.target_outputs import Online


def fit_to_target(
    drafter: Drafter, online: Online | None, datamodule: pl.LightningDataModule | None, seed: int = 0
) -> None:
    """Makes a fresh drafter's network and refuses one that cannot draft for the target.

    Args:
        drafter: what is trained.
        online: the target that is run, if any.
        datamodule: where the trace comes from; its `meta` names target, tokenizer and vocabulary.
        seed: of the weights of a fresh drafter, whatever was drawn before.

    Raises:
        ValueError: vocabularies or tokenizers of trace, target and drafter differ; the drafter reads target
            layers that nobody provides.
    """
    meta: Any = getattr(datamodule, "meta", None)
    if online is not None:
        vocab_size, name, theirs = online.vocab_size, online.settings.name, _fingerprint(online.settings.name)
        if meta is not None:
            _same_target(meta, name, theirs, vocab_size)
    elif meta is not None:
        vocab_size, name, theirs = meta.vocab_size, meta.target, meta.tokenizer_fingerprint
    else:
        return
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        _build(drafter, vocab_size, name, online, datamodule)
    if isinstance(drafter, CausalDrafter) and drafter.pretrained:
        _same_tokenizer(drafter.pretrained, _fingerprint(drafter.pretrained), theirs)
    if drafter.vocab_size != vocab_size:
        raise ValueError(
            f"the drafter has a vocabulary of {drafter.vocab_size}, its target of {vocab_size}; draft tokens "
            "are the target's tokens, so start from a model with the target's tokenizer and padded vocabulary"
        )
    if online is None and (missing := sorted({*drafter.taps} - {*meta.feature_layers})):
        held = f"layers {tuple(meta.feature_layers)}" if meta.feature_layers else "no features"
        raise ValueError(
            f"the drafter reads target layers {drafter.taps}; the trace holds {held} and lacks {missing}. "
            f"Record it with feature_layers={list(drafter.taps)}, or run the target beside the drafter: "
            f"--model.target.name {name}"
        )


def _build(drafter: Drafter, vocab_size: int, name: str, online: Online | None, datamodule: Any) -> None:
    if isinstance(drafter, EagleDrafter | BlockDrafter) and drafter.ends is not None:
        return

    def target() -> PreTrainedModel:
        return load_target(name) if online is None else online.model

    if isinstance(drafter, CausalDrafter):
        drafter.build(vocab_size, target() if drafter.init_from_target else None)
    elif isinstance(drafter, EagleDrafter):
        trace = getattr(datamodule, "train_trace", None)
        counts = None if trace is None else greedy_counts(trace)
        drafter.build(vocab_size, target(), counts)
        if drafter.lost is not None and drafter.draft_ids is not None:
            print(f"draft vocabulary of {len(drafter.draft_ids):,} tokens: {drafter.lost}", file=sys.stderr)
    elif isinstance(drafter, BlockDrafter):
        spare = max(load_tokenizer(name).get_vocab().values()) + 1
        drafter.build(vocab_size, target(), spare if spare < vocab_size else None)


def greedy_counts(trace: Any) -> Int[Tensor, " V"]:
    """How often each token is the target's greedy token at a counted step of a trace."""
    counts = torch.zeros(trace.meta.vocab_size, dtype=torch.long)
    for document in range(len(trace)):
        columns = trace.columns(document)
        greedy = torch.from_numpy(columns.top_ids[:, 0][columns.loss_mask].astype("int64"))
        counts += torch.bincount(greedy, minlength=len(counts))
    return counts


def _same_tokenizer(drafter: str, mine: str, theirs: str) -> None:
    if mine != theirs:
        raise ValueError(
            f"the drafter {drafter} has tokenizer {mine[:12]}…, the target's is {theirs[:12]}…: their token "
            "ids mean different text. Start from a model with the target's tokenizer, or record the trace "
            "with the target that this drafter belongs to"
        )


def _same_target(meta: Any, name: str, fingerprint: str, vocab_size: int) -> None:
    if fingerprint != meta.tokenizer_fingerprint:
        raise ValueError(
            f"model.target {name} has tokenizer {fingerprint[:12]}…, the trace was recorded with "
            f"{meta.tokenizer_fingerprint[:12]}…; use the trace's own target ({meta.target}) or record again"
        )
    if vocab_size != meta.vocab_size:
        raise ValueError(
            f"model.target {name} has {vocab_size} logits a step, the trace's target ({meta.target}) "
            f"{meta.vocab_size}; use the trace's own target or record again"
        )


def _fingerprint(name: str) -> str:
    return tokenizer_fingerprint(load_tokenizer(name))
