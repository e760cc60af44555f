"""Work in threads, a bounded amount ahead; results as they come."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import TypeVar, cast

Item = TypeVar("Item")
Result = TypeVar("Result")

_AHEAD = 2  # items handed out per thread


def in_parallel(
    items: Iterable[Item], act: Callable[[Item], Result], threads: int
) -> Iterator[tuple[Item, Result]]:
    """Pairs (item, act(item)) in the order in which they are done.

    The threads are daemons: Ctrl-C and errors do not wait for an answer that is still on its way.

    Args:
        items: taken a few ahead of the results, in order.
        act: called in some thread.
        threads: calls at once.

    Raises:
        Exception: the first that `act` raised; the rest of the items is left alone.

    Examples:
        >>> sorted(in_parallel([3, 1, 2], lambda n: n * n, threads=2))
        [(1, 1), (2, 4), (3, 9)]
    """
    jobs: queue.SimpleQueue[Item] = queue.SimpleQueue()
    done: queue.SimpleQueue[tuple[Item, Result | None, BaseException | None]] = queue.SimpleQueue()
    stopped = threading.Event()

    def work() -> None:
        while True:
            item = jobs.get()
            if stopped.is_set():
                return
            try:
                done.put((item, act(item), None))
            except BaseException as error:
                stopped.set()
                done.put((item, None, error))

    for _ in range(threads):
        threading.Thread(target=work, daemon=True).start()
    iterator, waiting = iter(items), 0
    try:
        while True:
            for item in islice(iterator, _AHEAD * threads - waiting):
                jobs.put(item)
                waiting += 1
            if not waiting:
                return
            item, result, error = done.get()
            waiting -= 1
            if error is not None:
                raise error
            yield item, cast(Result, result)
    finally:
        stopped.set()
        for _ in range(threads):
            jobs.put(None)  # type: ignore[arg-type]
