"""Drafters side by side on held-out text: acceptance, acceptance length, speed; `report.json` is the result.

Three measurements of each drafter, cheapest first: teacher-forced acceptance along the trace
(`measure_acceptance`), acceptance lengths replayed on the recorded greedy texts (`replay_lengths`), and, when
the target is at hand, real decoding against plain decoding (`benchmark`). The first drafter is the baseline;
every other one is compared with it, paired by document.
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
from certdraft.evaluation.measure.document_features import features_for
from certdraft.evaluation.measure.statistics import compare_ratios
from certdraft.evaluation.measure.trace_reading import Document, TraceLike, greedy_documents
from certdraft.evaluation.report.evaluate_tables import headline_table

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SCHEMA = "certdraft.evaluate/1"
WIDTHS = (1, 2, 4, 8)


def default_builders() -> dict[str, TreeBuilder]:
    """A chain of 4 and a best-first tree of 16 nodes: the plainest decoder and a good one."""
    return labelled([Chain(4), BestFirst(16, max_depth=8)])


def labelled(builders: Sequence[TreeBuilder]) -> dict[str, TreeBuilder]:
    """Builders by their printed form.

    Raises:
        ValueError: none, or two that print alike.
    """
    found = {repr(b): b for b in builders}
    if not builders or len(found) != len(builders):
        raise ValueError(f"evaluate needs tree builders that differ; got {[repr(b) for b in builders]}")
    return found


def refuse_builders(
    builders: Sequence[TreeBuilder], target: PreTrainedModel, drafters: Mapping[str, Any]
) -> None:
    """Asks every builder whether it may decode with this target and these drafters, before anything is run.

    Raises:
        ValueError: a cost model of another device, target or drafter.
    """
    for drafter in drafters.values():
        for builder in builders:
            if prepare := getattr(builder, "prepare", None):
                prepare(TargetRunner(target), drafter)


@dataclass
class EvaluationReport:
    """Everything measured; `data` is the content of report.json.

    Attributes:
        data: see docs/reading-reports.md for every key.
    """

    data: dict[str, Any]

    def __str__(self) -> str:
        """The headline table as aligned text: coverage, certified share and τ of every drafter."""
        return headline_table(self.data).text()

    def metrics(self, drafter: str) -> dict[str, float]:
        """Flat numbers of one drafter, for model cards and W&B: τ, coverage@m, certified share, speed-up.

        Raises:
            ValueError: no such drafter in the report.
        """
        if drafter not in self.data["drafters"]:
            raise ValueError(
                f"no drafter {drafter!r} in the report; it has {', '.join(self.data['drafters'])}"
            )
        entry = self.data["drafters"][drafter]
        found: dict[str, float] = {}
        for row in entry["acceptance"]["coverage"]:
            found[f"coverage@{row['m']}"] = row["all"]["value"]
            if row["low_margin"] is not None:
                found[f"low_margin_coverage@{row['m']}"] = row["low_margin"]["value"]
        for row in entry["acceptance"]["rules"]:
            found[f"certified/{row['rule']}"] = row["certified"]["value"]
        found["ece"] = entry["acceptance"]["calibration"]["ece"]
        for label, row in entry["lengths"].items():
            found[f"tau/{label}"] = row["tau"]["value"]
        for row in (self.data["bench"] or {"methods": []})["methods"]:
            if row["drafter"] == drafter:
                found[f"speedup/{row['builder']}"] = row["speedup"]["value"]
        return found


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
    tie_gap: float = 1e-3,
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
        tie_gap: nats below which a rejection counts as a numerical tie.
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
    trees = default_builders() if builders is None else labelled(builders)
    features = {name: features_for(drafter, target) for name, drafter in drafters.items()}
    texts = greedy_documents(trace, replay_documents, max_new_tokens)
    acceptance: dict[str, Acceptance] = {}
    lengths: dict[str, dict[str, Lengths]] = {}
    for number, (name, drafter) in enumerate(drafters.items()):
        progress("acceptance", number, len(drafters))
        acceptance[name] = measure_acceptance(
            drafter,
            trace,
            target=target if exact_kl else None,
            rules=rules,
            widths=WIDTHS,
            top_m=top_m,
            tie_gap=tie_gap,
            max_documents=max_documents,
            features=features[name],
        )
    tick = _ticker("replay", len(drafters) * len(texts), progress)
    for name, drafter in drafters.items():
        lengths[name] = replay_lengths(
            drafter, texts, trees, top_m=top_m, tie_gap=tie_gap, features=features[name], progress=tick
        )
    bench = None
    if target is not None:
        decoded = greedy_documents(trace, prompts, max_new_tokens)
        tick = _ticker("decode", len(decoded) * (1 + len(drafters) * len(trees)), progress)
        bench = benchmark(target, drafters, decoded, trees, top_m=top_m, tie_gap=tie_gap, progress=tick)
    return EvaluationReport(_data(drafters, trace, acceptance, lengths, bench, texts, seed))


def _ticker(stage: str, total: int, progress: Callable[[str, int, int], None]) -> Callable[[], None]:
    done = 0

    def tick() -> None:
        nonlocal done
        done += 1
        progress(stage, done, total)

    return tick


def _data(
    drafters: Mapping[str, Any],
    trace: TraceLike,
    acceptance: Mapping[str, Acceptance],
    lengths: Mapping[str, Mapping[str, Lengths]],
    bench: Benchmark | None,
    texts: Sequence[Document],
    seed: int,
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
                "acceptance": acceptance[name].summary(seed),
                "lengths": {label: found.summary(seed) for label, found in lengths[name].items()},
            }
            for name, drafter in drafters.items()
        },
        "comparisons": [
            row
            for name in drafters
            if name != first
            for row in _compare(
                name, first, acceptance[name], acceptance[first], lengths[name], lengths[first], bench, seed
            )
        ],
        "bench": None if bench is None else bench.summary(seed),
    }


def _compare(
    name: str,
    first: str,
    ours: Acceptance,
    theirs: Acceptance,
    our_lengths: Mapping[str, Lengths],
    their_lengths: Mapping[str, Lengths],
    bench: Benchmark | None,
    seed: int,
) -> list[dict[str, Any]]:
    """Paired differences and ratios against the baseline, one row per quantity."""
    pairs: dict[str, tuple[Any, Any]] = {}
    for m in WIDTHS:
        pairs[f"coverage@{m}"] = (ours.coverage_counts(m), theirs.coverage_counts(m))
        low = (ours.coverage_counts(m, True), theirs.coverage_counts(m, True))
        if low[0][1].sum():
            pairs[f"low_margin_coverage@{m}"] = low
    steps = ours.steps.sum(1)
    for c, rule in enumerate(ours.rules):
        certified = [(x.certified[:, :, c].sum(1), steps) for x in (ours, theirs)]
        pairs[f"certified/{rule}"] = (certified[0], certified[1])
    for label, found in our_lengths.items():
        pairs[f"tau/{label}"] = (found.counts(), their_lengths[label].counts())
        if bench is not None:
            speeds = [bench.methods[d, label] for d in (name, first)]
            ours_s, theirs_s = ((np.array(t.tokens), np.array(t.seconds)) for t in speeds)
            pairs[f"tokens_per_s/{label}"] = (ours_s, theirs_s)
    rows = []
    for quantity, (a, b) in pairs.items():
        row: dict[str, Any] = {"drafter": name, "baseline": first, "quantity": quantity}
        row["difference"] = vars(compare_ratios(a, b, "difference", seed=seed))
        if b[0].sum() > 0:
            row["ratio"] = vars(compare_ratios(a, b, "ratio", seed=seed))
        rows.append(row)
    return rows


def _left_out(trace: TraceLike) -> dict[str, Any]:
    """Prompts that a prompts file holds and the report does not, by reason."""
    skipped = getattr(getattr(trace, "accounting", None), "skipped", None)
    return {"left_out": {reason: skip.count for reason, skip in skipped.items()}} if skipped else {}


def _parameters(drafter: Any) -> int | None:
    parameters = getattr(drafter, "parameters", None)
    return sum(p.numel() for p in parameters()) if callable(parameters) else None
