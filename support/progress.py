"""Progress of long steps: a rich bar with ETA and tokens/s on a terminal, plain lines elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Iterator
from types import TracebackType
from typing import TypeVar

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
from rich.progress import Progress as RichProgress

Item = TypeVar("Item")


class Progress:
    """Progress of `total` items on stderr; use as a context manager.

    Args:
        label: what is being done, such as "recording".
        total: number of items, or None when it is not known.
        unit: word for an item.
        interval_s: seconds between plain lines when stderr is not a terminal.
        enabled: false on all ranks but the first.
        done: items that an earlier process finished.
    """

    def __init__(
        self,
        label: str,
        total: int | None,
        unit: str = "rows",
        *,
        interval_s: float = 10.0,
        enabled: bool = True,
        done: int = 0,
    ) -> None:
        self.label, self.total, self.unit, self.enabled = label, total, unit, enabled
        self._interval_s = interval_s
        self._done = self._before = done
        self._tokens = 0
        self._bar: RichProgress | None = None

    def __enter__(self) -> Progress:
        self._start = self._last = time.monotonic()
        if self.enabled and sys.stderr.isatty():
            self._bar = RichProgress(
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn(self.unit),
                TextColumn("{task.fields[rate]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )
            self._task = self._bar.add_task(self.label, total=self.total, completed=self._done, rate="")
            self._bar.start()
        return self

    def advance(self, items: int, tokens: int = 0, note: str = "") -> None:
        """Count finished items and the tokens they held; `note` stands behind the rate."""
        self._done += items
        self._tokens += tokens
        now = time.monotonic()
        rate = self._tokens / max(now - self._start, 1e-9)
        rate_text = ", ".join(filter(None, (f"{rate:,.0f} tokens/s" if self._tokens else "", note)))
        if self._bar is not None:
            self._bar.update(self._task, advance=items, rate=rate_text)
        elif self.enabled and now - self._last >= self._interval_s:
            self._last = now
            parts = [f"{self._done:,} {self.unit}", rate_text]
            if self.total is not None:
                left_s = (now - self._start) / max(self._done - self._before, 1) * (self.total - self._done)
                parts = [f"{self._done:,}/{self.total:,} {self.unit}", rate_text, f"{left_s:,.0f} s left"]
            print(f"{self.label}: {', '.join(p for p in parts if p)}", file=sys.stderr, flush=True)

    def print(self, text: str) -> None:
        """Print a line above the bar."""
        if self._bar is not None:
            self._bar.console.print(text, highlight=False)
        elif self.enabled:
            print(text, file=sys.stderr, flush=True)

    @property
    def on_terminal(self) -> bool:
        """Whether there is a bar, and not lines."""
        return self._bar is not None

    def track(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield the items and count each one after it was used."""
        for item in items:
            yield item
            self.advance(1)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
