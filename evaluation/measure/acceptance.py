"""Certified and realised acceptance of a drafter, step by step along a held-out trace.

At every step in the loss mask the drafter reads the target's own text and predicts a token. *Realised* is
whether the rule accepts that token; *certified* is whether the divergence alone guarantees it
(`JoinedSteps`). A certified step that is rejected raises `CertificateViolation`, and no report is written.

Hidden states of a batch are held; logits only for a chunk of steps at a time.

Axis letters: N steps · R documents · T tokens · H hidden · V vocabulary · B margin buckets · C rules
· W widths.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from certdraft.certificates import Additive, Coverage, Multiplicative, Rule, StrictGreedy, TopM, Typical
from certdraft.data import LogitHead
from certdraft.evaluation.measure.distributions import Calibration, StepDistribution
from certdraft.evaluation.measure.joined_steps import JoinedSteps
from certdraft.evaluation.measure.statistics import pooled_ratio
from certdraft.evaluation.measure.trace_reading import (
    DrafterFeatures,
    TraceLike,
    TraceRowLike,
    batches,
    concatenate,
)
from certdraft.support import text_body

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
_KL_CAP = 64.0  # nats
_ENTRIES_PER_CHUNK = 1 << 23  # float64 log-probabilities held at once: 64 MiB a model


class CertificateViolation(ValueError):
    """A certified step was rejected: the certificate, or what was fed to it, is wrong."""


@dataclass
class Acceptance:
    """Counts per document, from which all rates and intervals are computed.

    Args:
        documents: R, how many are read.
        kl_source: "exact" (target recomputed) or "head" (a lower bound of KL, from the trace).
        rules: the C rules.
        widths: the W widths of coverage@m.
        top_m: width that separates "not in top-m" from "in top-m" among the rejections.
        tie_gap: nats within which a rejection is a numerical tie.

    Attributes:
        steps: [R, B] counted steps by margin bucket.
        certified: [R, B, C].
        realised: [R, B, C].
        covered: [R, B, W] greedy token in the drafter's top-m.
        unknown: [C] steps that the recorded head cannot decide (counted as rejected).
        kl: distribution of KL(target‖drafter), nats, capped at 64.
        calibration: of the drafter's confidence in its first choice.
        rejections: strict-greedy rejections by cause.
        greedy_changed: steps at which the recomputed greedy token differs from the recorded one.
    """

    documents: int
    kl_source: str
    rules: tuple[Rule, ...]
    widths: tuple[int, ...]
    top_m: int = 4
    tie_gap: float = 1e-3

    def __post_init__(self) -> None:
        shape, counted = (
            (self.documents, len(MARGIN_EDGES) - 1),
            (len(self.rules), len(self.rules), len(self.widths)),
        )
        self.steps = np.zeros(shape, dtype=np.int64)
        self.certified, self.realised, self.covered = (np.zeros((*shape, n), dtype=np.int64) for n in counted)
        self.unknown = np.zeros(len(self.rules), dtype=np.int64)
        self.kl, self.calibration, self.greedy_changed = StepDistribution(_KL_CAP), Calibration(), 0
        causes = ("steps", "rejected", "numerical_tie", "in_top_m", "not_in_top_m")
        self.rejections = {"top_m": self.top_m, **dict.fromkeys(causes, 0)}

    def add(self, joined: JoinedSteps, document: ndarray, position: ndarray) -> None:
        """Count N steps, given the document and the position of each."""
        margin = joined.margin.cpu().numpy()
        bucket = np.searchsorted(MARGIN_EDGES, margin, "right") - 1
        key = (document, bucket.clip(0, len(MARGIN_EDGES) - 2))
        np.add.at(self.steps, key, 1)
        for c, rule in enumerate(self.rules):
            guaranteed, bound = joined.certified(rule)
            accepted, unknown = joined.accepted(rule)
            if bool((wrong := guaranteed & ~accepted & ~unknown).any()):
                at = int(wrong.nonzero()[0])
                raise CertificateViolation(
                    f"certified but rejected: document {document[at]}, step {position[at]}, rule {rule}: KL "
                    f"{float(joined.kl[at]):.6g} nats is below the certificate {float(bound[at]):.6g}, yet "
                    f"the drafter's token {int(joined.token[at])} is rejected (greedy token "
                    f"{int(joined.head.greedy[at])}, margin {float(joined.margin[at]):.6g}); "
                    f"{int(wrong.sum())} such steps in this batch. No report is written. The recorded head "
                    "and the drafter's vocabulary are the first things to check."
                )
            self.unknown[c] += int(unknown.sum())
            np.add.at(self.certified[..., c], key, guaranteed.cpu().numpy())
            np.add.at(self.realised[..., c], key, accepted.cpu().numpy())
        rank = joined.rank.cpu().numpy()
        for w, m in enumerate(self.widths):
            np.add.at(self.covered[..., w], key, rank <= m)
        self.kl.add(joined.kl.clamp_max(_KL_CAP).cpu().numpy())
        self.calibration.add(joined.confidence.cpu().numpy(), rank == 1)
        rejected = rank > 1
        tie = rejected & (joined.target_gap <= self.tie_gap).cpu().numpy()
        near = rejected & ~tie & (rank <= self.rejections["top_m"])
        self.rejections["steps"] += len(rejected)
        self.rejections["rejected"] += int(rejected.sum())
        self.rejections["numerical_tie"] += int(tie.sum())
        self.rejections["in_top_m"] += int(near.sum())
        self.rejections["not_in_top_m"] += int((rejected & ~tie & ~near).sum())

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
            share = certified / n if n else None
            buckets.append({"low": low, "high": high, "steps": n, "certified": share, "realised": realised})
        return {
            "rule": str(self.rules[index]),
            "certified_steps": int(self.certified[:, :, index].sum()),
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
    drafter: Any,
    trace: TraceLike,
    *,
    target: PreTrainedModel | None = None,
    rules: Sequence[Rule] = DEFAULT_RULES,
    widths: Sequence[int] = (1, 2, 4, 8),
    top_m: int = 4,
    tie_gap: float = 1e-3,
    max_documents: int | None = None,
    tokens_per_batch: int = 2048,
    features: DrafterFeatures | None = None,
    progress: Callable[[int], None] = lambda documents: None,
) -> Acceptance:
    """Measure a drafter along a trace, teacher-forced.

    Args:
        drafter: reads whole documents: a `CausalDrafter`, or anything with its `hidden` and `head`.
        trace: held out from the drafter's training; only steps in its loss mask are counted.
        target: a causal LM whose distributions replace the recorded heads (exact KL, twice the cost).
        rules: see `Acceptance`, as for widths, top_m and tie_gap.
        widths: m of coverage@m.
        top_m: of the rejections.
        tie_gap: nats; other kernels or dtypes may order tokens this close otherwise.
        max_documents: read only the first so many documents.
        tokens_per_batch: tokens per drafter pass.
        features: for a drafter that reads the target's layers; see `features_for`.
        progress: called with the number of documents after each batch.

    Returns:
        Counts; `summary()` is the JSON form.

    Raises:
        CertificateViolation: a certified step was rejected; names document, step, rule, KL and certificate.
        ValueError: no counted step, vocabularies differ, or NaN logits.
    """
    documents = len(trace) if max_documents is None else min(max_documents, len(trace))
    source = "head" if target is None else "exact"
    found = Acceptance(documents, source, tuple(rules), tuple(widths), top_m, tie_gap)
    recomputed = None if target is None else _RecomputedTarget(target)
    for first, rows in batches(trace, documents, tokens_per_batch):
        for joined, where, changed in _joined_steps(drafter, recomputed, rows, first, features):
            found.greedy_changed += changed
            found.add(joined, first + where[:, 0].numpy(), where[:, 1].numpy())
        progress(len(rows))
    if not found.steps.sum():
        raise ValueError("the trace counts no step in its loss mask; there is nothing to evaluate on")
    return found


class _RecomputedTarget:
    """The target's fp32 logits at chosen positions."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.body, self.head = text_body(model), LogitHead(model)

    def hidden(self, ids: Int[Tensor, "R T"], attention_mask: Int[Tensor, "R T"]) -> Float[Tensor, "R T H"]:
        return self.body(input_ids=ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


def _joined_steps(
    drafter: Any,
    target: _RecomputedTarget | None,
    rows: list[TraceRowLike],
    first: int,
    features: DrafterFeatures | None,
) -> Iterator[tuple[JoinedSteps, Int[Tensor, "N 2"], int]]:
    """Yield chunks of counted steps, their (row, position), and how many recomputed greedy tokens differ."""
    length = max(len(r.input_ids) for r in rows)
    ids = torch.zeros(len(rows), length, dtype=torch.long)
    document = torch.full_like(ids, -1)
    mask = torch.zeros(ids.shape, dtype=torch.bool)
    for i, row in enumerate(rows):
        n = len(row.input_ids)
        ids[i, :n], document[i, :n], mask[i, :n] = row.input_ids, i, row.loss_mask
    device = _device_of(drafter)
    ids, document = ids.to(device), document.to(device)
    position = torch.arange(length, device=device).expand_as(ids).contiguous()
    given = () if features is None else (features.padded(rows, first, length).to(device),)
    drafter_hidden = drafter.hidden(ids, position, document, *given)
    target_hidden = None if target is None else target.hidden(ids, (document >= 0).long())
    recorded = concatenate([r.head[torch.as_tensor(r.loss_mask, dtype=torch.bool)] for r in rows]).to(device)
    where = mask.nonzero()  # [N, 2]: row, position
    size = max(1, _ENTRIES_PER_CHUNK // recorded.vocab_size)
    for begin in range(0, len(where), size):
        part = where[begin : begin + size]
        at = (part[:, 0].to(device), part[:, 1].to(device))
        head = recorded[begin : begin + size]
        logits = drafter.head(drafter_hidden[at])
        if target is None or target_hidden is None:
            yield JoinedSteps.from_logits(logits, head), part, 0
        else:
            steps = JoinedSteps.from_logits(logits, target.head(target_hidden[at]))
            yield steps, part, int((steps.head.greedy != head.greedy).sum())


def _device_of(drafter: object) -> torch.device:
    parameters = getattr(drafter, "parameters", None)
    found = next(iter(parameters()), None) if callable(parameters) else None
    return torch.device("cpu") if found is None else found.device
