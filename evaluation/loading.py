"""What the commands of this room share: device, drafters of the right tokenizer, progress by stage."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from certdraft.data import load_tokenizer, tokenizer_fingerprint
from certdraft.drafters import CausalDrafter, Drafter, load_drafter, read_facts
from certdraft.support import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class TargetVocabulary:
    """Vocabulary of a loaded target: its name, the rows of its lm_head, the fingerprint of its tokenizer."""

    def __init__(self, name: str, vocab_size: int, fingerprint: str) -> None:
        self.name, self.vocab_size, self.fingerprint = name, vocab_size, fingerprint

    @property
    def meta(self) -> TargetVocabulary:
        """Itself: a trace has its sizes under this name."""
        return self

    def check_tokenizer(self, fingerprint: str, whose: str) -> None:
        """Raise ValueError with both fingerprints if the tokenizer is not the target's."""
        if fingerprint != self.fingerprint:
            raise ValueError(
                f"the tokenizer of the target {self.name}, {self.fingerprint[:12]}, differs from {whose} "
                f"{fingerprint[:12]}; token ids would mean different text. Use a drafter with the target's "
                "tokenizer."
            )


def pick_device(name: str) -> torch.device:
    """Return the device of that name; "auto" is CUDA when there is one.

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
    vocabulary: Any,
    device: torch.device,
    dtype: str,
    target: PreTrainedModel | None = None,
) -> Drafter:
    """Load a drafter to its device, once its tokenizer is known to be the target's.

    Args:
        path: exported folder, or a folder or hub name that transformers loads as a causal LM.
        vocabulary: the target's: a `certdraft.data.Trace` or a `TargetVocabulary`.
        device: of the weights.
        dtype: of the weights.
        target: the target on that device; needed by drafters that read its layers and embeddings.
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


class StageProgress:
    """Progress of successive stages on stderr: called with the stage, items done and items in all."""

    def __init__(self) -> None:
        self._stage, self._done = "", 0
        self._bar: Progress | None = None

    def __enter__(self) -> StageProgress:
        return self

    def __exit__(self, *error: object) -> None:
        self._close()

    def __call__(self, stage: str, done: int, total: int) -> None:
        if stage != self._stage:
            self._close()
            self._stage, self._done = stage, 0
            self._bar = Progress(stage, total, "steps").__enter__()
        if self._bar is not None and done > self._done:
            self._bar.advance(done - self._done)
            self._done = done
        if done >= total:
            self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.__exit__(None, None, None)
            self._bar = None
