"""`evaluate`: measure drafters on held-out text, and compare them.

Three measurements of each drafter, cheapest first, each a module of `measure/`:

1. `measure_acceptance`: teacher-forced acceptance along the trace (one drafter pass per batch of documents);
2. `replay_lengths`: acceptance lengths on the recorded greedy texts, without running the target;
3. `benchmark`: real decoding compared with plain decoding, when the target is given.

Target hidden states for feature drafters are computed once per document and shared (`features_for`). The
first drafter is the baseline; the others are compared with it, paired by document. `EvaluationReport.data` is
the content of report.json.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from certdraft.certificates import Rule
from certdraft.decoding import BestFirst, Chain, TargetRunner, TreeBuilder
from certdraft.evaluation.measure.acceptance import DEFAULT_RULES, Acceptance, measure_acceptance
from certdraft.evaluation.measure.acceptance_lengths import Lengths, replay_lengths
from certdraft.evaluation.measure.bench import Benchmark, benchmark
from certdraft.evaluation.measure.statistics import compare_ratios
from certdraft.evaluation.measure.trace_reading import (
    Document,
    TraceLike,
    features_for,
    greedy_documents,
    tie_gap_of,
)
from certdraft.evaluation.report.evaluate_tables import headline_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCHEMA = "certdraft.evaluate/1"
WIDTHS = (1, 2, 4, 8)


def default_builders() -> dict[str, TreeBuilder]:
    """Return a chain of 4 and a best-first tree of 16 nodes."""
    return labelled([Chain(4), BestFirst(16, max_depth=8)])


def labelled(builders: Sequence[TreeBuilder]) -> dict[str, TreeBuilder]:
    """Return builders by their printed form; raise ValueError for none, or two that print alike."""
    found = {repr(b): b for b in builders}
    if not builders or len(found) != len(builders):
        raise ValueError(f"evaluate needs tree builders that differ; got {[repr(b) for b in builders]}")
    return found


def refuse_builders(
    builders: Sequence[TreeBuilder], target: PreTrainedModel, drafters: Mapping[str, Any]
) -> None:
    """Raise ValueError if a builder's cost model is of another device, target or drafter."""
    for drafter in drafters.values():
        for builder in builders:
            if prepare := getattr(builder, "prepare", None):
                prepare(TargetRunner(target), drafter)


@dataclass
class EvaluationReport:
    """Result of `evaluate`; `data` is the content of report.json.

    Attributes:
        data: see docs/reading-reports.md for every key.
    """

    data: dict[str, Any]

    def __str__(self) -> str:
        """The headline table as aligned text: coverage, certified share and τ of every drafter."""
        return headline_table(self.data).text()

    def intervals(self, drafter: str) -> dict[str, dict[str, Any]]:
        """Return one drafter's intervals by quantity: coverage@m, certified/RULE, tau/TREE, speedup/TREE."""
        if drafter not in self.data["drafters"]:
            raise ValueError(
                f"no drafter {drafter!r} in the report; it has {', '.join(self.data['drafters'])}"
            )
        entry = self.data["drafters"][drafter]
        found = {}
        for row in entry["acceptance"]["coverage"]:
            found[f"coverage@{row['m']}"] = row["all"]
            if row["low_margin"] is not None:
                found[f"low_margin_coverage@{row['m']}"] = row["low_margin"]
        found |= {f"certified/{row['rule']}": row["certified"] for row in entry["acceptance"]["rules"]}
        found |= {f"tau/{label}": row["tau"] for label, row in entry["lengths"].items()}
        for row in (self.data["bench"] or {"methods": []})["methods"]:
            if row["drafter"] == drafter:
                found[f"speedup/{row['builder']}"] = row["speedup"]
        return found

    def metrics(self, drafter: str) -> dict[str, float]:
        """Return the values of `intervals` and the calibration error, for model cards and W&B."""
        found = {name: row["value"] for name, row in self.intervals(drafter).items()}
        return {**found, "ece": self.data["drafters"][drafter]["acceptance"]["calibration"]["ece"]}


def evaluate(
    drafters: Mapping[str, Any],
    trace: TraceLike,
    target: PreTrainedModel | None = None,
    *,
    builders: Sequence[TreeBuilder] | None = None,
    rules: Sequence[Rule] = DEFAULT_RULES,
    prompts: int | None = 32,
    replay_documents: int | None = 256,
    max_documents: int | None = None,
    max_new_tokens: int | None = None,
    exact_kl: bool = False,
    top_m: int = 4,
    tie_gap: float | None = None,
    seed: int = 0,
    progress: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> EvaluationReport:
    """Measure drafters on a held-out trace, and by real decoding when the target is given.

    Args:
        drafters: name → drafter in eval mode; the first is the baseline of the comparisons.
        trace: the target's, held out from training.
        target: the target itself; None skips real decoding, and refuses drafters that read its layers.
        builders: draft trees; None is a chain of 4 and a best-first tree of 16 nodes.
        rules: acceptance rules to certify and apply.
        prompts: prompts decoded for real, spread over the trace; None = all.
        replay_documents: documents replayed for τ, spread over the trace; None = all.
        max_documents: documents read for acceptance, from the first; None = all.
        max_new_tokens: cut continuations to this length.
        exact_kl: recompute the target's full distributions along the trace instead of using the recorded
            heads.
        top_m: drafter ranks that count as "in top-m" among rejections.
        tie_gap: lead of the target's greedy token, nats, up to which a rejection counts as a numerical tie;
            that of the trace's dtype when not given (`tie_gap_of`).
        seed: of the bootstrap.
        progress: called with stage, steps done and steps in all.

    Returns:
        The report.

    Raises:
        CertificateViolation: a certified step was rejected.
        ValueError: no drafters, exact_kl without a target, vocabularies differ, or an empty trace.
    """
    if not drafters:
        raise ValueError("evaluate needs at least one drafter")
    if exact_kl and target is None:
        raise ValueError(
            "exact_kl recomputes the target's distributions, so it needs the target; give one or drop it"
        )
    tie_gap = tie_gap_of(trace) if tie_gap is None else tie_gap
    trees = default_builders() if builders is None else labelled(builders)
    texts = greedy_documents(trace, replay_documents, max_new_tokens)
    decoded = [] if target is None else greedy_documents(trace, prompts, max_new_tokens)
    kept = {d.index for d in [*texts, *decoded] if d.index is not None}
    features = features_for(drafters, target, kept, trace)
    documents = len(trace) if max_documents is None else min(max_documents, len(trace))
    tick = _ticker("acceptance", len(drafters) * documents, progress)
    acceptance = {
        name: measure_acceptance(
            drafter,
            trace,
            target=target if exact_kl else None,
            rules=rules,
            widths=WIDTHS,
            top_m=top_m,
            tie_gap=tie_gap,
            max_documents=max_documents,
            features=features[name],
            progress=tick,
        )
        for name, drafter in drafters.items()
    }
    tick = _ticker("replay", len(drafters) * len(texts), progress)
    lengths = {
        name: replay_lengths(
            drafter, texts, trees, top_m=top_m, tie_gap=tie_gap, features=features[name], progress=tick
        )
        for name, drafter in drafters.items()
    }
    bench = None
    if target is not None:
        tick = _ticker("decode", len(decoded) * (1 + len(drafters) * len(trees)), progress)
        bench = benchmark(
            target, drafters, decoded, trees, top_m=top_m, tie_gap=tie_gap, features=features, progress=tick
        )
    return EvaluationReport(_data(drafters, trace, acceptance, lengths, bench, texts, seed, tie_gap))


def _ticker(stage: str, total: int, progress: Callable[[str, int, int], None]) -> Callable[..., None]:
    """A function that counts finished items and reports them; the stage is reported at once."""
    done = 0

    def tick(items: int = 1) -> None:
        nonlocal done
        done += items
        progress(stage, done, total)

    tick(0)
    return tick


def _data(
    drafters: Mapping[str, Any],
    trace: TraceLike,
    acceptance: Mapping[str, Acceptance],
    lengths: Mapping[str, Mapping[str, Lengths]],
    bench: Benchmark | None,
    texts: Sequence[Document],
    seed: int,
    tie_gap: float,
) -> dict[str, Any]:
    first = next(iter(drafters))
    meta = getattr(trace, "meta", None)
    names = ("target", "target_revision", "tokenizer_fingerprint", "dtype", "num_kept", "vocab_size")
    return {
        "schema": SCHEMA,
        "baseline": first,
        "trace": {
            "documents": len(trace),
            "replayed": len(texts),
            **{n: getattr(meta, n) for n in names if getattr(meta, n, None) is not None},
            **_left_out(trace),
        },
        "drafters": {
            name: {
                "parameters": _parameters(drafter),
                "tie_gap": tie_gap,
                "acceptance": acceptance[name].summary(seed),
                "lengths": {label: found.summary(seed) for label, found in lengths[name].items()},
            }
            for name, drafter in drafters.items()
        },
        "comparisons": [
            row
            for name in drafters
            if name != first
            for row in _compare(name, first, acceptance, lengths, bench, seed)
        ],
        "bench": None if bench is None else bench.summary(seed),
    }


def _compare(
    name: str,
    baseline: str,
    acceptance: Mapping[str, Acceptance],
    lengths: Mapping[str, Mapping[str, Lengths]],
    bench: Benchmark | None,
    seed: int,
) -> list[dict[str, Any]]:
    """Paired differences and ratios of a drafter to the baseline, one row per quantity."""
    pair = name, baseline
    counts: dict[str, list[Any]] = {}
    for m in WIDTHS:
        counts[f"coverage@{m}"] = [acceptance[d].coverage_counts(m) for d in pair]
        low = [acceptance[d].coverage_counts(m, low_margin=True) for d in pair]
        if low[0][1].sum():
            counts[f"low_margin_coverage@{m}"] = low
    steps = acceptance[name].steps.sum(1)
    for c, rule in enumerate(acceptance[name].rules):
        counts[f"certified/{rule}"] = [(acceptance[d].certified[:, :, c].sum(1), steps) for d in pair]
    for label in lengths[name]:
        counts[f"tau/{label}"] = [lengths[d][label].counts() for d in pair]
        if bench is not None:
            timings = [bench.methods[d, label] for d in pair]
            counts[f"tokens_per_s/{label}"] = [(np.array(t.tokens), np.array(t.seconds)) for t in timings]
    rows = []
    for quantity, (first, second) in counts.items():
        row: dict[str, Any] = {"drafter": name, "baseline": baseline, "quantity": quantity}
        row["difference"] = vars(compare_ratios(first, second, "difference", seed=seed))
        if second[0].sum() > 0:
            row["ratio"] = vars(compare_ratios(first, second, "ratio", seed=seed))
        rows.append(row)
    return rows


def _left_out(trace: TraceLike) -> dict[str, Any]:
    """Prompts of the prompts files that were left out, by reason."""
    skipped = getattr(getattr(trace, "accounting", None), "skipped", None)
    return {"left_out": {reason: skip.count for reason, skip in skipped.items()}} if skipped else {}


def _parameters(drafter: Any) -> int | None:
    parameters = getattr(drafter, "parameters", None)
    return sum(p.numel() for p in parameters()) if callable(parameters) else None
