"""The page of `evaluate`: report.json as tables, figures and warnings."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from certdraft.evaluation.evaluate import EvaluationReport
from certdraft.evaluation.report import evaluate_tables as tables
from certdraft.evaluation.report import plots
from certdraft.evaluation.report.evaluate_tables import expected_rows, short
from certdraft.evaluation.report.evaluate_tables import headline_table as headline_table
from certdraft.evaluation.report.page import Figure, Page, Section, count, number, write_json, write_page

Data = Mapping[str, Any]
_PANEL_RULES = ("strict", "coverage(m=4)")


def write_evaluation(
    report: EvaluationReport, out: Path, provenance: Mapping[str, str], title: str = ""
) -> Path:
    """Write report.json, tables.md, the figures and report.html into an empty directory.

    Args:
        report: from `evaluate`.
        out: existing directory.
        provenance: label → text, shown at the end and kept in the JSON.
        title: page title; by default it names the target.

    Returns:
        Path of the HTML page.
    """
    data = report.data
    write_json(out / "report.json", {**data, "provenance": dict(provenance)})
    figures = _figures(data, out)
    title = title or f"Drafters for {target_name(data)}"
    return write_page(_page(data, figures, provenance, title), out)


def _page(data: Data, figures: dict[str, Figure], provenance: Mapping[str, str], title: str) -> Page:
    acceptance = {name: entry["acceptance"] for name, entry in data["drafters"].items()}
    any_one = next(iter(acceptance.values()))
    bench = data["bench"]
    exact = any_one["kl"]["source"] == "exact"
    sections = [
        Section(
            "Acceptance length and speed",
            "τ is replayed on the recorded greedy texts; real decoding of fewer prompts gives the speed.",
            [tables.length_table(data), *([tables.bench_table(bench)] if bench else [])],
            [figures["lengths"], *([figures["time"]] if bench else [])],
        ),
        Section(
            "Certified and realised acceptance",
            "Dark: steps where the divergence alone guarantees acceptance. Light: steps accepted. A "
            "certified step that is rejected would be an error; there is none. The difference are steps "
            "accepted although the divergence does not guarantee it.",
            [tables.rule_table(acceptance)],
            [figures["certified"]],
        ),
        Section(
            "Coverage by width",
            "A tree of width m needs the greedy token among the drafter's m best. Near-ties are where width "
            "pays.",
            [tables.coverage_table(acceptance)],
            [figures["coverage"]],
        ),
        Section(
            "Depth and rejections",
            "Acceptance along the draft, and why rounds end: train when the token is not in the top-m, "
            "change the tree when it is but has no node, change precision when the target itself is tied.",
            [
                tables.depth_table(data),
                tables.candidates_table(data),
                tables.rejection_table(data["drafters"]),
            ],
            [figures["depths"], figures["calibration"]],
        ),
    ]
    if groups := tables.group_table(data):
        sections.insert(1, Section("Prompts by prompts file", "", [groups]))
    if "expected" in figures:
        sections.append(
            Section(
                "Expected and realised acceptance of trees",
                "A best-first tree spends its nodes by the drafter's probabilities, a cost-aware one also "
                "decides by them when to stop.",
                [tables.expected_table(data)],
                [figures["expected"]],
            )
        )
    if data["comparisons"]:
        sections.append(Section(f"Against {data['baseline']}", "", [tables.comparison_table(data)]))
    kl = (
        "KL is exact: the target's full distributions were recomputed."
        if exact
        else "The target is known by its recorded heads: divergences are of the kept tokens and the rest."
    )
    trace = {k.replace("_", " "): str(v) for k, v in data["trace"].items() if k != "left_out"}
    return Page(
        title,
        f"{any_one['steps']} held-out steps of {any_one['documents']} texts. {kl} All "
        "intervals are 95 % bootstrap intervals over texts.",
        headline_table(data),
        sections,
        {**trace, **provenance},
        _tiles(data),
        _warnings(data),
    )


def _tiles(data: Data) -> list[tuple[str, str]]:
    best_name, best_label, best = max(
        ((n, b, row["tau"]) for n, e in data["drafters"].items() for b, row in e["lengths"].items()),
        key=lambda x: x[2]["value"],
    )
    tiles = [
        (number(best["value"], 2), f"best acceptance length τ: {best_name}, {short(best_label)}"),
        certified_tile([entry["acceptance"] for entry in data["drafters"].values()]),
    ]
    bench = data["bench"]
    if bench:
        equal = sum(m["equal_texts"] for m in bench["methods"])
        total = bench["prompts"] * len(bench["methods"])
        tiles.append(
            (f"{equal} / {total}", "decoded texts equal to the target's own greedy text, token for token")
        )
        top = max(bench["methods"], key=lambda m: m["speedup"]["value"])
        label = f"best speed-up here: {top['drafter']}, {short(top['builder'])}"
        tiles.append((f"{number(top['speedup']['value'], 2)}×", label))
    return tiles


def certified_tile(acceptances: Sequence[Data]) -> tuple[str, str]:
    """How many certified steps were checked: one that is rejected stops the evaluation, so none was."""
    certified = sum(row["certified_steps"] for found in acceptances for row in found["rules"])
    return "0", f"certified steps rejected, of {count(certified)} certified (summed over rules and drafters)"


def differences(data: Data) -> tuple[str, str]:
    """Return what to say about decoded texts that differ by more than a numerical tie, and of the others.

    Empty texts where there is nothing to say.
    """
    methods = (data["bench"] or {"methods": []})["methods"]
    cases = [(m, d) for m in methods for d in m["differing"]]
    faults, ties = ([case for case in cases if case[1]["tie"] is tie] for tie in (False, True))
    found = []
    for chosen, text in (
        (faults, "Decoding is not lossless here: {} differ from the target's greedy text. Largest lead: {}."),
        (ties, "{} differ from the target's greedy text at numerical ties. Largest lead: {}."),
    ):
        if not chosen:
            found.append("")
            continue
        method, first = max(chosen, key=lambda case: case[1]["target_lead"] or 0.0)
        lead = "" if first["target_lead"] is None else (
            f", where the target leads by {first['target_lead']:.2g} nats (a numerical tie "
            f"is {first['tie_width']:.2g} or less)"
        )  # fmt: skip
        where = (
            f"{method['drafter']}, {method['builder']}, prompt {first['prompt']}, token {first['token']}: "
            f"{first['got']} instead of {first['expected']}{lead}"
        )
        found.append(text.format(f"{len(chosen)} texts" if len(chosen) > 1 else "1 text", where))
    return found[0], found[1]


def _warnings(data: Data) -> list[str]:
    found = [text for text in differences(data) if text]
    bench = data["bench"]
    if bench and (cases := bench.get("changed")):
        most = max(cases, key=lambda case: case["target_lead"] or 0.0)
        lead = "" if most["target_lead"] is None else (
            f" At the first difference the target leads by at most {most['target_lead']:.2g} nats; a "
            f"numerical tie is {most['tie_width']:.2g} or less."
        )  # fmt: skip
        why = (
            " Other kernels, batch shapes or another dtype than when the trace was recorded explain that."
            if all(case["tie"] for case in cases)
            else " More than rounding: another dtype, or not the target that the trace was recorded from."
        )
        found.append(
            f"{len(cases)} of {bench['prompts']} live greedy texts differ from the recorded ones.{lead}{why}"
        )
    for reason, number_left in data["trace"].get("left_out", {}).items():
        found.append(f"{number_left} prompts were left out: {reason}.")
    for name, entry in data["drafters"].items():
        if changed := entry["acceptance"]["greedy_changed"]:
            found.append(
                f"{name}: the recomputed greedy token differs from the recorded one at {changed} steps."
            )
    return found


def target_name(data: Data) -> str:
    """The target's name in a title."""
    name = data["trace"].get("target", "the target")
    return "the embedded target" if name == "embedded" else str(name)


def _figures(data: Data, out: Path) -> dict[str, Figure]:
    """Draw every figure the numbers allow into `out`; return them by name."""
    acceptance = {name: entry["acceptance"] for name, entry in data["drafters"].items()}
    lengths = {name: entry["lengths"] for name, entry in data["drafters"].items()}
    first = next(iter(next(iter(lengths.values()))))
    found: dict[str, Figure] = {}

    def add(key: str, file: str, draw: Any, rows: Any, caption: str, alt: str, wide: bool = True) -> None:
        found[key] = Figure(draw(out / file, rows), caption, alt, wide)

    if rows := expected_rows(data):
        add(
            "expected", "promises.png", plots.expected_accepted, rows,
            "Rounds in groups of equal size by what their tree expected; bars: 95 % of the mean; square-root "
            "axes. On the diagonal a tree's expected length can be trusted.",
            "Accepted against expected draft tokens",
        )  # fmt: skip
    if data["bench"]:
        add(
            "time", "time.png", plots.time_split, _times(data["bench"]),
            "Where a token's time goes. Plain decoding: its prefill is part of the bar.",
            "Stacked bars of milliseconds per token",
        )  # fmt: skip
    taus = [
        {"drafter": name, "builder": short(label), "tau": row["tau"]}
        for name, rows in lengths.items()
        for label, row in rows.items()
    ]
    add(
        "lengths", "acceptance-length.png", plots.acceptance_lengths, taus,
        "Acceptance length by drafter and tree, with 95 % intervals over texts.", "Bars of acceptance length",
    )  # fmt: skip
    panels = [
        bucket_panel(f"{name}: {row['rule']}", row)
        for name, entry in acceptance.items()
        for row in entry["rules"]
        if row["rule"] in _PANEL_RULES
    ]
    add(
        "certified", "certified-realised.png", plots.certified_realised, panels,
        "By the target's margin. Bars of rare buckets have wide intervals.",
        "Bars of certified and realised acceptance by margin",
    )  # fmt: skip
    add(
        "coverage", "coverage.png", plots.coverage, {n: e["coverage"] for n, e in acceptance.items()},
        "Coverage of the greedy token by width.", "Lines of coverage by width",
    )  # fmt: skip
    add(
        "depths", "depth.png", plots.depths,
        [{"label": name, "depths": rows[first]["depths"]} for name, rows in lengths.items()],
        f"Acceptance at each depth of {short(first)}, among the rounds that reach it.",
        "Lines of acceptance by depth", wide=False,
    )  # fmt: skip
    add(
        "calibration", "calibration.png", plots.calibration,
        {name: entry["calibration"] for name, entry in acceptance.items()},
        "On the diagonal a drafter's confidence can be trusted, which is what best-first trees do.",
        "Reliability diagram", wide=False,
    )  # fmt: skip
    return found


def _times(bench: Data) -> list[dict[str, Any]]:
    plain = {"label": "plain decoding", "prefill": 0.0, "draft": 0.0, "host": 0.0}
    rows = [{**plain, "verify": 1000 / bench["plain_tokens_per_s"]["value"]}]
    for m in bench["methods"]:
        whole = 1000 / m["tokens_per_s"]["value"]
        label = f"{m['drafter']}, {short(m['builder'])}"
        rows.append({"label": label, **{key: whole * share for key, share in m["share"].items()}})
    return rows


def bucket_panel(title: str, row: Data) -> dict[str, Any]:
    """Return one panel of `plots.certified_realised` from a rule's entry of report.json."""
    buckets = row["buckets"]
    realised = [b["realised"] or {"value": None, "low": None, "high": None} for b in buckets]
    return {
        "title": title,
        "buckets": [f"{b['low']:g}–{b['high']:g}" for b in buckets],
        "steps": [b["steps"] for b in buckets],
        "certified": [b["certified"] for b in buckets],
        "realised": [r["value"] for r in realised],
        "low": [r["low"] for r in realised],
        "high": [r["high"] for r in realised],
    }
