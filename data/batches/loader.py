"""ResumableLoader: batches in an order fixed by seed and epoch, with an exact position to resume from."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from jaxtyping import Int64
from numpy import ndarray

from certdraft.data.batches.batch import Batch


class ResumableLoader:
    """Batches of rows, from `fetch`; every process gets the same number of them.

    Lightning saves and restores `state_dict` with the checkpoint, at any batch. The epoch is counted when an
    epoch's first batch is asked for, not when its last was: Lightning never requests the batch after the
    last.

    Args:
        num_rows: rows in all.
        batch_size: rows a batch.
        fetch: makes a batch of row indices.
        seed: of the order.
        shuffle: a new order every epoch, in which rows that do not fill a batch wait for another epoch;
            otherwise rows in order, all of them, the last batch being smaller.
        rank: this process.
        world_size: processes; each gets its own share of every global batch.
        ahead: batches made in threads before they are asked for; 0 makes each when it is.
        uncounted: makes a batch count for nothing. Without shuffling, processes that would have fewer batches
            than others get the first batch again, made so; by default it counts again.

    Raises:
        ValueError: no rows, or no batch size.
    """

    def __init__(
        self,
        num_rows: int,
        batch_size: int,
        fetch: Callable[[Int64[ndarray, " R"]], Batch],
        *,
        seed: int = 0,
        shuffle: bool = True,
        rank: int = 0,
        world_size: int = 1,
        ahead: int = 0,
        uncounted: Callable[[Batch], Batch] = lambda batch: batch,
    ) -> None:
        if num_rows < 1 or batch_size < 1:
            raise ValueError(
                f"a loader needs rows and a batch size; got {num_rows} rows, batch_size={batch_size}"
            )
        self.num_rows, self.batch_size, self.fetch, self.uncounted = num_rows, batch_size, fetch, uncounted
        self.seed, self.shuffle, self.rank, self.world_size = seed, shuffle, rank, world_size
        self.ahead = ahead
        self._epoch, self._position, self._restored = -1, 0, False

    def __len__(self) -> int:
        rows_at_once = self.batch_size * self.world_size
        return max(1, self.num_rows // rows_at_once) if self.shuffle else -(-self.num_rows // rows_at_once)

    def __iter__(self) -> Iterator[Batch]:
        if self._restored:
            self._restored = False
        else:
            self._epoch, self._position = self._epoch + 1, 0
        order = self._order(self._epoch)
        waiting: deque[Future[Batch]] = deque()
        with ThreadPoolExecutor(max(1, self.ahead), "batches") as pool:
            try:
                for position in range(self._position, len(self)):
                    while self.ahead and len(waiting) <= self.ahead and position + len(waiting) < len(self):
                        waiting.append(pool.submit(self._make, order, position + len(waiting)))
                    batch = waiting.popleft().result() if waiting else self._make(order, position)
                    self._position += 1  # before it is used: a checkpoint saved after it must not repeat it
                    yield batch
            finally:
                for future in waiting:
                    future.cancel()

    def _make(self, order: Int64[ndarray, " rows"], position: int) -> Batch:
        start = (position * self.world_size + self.rank) * self.batch_size
        rows = order[start : start + self.batch_size]
        # A process with fewer batches would leave the others waiting in their next collective call.
        return self.fetch(rows) if len(rows) else self.uncounted(self.fetch(order[: self.batch_size]))

    def state_dict(self) -> dict[str, Any]:
        return {"epoch": self._epoch, "position": self._position} | self._identity()

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on after the batch that was handed out last."""
        now = self._identity()
        differing = [f"{k}: {state.get(k)} there, {v} now" for k, v in now.items() if state.get(k) != v]
        if differing:
            raise ValueError(
                f"the checkpoint's position in the data does not fit ({'; '.join(differing)}). Resume with "
                "the same trace, seq_len, batch_size and number of processes, or start a new run from its "
                "weights."
            )
        self._epoch, self._position = int(state["epoch"]), int(state["position"])
        # An epoch that had ended is iterated once more and gives nothing: Lightning needs that.
        self._restored = self._epoch >= 0

    def _identity(self) -> dict[str, int]:
        names = ("num_rows", "batch_size", "seed", "world_size")
        return {name: int(getattr(self, name)) for name in names}

    def _order(self, epoch: int) -> Int64[ndarray, " rows"]:
        if not self.shuffle:
            return np.arange(self.num_rows)
        order = np.random.default_rng([self.seed, epoch]).permutation(self.num_rows)
        if self.world_size > 1:  # every process needs a batch, were it of rows that another one has too
            order = np.resize(order, max(self.num_rows, self.batch_size * self.world_size))
        return order
