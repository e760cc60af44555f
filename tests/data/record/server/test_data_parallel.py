"""Threads: every item once, few ahead, and an end at the first error."""

import threading
import time

import pytest

from certdraft.data.record.server.server_writer import in_parallel


def test_every_item_once_and_few_ahead() -> None:
    taken, given = 0, 0

    def items():
        nonlocal taken
        for number in range(50):
            taken += 1
            assert taken - given <= 2 * 3 + 1
            yield number

    seen = {}
    for item, result in in_parallel(items(), lambda number: number**2, threads=3):
        given += 1
        seen[item] = result
    assert seen == {number: number**2 for number in range(50)}


def test_calls_overlap() -> None:
    meet = threading.Barrier(4, timeout=10)
    assert len(list(in_parallel(range(8), lambda _: meet.wait(), threads=4))) == 8


def test_the_first_error_ends_it() -> None:
    called = []

    def act(number: int) -> int:
        called.append(number)
        if number == 3:
            raise ValueError("three")
        return number

    with pytest.raises(ValueError, match="three"):
        list(in_parallel(range(1000), act, threads=1))
    time.sleep(0.05)
    assert called == [0, 1, 2, 3]


def test_a_reader_that_leaves_ends_it() -> None:
    called = []
    results = in_parallel(range(1000), called.append, threads=2)
    next(results)
    results.close()
    time.sleep(0.05)
    assert len(called) <= 6
