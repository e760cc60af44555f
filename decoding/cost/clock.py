"""Clocks: where the seconds of a round come from, the machine or a table.

The loop calls `lap` at the end of each phase. A real clock answers with the time since the last lap, a table
clock with what a cost model says the phase costs, which makes throughput studies deterministic.
"""

from __future__ import annotations

import time
from typing import Literal, Protocol

import torch

from certdraft.decoding.cost.cost_model import CostModel

Phase = Literal["draft", "verify", "host"]


class Clock(Protocol):
    """Seconds spent, phase by phase."""

    def lap(self, phase: Phase, nodes: int = 0, context: int = 0) -> float:
        """Ends a phase and returns its seconds.

        Args:
            phase: "draft" is one drafter pass, "verify" one target pass, "host" everything between.
            nodes: draft: nodes read in the pass; verify: draft tokens in the tree.
            context: committed tokens before the root.
        """
        ...


class RealClock:
    """Wall-clock seconds; waits for the device at each lap, so a phase is charged for its own kernels."""

    def __init__(self, device: torch.device | str = "cpu") -> None:
        self._cuda = torch.device(device).type == "cuda"
        self._last = self._now()

    def lap(self, phase: Phase, nodes: int = 0, context: int = 0) -> float:
        """See `Clock.lap`."""
        last, self._last = self._last, self._now()
        return self._last - last

    def _now(self) -> float:
        if self._cuda:
            torch.cuda.synchronize()
        return time.perf_counter()


class TableClock:
    """Seconds by a cost model; host time is part of its curves and counts as 0 here."""

    def __init__(self, cost_model: CostModel) -> None:
        self.cost_model = cost_model

    def lap(self, phase: Phase, nodes: int = 0, context: int = 0) -> float:
        """See `Clock.lap`."""
        if phase == "host":
            return 0.0
        return (
            self.cost_model.draft_s(nodes, context)
            if phase == "draft"
            else self.cost_model.verify_s(nodes, context)
        )
