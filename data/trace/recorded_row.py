"""RecordedRow: one document as a trace stores it, and which of its steps are learned.

Axis letters: T tokens of a document · K head entries · L layers whose outputs are kept · H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

import numpy as np
from jaxtyping import Bool, Float16, Float32, Int32, UInt16
from numpy import ndarray

from certdraft.data.record.loops import loop_onset

if TYPE_CHECKING:
    from certdraft.data.corpus.chat import Prompt
    from certdraft.data.record.generation import Generation

Finish = Literal["eos", "length", "loop", "given"]


@dataclass(frozen=True)
class RecordedRow:
    """One document as a trace stores it, and how it ended."""

    input_ids: Int32[ndarray, " T"]
    loss_mask: Bool[ndarray, " T"]
    top_ids: Int32[ndarray, "T K"]
    top_gap: Float16[ndarray, "T K"]
    lse_gap: Float32[ndarray, " T"]
    entropy: Float32[ndarray, " T"]
    finish: Finish
    where: str
    hidden: UInt16[ndarray, "T L H"] | None = None
    notes: tuple[str, ...] = field(default=(), compare=False)


def first_learned(prompt: Prompt, settings: Generation) -> int:
    """Index of the first token that is to be learned."""
    return 1 if settings.corpus_positions and not settings.teacher_forced else prompt.first_learned


def with_steps(row: RecordedRow, prompt: Prompt, settings: Generation) -> RecordedRow:
    """The row with its loss mask, and without what repeats itself to the end.

    Args:
        row: a whole document; its mask is not looked at.
        prompt: what it began with.
        settings: which steps are learned and what becomes of loops.

    Returns:
        Step t counts where token t + 1 is to be learned; the last step never does.
    """
    given, length, finish = len(prompt.ids), len(row.input_ids), row.finish
    unlearned_from = length
    onset = None if settings.loops == "keep" else loop_onset(row.input_ids[given:])
    if onset is not None:
        finish, unlearned_from = "loop", given + onset
        length = unlearned_from if settings.loops == "cut" else length
    after = np.arange(length) + 1
    kept = {
        name: getattr(row, name)[:length].copy()
        for name in ("input_ids", "top_ids", "top_gap", "lse_gap", "entropy", "hidden")
        if getattr(row, name) is not None
    }
    mask = (after >= first_learned(prompt, settings)) & (after < unlearned_from)
    return replace(row, loss_mask=mask, finish=finish, **kept)
