"""Certified against realised acceptance of a drafter, step by step along a held-out trace.

At every counted step the drafter reads the target's own text and names its first choice. What is *realised*
is what the rule says about that choice. What is *certified* follows from the divergence (`JoinedSteps`).
Certified steps must be among the accepted ones: one step that is not, and no report is written.

Axis letters: N steps · R documents · B margin buckets · C rules · W widths.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Int
from numpy import ndarray
from torch import Tensor

from certdraft.certificates import (
    Additive,
    Coverage,
    Multiplicative,
    Rule,
    StrictGreedy,
    TopM,
    Typical,
)
from certdraft.evaluation.measure.calibration import Calibration
from certdraft.evaluation.measure.document_features import TargetFeatures
from certdraft.evaluation.measure.joined_steps import JoinedSteps
from certdraft.evaluation.measure.statistics import pooled_ratio
from certdraft.evaluation.measure.streaming import StepDistribution
from certdraft.evaluation.measure.trace_reading import (
    DrafterLike,
    OnlineTarget,
    TraceLike,
    TraceRowLike,
    batches,
    joined_steps,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

MARGIN_EDGES = (0.0, 0.01, 0.05, 0.1, 0.3, 0.6, 1.0)
LOW_MARGIN = 0.1
DEFAULT_RULES: tuple[Rule, ...] = (
    StrictGreedy(),
    Additive(0.1),
    Additive(0.3),
    Multiplicative(0.5),
    TopM(4, t=0.1),
    Typical(0.1, 0.09),
    Coverage(2),
    Coverage(4),
    Coverage(8),
)
_KL_CAP = 64.0  # nats; a step beyond says "hopeless" whatever the number


class CertificateViolation(ValueError):
    """A certified step was rejected: the certificate, or what was fed to it, is wrong."""


@dataclass
class Acceptance:
    """Counts per document, from which every rate and every interval is made.

    Attributes:
        kl_source: "exact" (the target was computed again) or "head" (a lower bound of KL, from the trace).
        rules: the C rules.
        widths: the W widths of coverage@m.
        steps: [R, B] counted steps by margin bucket.
        certified: [R, B, C].
        realised: [R, B, C].
        unknown: [C] steps whose verdict the head cannot give (counted as rejected).
        covered: [R, B, W] greedy token in the drafter's top-m.
        kl: distribution of KL(target‖drafter), nats, capped at 64.
        calibration: of the drafter's confidence in its first choice.
        rejections: strict-greedy rejections by cause.
        greedy_changed: steps at which the recomputed greedy token differs from the recorded one.
    """

    kl_source: str
    rules: tuple[Rule, ...]
    widths: tuple[int, ...]
    steps: ndarray
    certified: ndarray
    realised: ndarray
    unknown: ndarray
    covered: ndarray
    kl: StepDistribution
    calibration: Calibration
    rejections: dict[str, int]
    greedy_changed: int = 0

    def coverage_counts(self, m: int, low_margin: bool = False) -> tuple[ndarray, ndarray]:
        """Covered steps and steps per document, [R] each; `low_margin`: margins below 0.1."""
        buckets = slice(0, MARGIN_EDGES.index(LOW_MARGIN)) if low_margin else slice(None)
        return self.covered[:, buckets, self.widths.index(m)].sum(1), self.steps[:, buckets].sum(1)

    def summary(self, seed: int = 0) -> dict[str, Any]:
        """The JSON form, with intervals over documents."""
        return {
            "documents": len(self.steps),
            "steps": int(self.steps.sum()),
            "greedy_changed": self.greedy_changed,
            "violations": 0,
            "kl": {
                "source": self.kl_source,
                "mean": self.kl.mean(),
                "median": self.kl.quantile(0.5),
                "p95": self.kl.quantile(0.95),
            },
            "rules": [self._rule(i, seed) for i in range(len(self.rules))],
            "coverage": [self._coverage(m, seed) for m in self.widths],
            "calibration": self.calibration.summary(),
            "rejections": self.rejections,
        }

    def _rule(self, index: int, seed: int) -> dict[str, Any]:
        steps = self.steps.sum(1)
        buckets = []
        for b, (low, high) in enumerate(zip(MARGIN_EDGES, MARGIN_EDGES[1:], strict=False)):
            n = int(self.steps[:, b].sum())
            realised = _rate(self.realised[:, b, index], self.steps[:, b], seed)
            certified = int(self.certified[:, b, index].sum())
            buckets.append(
                {
                    "low": low,
                    "high": high,
                    "steps": n,
                    "certified": certified / n if n else None,
                    "realised": realised,
                }
            )
        return {
            "rule": str(self.rules[index]),
            "certified": _rate(self.certified[:, :, index].sum(1), steps, seed),
            "realised": _rate(self.realised[:, :, index].sum(1), steps, seed),
            "unknown": int(self.unknown[index]),
            "buckets": buckets,
        }

    def _coverage(self, m: int, seed: int) -> dict[str, Any]:
        return {
            "m": m,
            "all": _rate(*self.coverage_counts(m), seed),
            "low_margin": _rate(*self.coverage_counts(m, low_margin=True), seed),
        }


def _rate(numerator: ndarray, denominator: ndarray, seed: int) -> dict[str, Any] | None:
    if not len(denominator) or denominator.sum() == 0:
        return None
    return vars(pooled_ratio(numerator, denominator, seed=seed))


@torch.inference_mode()
def measure_acceptance(
    drafter: DrafterLike,
    trace: TraceLike,
    *,
    target: PreTrainedModel | None = None,
    rules: Sequence[Rule] = DEFAULT_RULES,
    widths: Sequence[int] = (1, 2, 4, 8),
    top_m: int = 4,
    tie_gap: float = 1e-3,
    max_documents: int | None = None,
    tokens_per_batch: int = 2048,
    features: TargetFeatures | None = None,
) -> Acceptance:
    """Measure a drafter along a trace, teacher-forced.

    Args:
        drafter: reads whole documents.
        trace: held out from the drafter's training; only steps its loss mask counts enter.
        target: a causal LM whose distributions replace the recorded heads (exact KL, twice the cost); None
            uses the heads.
        rules: rules to certify and to apply.
        widths: m of coverage@m.
        top_m: width that separates "not in top-m" from "in top-m" among the rejections.
        tie_gap: nats between the target's greedy token and the drafter's choice below which a rejection
            counts as a numerical tie: other kernels or dtypes may resolve it otherwise.
        max_documents: read only the first so many documents.
        tokens_per_batch: tokens per drafter pass.
        features: for a drafter that reads the target's layers; see `features_for`.

    Returns:
        Counts; `summary()` is the JSON form.

    Raises:
        CertificateViolation: a certified step was rejected; names document, step, rule, KL and certificate.
        ValueError: no counted step, vocabularies differ, or NaN logits.
    """
    rules, widths = tuple(rules), tuple(widths)
    counts = _Counts(rules, widths, top_m, tie_gap, features)
    online = None if target is None else OnlineTarget(target)
    documents = len(trace) if max_documents is None else min(max_documents, len(trace))
    for first, rows in batches(trace, documents, tokens_per_batch):
        counts.add(drafter, online, first, rows)
    if not counts.steps or not (steps := np.stack(counts.steps)).sum():
        raise ValueError("the trace counts no step in its loss mask; there is nothing to evaluate on")
    return Acceptance(
        "head" if target is None else "exact",
        rules,
        widths,
        steps,
        np.stack(counts.certified),
        np.stack(counts.realised),
        counts.unknown,
        np.stack(counts.covered),
        counts.kl,
        counts.calibration,
        counts.rejections,
        counts.greedy_changed,
    )


class _Counts:
    """Accumulates over documents; see `Acceptance` for the shapes."""

    def __init__(
        self,
        rules: tuple[Rule, ...],
        widths: tuple[int, ...],
        top_m: int,
        tie_gap: float,
        features: TargetFeatures | None,
    ) -> None:
        self.rules, self.widths, self.top_m, self.tie_gap = rules, widths, top_m, tie_gap
        self.features = features
        self.steps: list[ndarray] = []
        self.certified: list[ndarray] = []
        self.realised: list[ndarray] = []
        self.covered: list[ndarray] = []
        self.unknown = np.zeros(len(rules), dtype=np.int64)
        self.kl = StepDistribution(_KL_CAP)
        self.calibration = Calibration()
        self.rejections = {
            "top_m": top_m, "steps": 0, "rejected": 0, "numerical_tie": 0, "in_top_m": 0, "not_in_top_m": 0
        }  # fmt: skip
        self.greedy_changed = 0

    def add(
        self, drafter: DrafterLike, target: OnlineTarget | None, first: int, rows: list[TraceRowLike]
    ) -> None:
        """Count some documents, the first of which has index `first`."""
        shape = (len(rows), len(MARGIN_EDGES) - 1)
        steps = np.zeros(shape, dtype=np.int64)
        certified, realised = (np.zeros((*shape, len(self.rules)), dtype=np.int64) for _ in range(2))
        covered = np.zeros((*shape, len(self.widths)), dtype=np.int64)
        for seen, where, changed in joined_steps(drafter, target, rows, self.features):
            self.greedy_changed += changed
            margin = seen.margin.cpu().numpy()
            bucket = np.clip(np.searchsorted(MARGIN_EDGES, margin, "right") - 1, 0, shape[1] - 1)
            key = (where[:, 0].numpy(), bucket)
            np.add.at(steps, key, 1)
            for c, rule in enumerate(self.rules):
                sure, happened = self._judge(seen, rule, c, where, first)
                np.add.at(certified[..., c], key, sure)
                np.add.at(realised[..., c], key, happened)
            rank = seen.rank.cpu().numpy()
            for w, m in enumerate(self.widths):
                np.add.at(covered[..., w], key, rank <= m)
            self._sort_rejections(seen)
            self.kl.add(seen.kl.clamp_max(_KL_CAP).cpu().numpy())
            self.calibration.add(seen.confidence.cpu().numpy(), rank == 1)
        self.steps.extend(steps)
        self.certified.extend(certified)
        self.realised.extend(realised)
        self.covered.extend(covered)

    def _judge(
        self, seen: JoinedSteps, rule: Rule, index: int, where: Int[Tensor, "N 2"], first: int
    ) -> tuple[ndarray, ndarray]:
        sure, bound = seen.certified(rule)
        happened, unknown = seen.accepted(rule)
        wrong = sure & ~happened & ~unknown
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            raise CertificateViolation(
                f"certified but rejected: document {first + int(where[at, 0])}, step {int(where[at, 1])}, "
                f"rule {rule}: KL {float(seen.kl[at]):.6g} nats is below the certificate "
                f"{float(bound[at]):.6g}, yet the drafter's token {int(seen.token[at])} is rejected (greedy "
                f"token {int(seen.head.greedy[at])}, margin {float(seen.margin[at]):.6g}); "
                f"{int(wrong.sum())} such steps in this batch. No report is written. The recorded head and "
                "the drafter's vocabulary are the first things to check."
            )
        self.unknown[index] += int(unknown.sum())
        return sure.cpu().numpy(), happened.cpu().numpy()

    def _sort_rejections(self, seen: JoinedSteps) -> None:
        rejected = seen.rank > 1
        tie = rejected & (seen.target_gap <= self.tie_gap)
        near = rejected & ~tie & (seen.rank <= self.top_m)
        self.rejections["steps"] += len(rejected)
        self.rejections["rejected"] += int(rejected.sum())
        self.rejections["numerical_tie"] += int(tie.sum())
        self.rejections["in_top_m"] += int(near.sum())
        self.rejections["not_in_top_m"] += int((rejected & ~tie & ~near).sum())
