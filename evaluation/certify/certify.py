"""Certificates of a target over a trace; no drafter is needed.

The certificate (KL radius) of a step is how far a drafter may be from the target, in nats, before its
proposal can be rejected. `certify` collects its distribution over the steps of a trace for every acceptance
rule, and the lengths of runs of steps that a drafter of a given quality is guaranteed to pass: the quantities
of arXiv 2606.30265, tables 1–6 and figures 1–5.

A trace is read row by row in fixed memory. Only steps in the loss mask are counted. A trace keeps the K most
probable tokens; where a rule's active set does not fit, the certificate is a sound lower bound, and the share
of such steps is reported.

Axis letters: N steps · K head entries · E budgets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool
from numpy.typing import NDArray
from torch import Tensor

from certdraft.certificates import (
    Additive,
    Coverage,
    Head,
    Multiplicative,
    Rule,
    StrictGreedy,
    TopM,
    Typical,
    ceiling,
    certified_run_lengths,
    margin,
    radius,
)
from certdraft.evaluation.measure.distributions import StepDistribution
from certdraft.evaluation.measure.trace_reading import TraceLike, concatenate

SCHEMA = "certdraft.certify/1"
_STEPS_PER_CHUNK = 8192


@dataclass(frozen=True)
class CertifyProtocol:
    """Which rules, sizes and budgets are tabulated; the defaults are those of arXiv 2606.30265.

    Args:
        mass: sizes k whose cumulative top-k mass is tabulated.
        additive: slacks t of the additive rule.
        multiplicative: factors α of the multiplicative rule.
        top_m: ranks m of the additive top-m grid.
        top_m_slack: slacks t of the additive top-m grid.
        typical: (ε, δ) pairs of the typical rule; the paper's first, then the Medusa code's.
        coverage: widths m of the tree certificate.
        run_budgets: KL budgets ε of the run-length tables, nats.
        run_cap: longest run counted from one position, steps, ≥ 1.

    Raises:
        ValueError: a size, rank or rule constant out of its range, or a budget below 0.
    """

    mass: tuple[int, ...] = (1, 3, 5, 10, 25)
    additive: tuple[float, ...] = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5)
    multiplicative: tuple[float, ...] = (0.9, 0.7, 0.5, 0.3, 0.2, 0.1)
    top_m: tuple[int, ...] = (2, 4, 6, 8)
    top_m_slack: tuple[float, ...] = (0.01, 0.05, 0.1, 0.2)
    typical: tuple[tuple[float, float], ...] = ((0.1, 0.09), (0.09, 0.3))
    coverage: tuple[int, ...] = (2, 4, 8)
    run_budgets: tuple[float, ...] = (0.01, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.69)
    run_cap: int = 100

    def __post_init__(self) -> None:
        self.rules()  # each rule checks its own constants
        if self.run_cap < 1 or min(self.mass, default=1) < 1:
            raise ValueError(
                f"protocol: run_cap={self.run_cap} and every size of mass={list(self.mass)} must be 1 or more"
            )
        if not all(0 <= budget < math.inf for budget in self.run_budgets):
            raise ValueError(
                f"protocol: run_budgets={list(self.run_budgets)} are KL budgets in nats: 0 or more, finite"
            )

    def rules(self) -> list[Rule]:
        """Every rule that is tabulated or drawn, strict greedy first."""
        return [
            StrictGreedy(),
            *(Additive(t) for t in self.additive),
            *(Multiplicative(a) for a in self.multiplicative),
            *(TopM(m, t=t) for t in self.top_m_slack for m in self.top_m),
            *(Typical(e, d) for e, d in self.typical),
            *(Coverage(m) for m in self.coverage),
        ]

    def budgets(self) -> list[float]:
        """KL budgets at which survival is counted, nats: a fine grid with the table budgets among them."""
        top = math.log(1 + max(self.coverage, default=1)) * 1.02
        grid = {round(0.005 * i, 3) for i in range(round(top / 0.005) + 1)}
        return sorted(grid | set(self.run_budgets))


@dataclass
class CertifyReport:
    """Result of `certify`; `data` is the content of certify.json.

    Attributes:
        data: see docs/reading-reports.md for every key.
    """

    data: dict[str, Any] = field(default_factory=dict)

    @property
    def steps(self) -> int:
        """Steps counted."""
        return int(self.data["trace"]["counted_steps"])

    def rule(self, rule: Rule | str) -> dict[str, Any]:
        """Return the certificate statistics of one rule."""
        for row in self.data["certificates"]:
            if row["rule"] == str(rule):
                return row
        known = ", ".join(row["rule"] for row in self.data["certificates"])
        raise ValueError(f"rule {rule} is not in this report; it holds {known}")


def certify(
    trace: TraceLike,
    protocol: CertifyProtocol | None = None,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> CertifyReport:
    """Compute certificate statistics of a target along a trace.

    Args:
        trace: rows with a loss mask and a head; read once, in order.
        protocol: rules and budgets.
        progress: called with stage, rows done and rows in all.

    Returns:
        The report; certificates in nats, forward KL(target‖drafter).

    Raises:
        ValueError: the trace has no counted step.

    Source: arXiv 2606.30265, §6 (tables 1–6, figures 1–5).
    """
    protocol = protocol or CertifyProtocol()
    tally = _Tally(protocol)
    for head, segment, read, rows in _chunks(trace):
        tally.add(head, segment)
        tally.total_steps += read
        progress("certify", rows, len(trace))
    if tally.steps == 0:
        raise ValueError(
            f"the trace has {len(trace)} rows but its loss mask counts no step: certificates are statistics "
            "over counted steps; record the trace with completions, or check how the mask was made"
        )
    meta = getattr(trace, "meta", None)
    return CertifyReport(
        {
            "schema": SCHEMA,
            "direction": "forward",
            "trace": {
                "rows": len(trace),
                "counted_steps": tally.steps,
                "total_steps": tally.total_steps,
                "kept": tally.kept,
                "vocab_size": tally.vocab_size,
                **{k: str(v) for k, v in _identity(meta).items()},
            },
            **tally.result(),
        }
    )


def head_is_exact(head: Head, rule: Rule) -> Bool[Tensor, "*step"]:
    """Return where the head holds all that the rule's certificate depends on.

    Coverage(m) reads the m + 1 most probable tokens. A single-token rule reads the accepted tokens and the
    most probable rejected one, so one rejected token inside the head suffices; and nothing is missing when
    the head is the whole vocabulary or the threshold is negative (nothing can be rejected).
    """
    everywhere = torch.ones(head.shape, dtype=torch.bool, device=head.device)
    if head.num_kept == head.vocab_size:
        return everywhere
    if isinstance(rule, Coverage):
        return everywhere if head.num_kept > rule.m else ~everywhere
    if isinstance(rule, TopM) and rule.m > head.num_kept:
        return ~everywhere
    return (~rule.accepted_entries(head)).any(-1) | (rule.threshold(head) < 0)


def _identity(meta: Any) -> dict[str, Any]:
    names = ("target", "target_revision", "revision", "tokenizer_fingerprint", "dtype")
    return {n: getattr(meta, n) for n in names if getattr(meta, n, None) not in (None, "")}


def _chunks(trace: TraceLike) -> Iterator[tuple[Head, NDArray[np.int64], int, int]]:
    """Counted steps in chunks: their head, the unbroken segment of each, steps read, rows read so far."""
    heads: list[Head] = []
    segments: list[NDArray[np.int64]] = []
    size = segment = read = 0
    for index in range(len(trace)):
        row = trace.row(index)
        where = np.flatnonzero(np.asarray(row.loss_mask, dtype=bool))
        read += len(row.loss_mask)
        if len(where):
            broken = np.concatenate([[0], np.cumsum(np.diff(where) > 1)])
            heads.append(row.head[torch.from_numpy(where)])
            segments.append(segment + broken)
            segment += int(broken[-1]) + 1
            size += len(where)
        if heads and (size >= _STEPS_PER_CHUNK or index == len(trace) - 1):
            yield concatenate(heads), np.concatenate(segments), read, index + 1
            heads, segments, size, read = [], [], 0, 0


class _Tally:
    """The statistics that `certify` accumulates."""

    def __init__(self, protocol: CertifyProtocol) -> None:
        self.protocol = protocol
        self.rules = list(dict.fromkeys(protocol.rules()))
        self.budgets = protocol.budgets()
        self.certificates = {r: StepDistribution(ceiling(r), self.budgets) for r in self.rules}
        self.short = dict.fromkeys(self.rules, 0)
        self.runs = {r: RunCounts(protocol.run_budgets, protocol.run_cap) for r in self.rules}
        self.mass = {k: StepDistribution(1.0) for k in protocol.mass}
        self.p0 = StepDistribution(1.0)
        self.margin = StepDistribution(1.0, (0.01, 0.05, 0.1, 0.3))
        self.steps = self.total_steps = self.kept = self.vocab_size = 0

    def add(self, head: Head, segment: NDArray[np.int64]) -> None:
        self.steps += len(segment)
        self.kept, self.vocab_size = head.num_kept, head.vocab_size
        cumulative = (
            head.p.double().cumsum(-1).clamp_max(1.0)
        )  # stored gaps are float16: a sum can pass 1 by 1e-3
        for k, mass in self.mass.items():
            if k <= head.num_kept:
                mass.add(cumulative[:, k - 1].numpy())
        self.p0.add(cumulative[:, 0].numpy())
        self.margin.add(margin(head).numpy())
        for rule in self.rules:
            values = radius(head, rule).double().clamp_min(0.0).numpy()
            self.certificates[rule].add(values)
            self.short[rule] += int((~head_is_exact(head, rule)).sum())
            self.runs[rule].add(values, segment)

    def result(self) -> dict[str, Any]:
        edges = [i / 25 for i in range(26)]
        return {
            "mass": [{"k": k, **_quartet(d)} for k, d in self.mass.items() if d.count],
            "certificates": [self._certificate(r) for r in self.rules],
            "survival": {
                "budgets": self.budgets,
                "fraction": {str(r): self.certificates[r].survival() for r in self.rules},
            },
            "runs": {
                "budgets": list(self.protocol.run_budgets),
                "cap": self.protocol.run_cap,
                "rules": {str(r): self.runs[r].result() for r in self.rules},
            },
            "p0": {"edges": edges, "fraction": self.p0.histogram(edges) / self.steps},
            "margin": {
                "edges": edges,
                "fraction": self.margin.histogram(edges) / self.steps,
                "below": {
                    f"{t:g}": 1.0 - s
                    for t, s in zip(self.margin.thresholds, self.margin.survival(), strict=True)
                },
            },
        }

    def _certificate(self, rule: Rule) -> dict[str, Any]:
        values = self.certificates[rule]
        return {
            "rule": str(rule),
            **{k: v for k, v in vars(rule).items() if v is not None},
            **_quartet(values),
            "mean_capped": values.mean_capped(),
            "ceiling": ceiling(rule),
            "unbounded": values.infinite / values.count,
            "short_head": self.short[rule] / values.count,
        }


def _quartet(d: StepDistribution) -> dict[str, float]:
    return {"mean": d.mean(), "median": d.quantile(0.5), "p5": d.quantile(0.05), "p25": d.quantile(0.25)}


class RunCounts:
    """Lengths of runs of consecutive steps whose certificate exceeds a budget, for several budgets."""

    def __init__(self, budgets: Sequence[float], cap: int) -> None:
        self.budgets = list(budgets)
        self.cap = cap
        self.positions = 0
        self.certified = np.zeros(len(budgets), dtype=np.int64)
        self.capped_total = np.zeros(len(budgets), dtype=np.int64)
        self.maximal = np.zeros(len(budgets), dtype=np.int64)

    def add(self, values: NDArray[np.float64], segment: NDArray[np.int64]) -> None:
        """Count steps with these certificates; runs end where the segment changes."""
        # a step of certificate 0 between segments ends a run, as 0 exceeds no budget; it is not counted
        ends = np.flatnonzero(np.diff(segment)) + 1
        radii = torch.from_numpy(np.insert(values, ends, 0.0))
        self.positions += len(values)
        for e, budget in enumerate(self.budgets):
            runs = certified_run_lengths(radii, budget, self.cap).runs
            certified = runs > 0
            self.certified[e] += int(certified.sum())
            self.capped_total[e] += int(runs.sum())
            self.maximal[e] += int(certified[0]) + int((certified[1:] & ~certified[:-1]).sum())

    def result(self) -> dict[str, list[float]]:
        """Return the mean run from any position, from certified positions, and of maximal runs."""
        with np.errstate(invalid="ignore", divide="ignore"):
            return {
                "from_position": (self.capped_total / self.positions).tolist(),
                "given_certified": (self.capped_total / self.certified).tolist(),
                "maximal": (self.certified / self.maximal).tolist(),
            }
