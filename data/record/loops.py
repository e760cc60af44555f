"""Degenerate loops: greedy text that repeats itself to the end, which no drafter should learn from."""

from __future__ import annotations

from jaxtyping import Integer
from numpy import ndarray

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
