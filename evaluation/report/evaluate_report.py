"""From report.json to one page about drafters, its tables and its figures."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from certdraft.evaluation.evaluate import EvaluationReport
from certdraft.evaluation.report import evaluate_tables as tables
from certdraft.evaluation.report.evaluate_figures import draw
from certdraft.evaluation.report.evaluate_tables import headline_table as headline_table
from certdraft.evaluation.report.evaluate_tables import short as short
from certdraft.evaluation.report.page import Figure, Page, Section, number, write_json, write_page

Data = Mapping[str, Any]


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
    figures = draw(data, out)
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
            "certified step that is not accepted would be an error; there is none. What the dark bar misses "
            "is luck, or a divergence spent where it does not matter.",
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
            "How acceptance holds up along the draft, and why rounds end: train when the token is not in "
            "the top-m, change the tree when it is but no node was spent on it, change precision when the "
            "target itself is tied.",
            [tables.depth_table(data), tables.rejection_table(data)],
            [figures["depths"], figures["calibration"]],
        ),
    ]
    if groups := tables.group_table(data):
        sections.insert(1, Section("Prompts by prompts file", "", [groups]))
    if "promises" in figures:
        sections.append(
            Section(
                "What trees expect, and get",
                "A best-first tree spends its nodes by the drafter's probabilities, a cost-aware one also "
                "decides by them when to stop.",
                [tables.promise_table(data)],
                [figures["promises"]],
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
    checks = sum(e["acceptance"]["steps"] * len(e["acceptance"]["rules"]) for e in data["drafters"].values())
    tiles = [
        (number(best["value"], 2), f"best acceptance length τ: {best_name}, {short(best_label)}"),
        ("0", "certified steps rejected, of " + f"{checks:,} checked".replace(",", "\u202f")),
    ]
    bench = data["bench"]
    if bench:
        equal = sum(m["equal_texts"] for m in bench["methods"])
        total = bench["prompts"] * len(bench["methods"])
        tiles.append(
            (f"{equal} / {total}", "decoded texts equal to the target's own greedy text, token for token")
        )
        top = max(bench["methods"], key=lambda m: m["speedup"]["value"])
        tiles.append(
            (
                f"{number(top['speedup']['value'], 2)}×",
                f"best speed-up here: {top['drafter']}, {short(top['builder'])}",
            )
        )
    return tiles


def _warnings(data: Data) -> list[str]:
    found = []
    bench = data["bench"]
    if bench and not bench["lossless"]:
        cases = [(m, d) for m in bench["methods"] for d in m["differing"]]
        method, first = cases[0]
        lead = first["target_lead"]
        found.append(
            f"Decoding is not lossless here: {len(cases)} texts differ from the target's greedy text. First: "
            f"{method['drafter']}, {method['builder']}, prompt {first['prompt']}, token {first['token']}: "
            f"{first['got']} instead of {first['expected']}"
            + ("" if lead is None else f", where the target leads by {lead:.2g} nats")
            + ". Leads below 1e-3 in float32 (0.1 in bfloat16) are numerical ties; larger ones are a fault."
        )
    if bench and bench["changed_texts"]:
        found.append(
            f"{bench['changed_texts']} of {bench['prompts']} live greedy texts differ from the recorded "
            "ones. A few: the target runs in another dtype or with other kernels than when the trace was "
            "made. Most: this is not the target the trace was recorded from, and the trace's numbers are not "
            "about it."
        )
    for reason, count in data["trace"].get("left_out", {}).items():
        found.append(f"{count} prompts were left out: {reason}.")
    for name, entry in data["drafters"].items():
        changed = entry["acceptance"]["greedy_changed"]
        if changed:
            found.append(
                f"{name}: the recomputed greedy token differs from the recorded one at {changed} steps."
            )
    return found


def target_name(data: Data) -> str:
    """What to call the target in a title."""
    name = data["trace"].get("target", "the target")
    return "the embedded target" if name == "embedded" else str(name)
