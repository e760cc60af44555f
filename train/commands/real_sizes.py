"""How much of everything a run of `certdraft real` does, kept in its folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

_HELD_OUT = 80  # prompts in the file


@dataclass(frozen=True)
class Sizes:
    """How much of everything a run of some minutes does; measured once on two idle cores, see `scaled`.

    Attributes:
        prompts: user turns that the target writes.
        answer_tokens: longest recorded answer.
        steps: optimiser steps of the EAGLE-3 head; a causal drafter takes a quarter, a DFlash drafter half.
        held_out: held-out prompts decoded for real.
        new_tokens: longest decoded answer.
        minutes: how long all of it is expected to take on two idle cores.
        dtype: of the target and of decoding; the faster one on this CPU.
    """

    prompts: int = 1500
    answer_tokens: int = 96
    steps: int = 900
    held_out: int = 24
    new_tokens: int = 128
    minutes: float = 45.0
    dtype: Literal["bfloat16", "float32"] = "bfloat16"

    @property
    def precision(self) -> str:
        """`trainer.precision` of training in this dtype."""
        return "bf16-mixed" if self.dtype == "bfloat16" else "32-true"

    @property
    def own_plain(self) -> str:
        """Name of our plain decoding among the baselines."""
        return f"plain decoding by certdraft, {self.dtype}"

    @classmethod
    def scaled(cls, minutes: float) -> Sizes:
        """Sizes for about so many minutes; 45 are the defaults.

        Raises:
            ValueError: fewer than 2 minutes.
        """
        if minutes < 2:
            raise ValueError(f"--minutes {minutes:g}: give at least 2")
        full, share = cls(), minutes / 45
        return cls(
            prompts=max(96, round(full.prompts * share)),
            answer_tokens=full.answer_tokens,
            steps=max(40, round(full.steps * share)),
            held_out=max(4, min(_HELD_OUT, round(full.held_out * share))),
            new_tokens=max(32, min(128, round(full.new_tokens * share**0.5))),
            minutes=minutes,
        )


def run_sizes(folder: Path) -> Sizes:
    """Sizes that a finished or begun run was started with."""
    return Sizes(**json.loads((folder / "sizes.json").read_text(encoding="utf-8")))
