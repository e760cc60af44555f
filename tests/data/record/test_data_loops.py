"""Loop onset against the definition, word for word."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from certdraft.data import loop_onset


def onset_by_definition(ids: list[int], max_period: int, min_repeated: int, min_repeats: int) -> int | None:
    for onset in range(len(ids)):  # the first token from which on everything repeats
        for period in range(1, min(max_period, onset) + 1):
            tail = range(onset, len(ids))
            long_enough = len(tail) >= max(min_repeated, min_repeats * period)
            if long_enough and all(ids[i] == ids[i - period] for i in tail):
                return onset
    return None


@given(
    st.lists(st.integers(0, 3), max_size=6),
    st.lists(st.integers(0, 3), min_size=1, max_size=4),
    st.integers(0, 7),
    st.lists(st.integers(0, 3), max_size=2),
)
def test_equals_definition(start: list[int], period: list[int], times: int, end: list[int]) -> None:
    ids = start + period * times + end
    found = loop_onset(np.asarray(ids, np.int32), max_period=5, min_repeated=6, min_repeats=2)
    assert found == onset_by_definition(ids, 5, 6, 2)


@pytest.mark.parametrize(
    ("ids", "onset"),
    [
        (list(range(40)) + [7] * 33, 41),
        ([7] * 33, 1),
        ([7] * 32, None),  # 31 repetitions
        (list(range(64)) * 4, 64),
        (list(range(65)) * 4, None),  # a longer period is prose
        ([1, 2] * 40 + [3], None),  # it got out
        ([], None),
        ([4], None),
    ],
)
def test_known_onsets(ids: list[int], onset: int | None) -> None:
    assert loop_onset(np.asarray(ids, np.int32)) == onset
