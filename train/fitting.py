"""Whether drafter, target and trace speak one language: vocabulary sizes and tokenizer fingerprints."""

from __future__ import annotations

from typing import Any

import pytorch_lightning as pl
import torch

from certdraft.data import load_target, load_tokenizer, tokenizer_fingerprint
from certdraft.drafters import Drafter
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
    meta = getattr(datamodule, "meta", None)
    if meta is None and online is None:
        return
    if meta is not None and online is not None:
        _same_target(meta, online)
    vocab_size = online.vocab_size if online is not None else meta.vocab_size
    build = getattr(drafter, "build", None)
    if build is not None:
        target = None
        if getattr(drafter, "init_from_target", False):
            target = online.model if online is not None else load_target(meta.target)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            build(vocab_size, target)
    if drafter.vocab_size != vocab_size:
        raise ValueError(
            f"the drafter has a vocabulary of {drafter.vocab_size}, its target of {vocab_size}; draft tokens "
            "are the target's tokens, so start from a model with the target's tokenizer and padded vocabulary"
        )
    own = getattr(drafter, "pretrained", None)
    if own:
        theirs = meta.tokenizer_fingerprint if meta is not None else _fingerprint(online.settings.name)
        _same_tokenizer(own, _fingerprint(own), theirs)


def _same_tokenizer(drafter: str, mine: str, theirs: str) -> None:
    if mine != theirs:
        raise ValueError(
            f"the drafter {drafter} has tokenizer {mine[:12]}…, the target's is {theirs[:12]}…: their token "
            "ids mean different text. Start from a model with the target's tokenizer, or record the trace "
            "with the target that this drafter belongs to"
        )


def _same_target(meta: Any, online: Online) -> None:
    name, fingerprint = online.settings.name, _fingerprint(online.settings.name)
    if fingerprint != meta.tokenizer_fingerprint:
        raise ValueError(
            f"model.target {name} has tokenizer {fingerprint[:12]}…, the trace was recorded with "
            f"{meta.tokenizer_fingerprint[:12]}…; use the trace's own target ({meta.target}) or record again"
        )
    if online.vocab_size != meta.vocab_size:
        raise ValueError(
            f"model.target {name} has {online.vocab_size} logits a step, the trace's target ({meta.target}) "
            f"{meta.vocab_size}; use the trace's own target or record again"
        )


def _fingerprint(name: str) -> str:
    return tokenizer_fingerprint(load_tokenizer(name))
