"""Work in a child process that shares everything imported so far, to be killed at will."""

from __future__ import annotations

import gc
import os
import random
import signal
import time
from collections.abc import Callable


def start(act: Callable[[], object]) -> int:
    """Runs `act` in a fork; its exit code is 0, the code of a SystemExit, or 1 after any other exception."""
    pid = os.fork()
    if pid:
        return pid
    code = 1
    gc.freeze()  # what the parent leaves behind may belong to threads that do not exist here
    try:
        act()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    finally:
        os._exit(code)


def end(pid: int) -> int:
    """Waits; the exit code, or minus the signal."""
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def timed(act: Callable[[], object]) -> float:
    """Seconds that `act` takes in a fork."""
    begin = time.monotonic()
    assert end(start(act)) == 0
    return time.monotonic() - begin


def kill_often(act: Callable[[], object], times: int, seconds: float, seed: int = 0) -> int:
    """Starts `act` again and again, and kills it (−9) at random moments.

    Moments lie in the first half of `seconds`: a machine that has become faster since these were taken must
    not let `act` finish at once.

    Returns:
        How many of the kills met a process that was still at work.
    """
    draw, met = random.Random(seed), 0
    for _ in range(times):
        pid = start(act)
        time.sleep(draw.uniform(0, seconds / 2))
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
        met += end(pid) == -signal.SIGKILL
    return met
