"""Ctrl-C and SIGTERM during a recording: it ends within seconds, and what is recorded is kept.

Python runs a signal's handler between two operations of torch. So a signal ends the computation at once where
that is safe, and is noted where files are written, until the write is done.
"""

from __future__ import annotations

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any


class Stopped(BaseException):
    """A signal ended the computation."""


class StopSignals:
    """Handlers of Ctrl-C and SIGTERM while this context is entered, in the main thread.

    A signal that the process ignores stays ignored. A second one does not wait for files being written; they
    are whole or absent all the same.

    Args:
        forward: called with SIGTERM too, to end the processes that this one started.
    """

    def __init__(self, forward: Callable[[Any], object] | None = None) -> None:
        self.number: int | None = None  # of the first signal
        self._forward, self._inside = forward, False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        while self._before:
            signal.signal(*self._before.popitem())

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """A block that a signal ends at once.

        Raises:
            Stopped: a signal came, before the block or within it.
        """
        self._inside = True
        try:
            if self.number is not None:
                raise Stopped
            yield
        finally:
            self._inside = False

    def exit(self, folder: Path) -> SystemExit:
        """Print how to go on, and return the exit to raise: 130 after Ctrl-C, 143 after SIGTERM."""
        print(
            f"stopped: what was recorded is kept in {folder}; the same command goes on there, and "
            f"`certdraft trace --finish true --out_dir {folder}` makes a trace of what there is",
            file=sys.stderr,
        )
        return SystemExit(128 + (self.number or signal.SIGTERM))

    def _note(self, number: int, frame: FrameType | None) -> None:
        again = self.number is not None
        self.number = self.number or number
        if self._forward is not None and number == signal.SIGTERM and not again:
            self._forward(number)
        if self._inside or again:
            self._inside = False
            raise Stopped
