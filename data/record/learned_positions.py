"""Which token positions of a recorded document are in its loss mask, and where degenerate text is cut."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
from jaxtyping import Integer
from numpy import ndarray

from certdraft.data.corpus.chat import Prompt
from certdraft.data.trace.recorded_row import RecordedRow

MAX_PERIOD = 64
MIN_REPEATED = 32  # tokens
MIN_REPEATS = 3  # besides the first occurrence


def loop_onset(
    ids: Integer[ndarray, " n"],
    max_period: int = MAX_PERIOD,
    min_repeated: int = MIN_REPEATED,
    min_repeats: int = MIN_REPEATS,
) -> int | None:
    """Index of the first repeated token of a periodic tail, or None where there is none.

    A tail loops when, for a period up to `max_period`, its last `min_repeated` tokens and at least
    `min_repeats` whole periods each equal the token one period earlier. The first occurrence of the period is
    not repetition.

    Args:
        ids: generated tokens, without the prompt.
        max_period: longest period looked for, tokens.
        min_repeated: shortest repeated stretch, tokens.
        min_repeats: fewest repetitions of the period.

    Examples:
        >>> import numpy as np
        >>> loop_onset(np.array([9, 8] + [1, 2, 3] * 12))
        5
        >>> loop_onset(np.arange(100)) is None
        True
    """
    best: int | None = None
    for period in range(1, min(max_period, len(ids) - 1) + 1):
        differs = ids[period:] != ids[:-period]
        run = int(differs[::-1].argmax()) if differs.any() else len(differs)
        if run >= max(min_repeated, min_repeats * period):
            onset = len(ids) - run
            best = onset if best is None else min(best, onset)
    return best


@dataclass(frozen=True)
class Generation:
    """How the target continues a prompt, and which token positions are in the loss mask.

    Args:
        max_new_tokens: longest continuation; 0 records the corpus' own text, teacher-forced.
        max_length: longest document, prompt included.
        corpus_positions: also learn the positions inside the prompt. Always so when `max_new_tokens` is 0.
        loops: what becomes of a continuation that repeats itself to the end: "cut" drops it from the first
            repeated token on, "mask" keeps it but learns nothing there, "keep" changes nothing.
    """

    max_new_tokens: int = 256
    max_length: int = 4096
    corpus_positions: bool = False
    loops: Literal["cut", "mask", "keep"] = "cut"

    def __post_init__(self) -> None:
        if self.max_new_tokens < 0 or self.max_length < 2:
            raise ValueError(
                f"max_new_tokens {self.max_new_tokens} must be at least 0 and max_length {self.max_length} "
                "at least 2"
            )

    @property
    def teacher_forced(self) -> bool:
        return self.max_new_tokens == 0


def first_learned(prompt: Prompt, settings: Generation) -> int:
    """Index of the first token that is to be learned."""
    return 1 if settings.corpus_positions and not settings.teacher_forced else prompt.first_learned


def with_loss_mask(row: RecordedRow, prompt: Prompt, settings: Generation) -> RecordedRow:
    """Return the row with its loss mask, cut where it repeats itself to the end.

    Args:
        row: a whole document; its mask is ignored.
        prompt: what it began with.
        settings: which positions are learned and what becomes of loops.

    Returns:
        Position t is in the mask where token t + 1 is to be learned; the last one never is.
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
