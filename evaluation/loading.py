"""What commands share: where to run, which drafter may meet which target, one line of progress."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import torch

from certdraft.data import load_tokenizer, tokenizer_fingerprint
from certdraft.drafters import CausalDrafter, Drafter, load_drafter, read_facts

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class HasSize(Protocol):
    """Whatever knows how many tokens the target has."""

    @property
    def vocab_size(self) -> int: ...


class Vocabulary(Protocol):
    """Whatever knows the target's token ids: `certdraft.data.Trace`, or `TargetVocabulary`."""

    @property
    def meta(self) -> HasSize: ...

    def check_tokenizer(self, fingerprint: str, whose: str) -> None:
        """Refuses another tokenizer."""
        ...


class TargetVocabulary:
    """The vocabulary of a target that is at hand.

    Args:
        name: of the target, as `load_target` takes it.
        vocab_size: rows of its head.
        fingerprint: of its tokenizer.
    """

    def __init__(self, name: str, vocab_size: int, fingerprint: str) -> None:
        self.name, self.vocab_size, self.fingerprint = name, vocab_size, fingerprint

    @property
    def meta(self) -> HasSize:
        """Itself, as a trace has its numbers under this name."""
        return self

    def check_tokenizer(self, fingerprint: str, whose: str) -> None:
        """Refuses another tokenizer than the target's.

        Raises:
            ValueError: shows both fingerprints.
        """
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"the tokenizer of the target {self.name}, {self.fingerprint[:12]}, differs from {whose} "
                f"{fingerprint[:12]}; token ids would mean different text. Use a drafter with the target's "
                "tokenizer."
            )


def pick_device(name: str) -> torch.device:
    """The device of that name; "auto" is CUDA when there is one.

    Raises:
        ValueError: no such device here.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device {name!r}: give auto, cpu, cuda or cuda:0 and so on") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"device {name!r}: this machine has no CUDA device; leave it at auto, or give cpu")
    return device


def load_checked(
    path: str,
    vocabulary: Vocabulary,
    device: torch.device,
    dtype: str,
    target: PreTrainedModel | None = None,
) -> Drafter:
    """A drafter on its device, once its tokenizer is known to be the target's.

    Args:
        path: exported folder, or a folder or hub name that transformers loads as a causal LM.
        vocabulary: what its token ids must mean.
        device: where its weights go.
        dtype: of its weights.
        target: the target on that device; drafters that read its layers and embeddings need it.

    Raises:
        FileNotFoundError: no such drafter.
        ValueError: another tokenizer or vocabulary, both are shown.
    """
    exported = (Path(path) / "drafter.json").is_file()
    facts = (read_facts(path)["facts"] or {}) if exported else {}
    fingerprint = facts.get("tokenizer_fingerprint") or tokenizer_fingerprint(load_tokenizer(path))
    vocabulary.check_tokenizer(fingerprint, f"that of the drafter {path},")
    wanted: Any = None if dtype == "float16" else dtype
    if exported:
        return load_drafter(path, target=target, dtype=wanted).to(device).eval()
    drafter = CausalDrafter(pretrained=path, dtype=wanted)
    drafter.build(vocabulary.meta.vocab_size)
    return drafter.to(device).eval()


def show_progress(stage: str, done: int, total: int) -> None:
    """One line on standard error, rewritten in place; nothing when that is not a terminal."""
    if sys.stderr.isatty():
        end = "\n" if done == total else ""
        print(f"\r{stage}: {done}/{total}\033[K", end=end, file=sys.stderr, flush=True)
