"""Whether drafter, target and trace speak one language: vocabulary sizes and tokenizer fingerprints."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch

from certdraft.data import load_target, load_tokenizer, tokenizer_fingerprint
from certdraft.drafters import CausalDrafter, Drafter
from certdraft.train.online import Online


def fit_to_target(
    drafter: Drafter, online: Online | None, datamodule: pl.LightningDataModule | None, seed: int = 0
) -> None:
    """Gives a fresh drafter its vocabulary and refuses one that cannot draft for the target.

    Args:
        drafter: what is trained.
        online: the target that is run, if any.
        datamodule: where the trace comes from; its `meta` names target, tokenizer and vocabulary.
        seed: of the weights of a fresh drafter, whatever was drawn before.

    Raises:
        ValueError: vocabularies or tokenizers of trace, target and drafter differ.
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
    if isinstance(drafter, CausalDrafter):
        target = None
        if drafter.init_from_target:
            target = load_target(name) if online is None else online.model
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            drafter.build(vocab_size, target)
        if drafter.pretrained:
            _same_tokenizer(drafter.pretrained, _fingerprint(drafter.pretrained), theirs)
    if drafter.vocab_size != vocab_size:
        raise ValueError(
            f"the drafter has a vocabulary of {drafter.vocab_size}, its target of {vocab_size}; draft tokens "
            "are the target's tokens, so start from a model with the target's tokenizer and padded vocabulary"
        )


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
