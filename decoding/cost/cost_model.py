"""What a round costs: convex monotone latency curves over (draft tokens, context), kept as JSON.

    C(round) = opening_s(context)  +  sum over drafter passes of draft_s(nodes read, context)
               +  verify_s(n, context)

`opening_s` is what the pass over a round's root takes beyond other passes: much for a drafter that drafts a
block there and corrects it node by node, little for one that reads every node with its layers.
`verify_s(n)` is the time of everything in a round with n draft tokens except the drafter's passes: selecting
the tree, one target pass over its **1 + n** slots, acceptance and cache compaction. So `verify_s(0)` is
measured, it is the cost of a plain decoding step, and host overhead, which dominates for small models, is
inside the curves: its constant in `verify_s(0)` and `draft_s`, its slope in `verify_s`.

Curves are fitted per context, for n >= 1: f(n) = a + b n + sum_k g_k max(0, n - k) with all coefficients >=
0, by non-negative least squares. Convexity is what makes "stop at the first node that does not pay" globally
optimal. Between contexts curves are interpolated, which keeps them convex; outside the grid the nearest
context is used; beyond the largest n the last slope goes on. Letters: C contexts, N knots (numbers of draft
tokens).

Source: CaDDTree, arXiv 2606.01813, sections 3-4; the differences are listed in docs/decoding.md.
"""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from jaxtyping import Float
from scipy.optimize import nnls

from certdraft.support import write_text

FORMAT = "certdraft-cost-model/1"
_AGAIN = "measure again with certdraft.decoding.profile"


@dataclass(frozen=True)
class CostModel:
    """Latency curves of one target, drafter and device.

    Attributes:
        contexts: committed tokens before the root, ascending, [C].
        nodes: draft tokens, ascending from 0, [N].
        verify: seconds, [C, N], non-decreasing along N; measured at n = 0, fitted and convex from n = 1 on.
        draft: (seconds of a pass that reads one node, seconds of each further node) per context, [C, 2].
        device: where it was measured; "*" fits every device (a table made by hand).
        target: fingerprint of the target's architecture; "*" fits every target.
        drafter: fingerprint of the drafter's architecture; "*" fits every drafter.
        measured: medians before the fit, and how they were taken.
        opening: seconds that the pass over a round's root takes beyond another pass of one node, per context,
            [C], ≥ 0; empty: none.
    """

    contexts: tuple[int, ...]
    nodes: tuple[int, ...]
    verify: tuple[tuple[float, ...], ...]
    draft: tuple[tuple[float, float], ...]
    device: str = "*"
    target: str = "*"
    drafter: str = "*"
    measured: dict[str, Any] = field(default_factory=dict, compare=False)
    opening: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        grid = np.asarray(self.verify, dtype=float)
        if grid.shape != (len(self.contexts), len(self.nodes)) or len(self.draft) != len(self.contexts):
            raise ValueError(
                f"cost model: {len(self.contexts)} contexts and {len(self.nodes)} node counts need a verify "
                f"table of that shape and one draft pair per context; got {grid.shape} and {len(self.draft)}"
            )
        if self.opening and (len(self.opening) != len(self.contexts) or not min(self.opening) >= 0):
            raise ValueError(
                f"cost model: opening must hold seconds, at least 0, for {len(self.contexts)} contexts, got "
                f"{list(self.opening)}"
            )
        for name, values in (("contexts", self.contexts), ("nodes", self.nodes)):
            if list(values) != sorted(set(values)):
                raise ValueError(f"cost model: {name} must ascend without repeats, got {list(values)}")
        if self.nodes[0] != 0:
            raise ValueError(
                f"cost model: nodes must start at 0, a pass over only the root, not {self.nodes[0]}"
            )
        if not (np.isfinite(grid).all() and (grid > 0).all() and (np.diff(grid, axis=1) >= 0).all()):
            raise ValueError(
                "cost model: verify seconds must be positive and non-decreasing in the draft tokens"
            )

    @classmethod
    def table(cls, verify: Sequence[float], draft_s: float, *, draft_node_s: float = 0.0) -> CostModel:
        """A cost model made by hand: `verify[n]` seconds for n draft tokens, the same at every context."""
        return cls((0,), tuple(range(len(verify))), (tuple(verify),), ((draft_s, draft_node_s),))

    def verify_curve(self, context: int, max_nodes: int) -> list[float]:
        """`verify_s(n, context)` for n = 0..max_nodes, seconds."""
        curve = self._at(context, self.verify)
        wanted = np.arange(max_nodes + 1, dtype=float)
        values = np.interp(wanted, self.nodes, curve)
        if max_nodes > self.nodes[-1] and len(self.nodes) > 1:
            slope = (curve[-1] - curve[-2]) / (self.nodes[-1] - self.nodes[-2])
            values += np.maximum(wanted - self.nodes[-1], 0) * slope
        return values.tolist()

    def verify_s(self, num_nodes: int, context: int) -> float:
        """Seconds of a round with `num_nodes` draft tokens, the drafter's passes left out."""
        return self.verify_curve(context, num_nodes)[-1]

    def draft_s(self, num_nodes: int, context: int) -> float:
        """Seconds of one drafter pass that reads `num_nodes` nodes."""
        first, further = self._at(context, self.draft)
        return float(first + further * max(num_nodes - 1, 0))

    def opening_s(self, context: int) -> float:
        """Seconds that the pass over a round's root takes beyond another pass of one node."""
        return float(self._at(context, [(s,) for s in self.opening])[0]) if self.opening else 0.0

    def _at(self, context: int, table: Sequence[Sequence[float]]) -> Float[np.ndarray, " columns"]:
        """Row of a [C][...] table at a context: linear between grid contexts, the nearest outside."""
        high = int(np.searchsorted(self.contexts, context))
        if high == 0 or high == len(self.contexts):
            return np.asarray(table[min(high, len(self.contexts) - 1)], dtype=float)
        low = high - 1
        share = (context - self.contexts[low]) / (self.contexts[high] - self.contexts[low])
        return (1 - share) * np.asarray(table[low], dtype=float) + share * np.asarray(
            table[high], dtype=float
        )

    def require(self, *, device: str, target: str, drafter: str) -> None:
        """Raise if the table was measured on other hardware or models; "*" means unknown."""
        for name, measured, here in (
            ("device", self.device, device),
            ("target", self.target, target),
            ("drafter", self.drafter, drafter),
        ):
            if "*" not in (measured, here) and measured != here:
                raise ValueError(
                    f"this cost model was measured with {name} '{measured}', not '{here}'; its budgets would "
                    f"be wrong here; {_AGAIN}"
                )

    def save(self, path: str | Path) -> None:
        """Write JSON, whole or not at all."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n")

    @classmethod
    def load(cls, path: str | Path) -> CostModel:
        """Read a file that `save` wrote."""
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such cost model; {_AGAIN}")
        try:
            record = json.loads(path.read_text())
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}: not JSON ({error}); {_AGAIN}") from None
        if not isinstance(record, dict) or record.pop("format", None) != FORMAT:
            raise ValueError(f"{path}: not a cost model of format {FORMAT}; {_AGAIN}")
        try:
            return cls(
                contexts=tuple(record.pop("contexts")),
                nodes=tuple(record.pop("nodes")),
                verify=tuple(map(tuple, record.pop("verify"))),
                draft=tuple((float(a), float(b)) for a, b in record.pop("draft")),
                opening=tuple(map(float, record.pop("opening", ()))),
                **record,
            )
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path}: {error}; {_AGAIN}") from None


def fit_convex(nodes: Sequence[int], seconds: Sequence[float]) -> Float[np.ndarray, " N"]:
    """Least-squares convex non-decreasing curve through measured latencies, at the measured points.

    Args:
        nodes: draft tokens, ascending, [N]; every interior one is a knot.
        seconds: latency at each, > 0, [N].

    Returns:
        fitted seconds [N].

    Source: SYSTEMS 6.4 item 7; the quadratic programme of arXiv 2606.01813 without a solver for it.
    """
    x = np.asarray(nodes, dtype=float) / max(nodes[-1], 1)
    y = np.asarray(seconds, dtype=float)
    if len(x) == 1:
        return y
    columns = [np.ones_like(x), x - x[0], *(np.maximum(0.0, x - knot) for knot in x[1:-1])]
    design, scale = np.stack(columns, axis=1), y.max()
    coefficients, _ = nnls(design, y / scale)
    return np.maximum.accumulate(design @ coefficients * scale)  # rounding may dip


Phase = Literal["open", "draft", "verify", "host"]


class Clock(Protocol):
    """Seconds spent, phase by phase."""

    def lap(self, phase: Phase, nodes: int = 0, context: int = 0) -> float:
        """End a phase and returns its seconds.

        Args:
            phase: "open" is a round's first drafter pass, "draft" a later one, "verify" one target pass,
                "host" everything between.
            nodes: open, draft: nodes read in the pass; verify: draft tokens in the tree.
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
        if phase == "verify":
            return self.cost_model.verify_s(nodes, context)
        opening = self.cost_model.opening_s(context) if phase == "open" else 0.0
        return opening + self.cost_model.draft_s(nodes, context)
