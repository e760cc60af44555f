"""The page of `certify`: certify.json as tables in the paper's layout, survival curves, and text.

Tables and figures are numbered as in arXiv 2606.30265; those that the paper does not have follow them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from certdraft.evaluation.certify.certify import CertifyReport
from certdraft.evaluation.certify.certify_drafter import drafter_section, drafter_tiles
from certdraft.evaluation.report import plots
from certdraft.evaluation.report.evaluate_report import target_name
from certdraft.evaluation.report.page import (
    Figure,
    Page,
    Section,
    Table,
    count,
    number,
    percent,
    write_json,
    write_page,
)

Row = Mapping[str, Any]
_QUARTET = ("mean", "median", "p5", "p25")
_HEADLINE_BUDGETS = (0.01, 0.05, 0.1, 0.2, 0.3, 0.5)
_RUN_RULES = ("strict", "additive(t=0.1)", "additive(t=0.3)", "multiplicative(alpha=0.5)")


def write_certify(report: CertifyReport, out: Path, provenance: Mapping[str, str], title: str = "") -> Path:
    """Write certify.json, tables.md, the figures and certify.html into an empty directory.

    Args:
        report: from `certify`.
        out: existing directory.
        provenance: label → text, shown at the end and kept in the JSON.
        title: page title; by default it names the target.

    Returns:
        Path of the HTML page.
    """
    write_json(out / "certify.json", {**report.data, "provenance": dict(provenance)})
    figures = _figures(report.data, out)
    page = _page(
        report, figures, provenance, title or f"Acceptance certificates of {target_name(report.data)}"
    )
    found = report.data.get("drafter")
    if found:
        sections = [*page.sections, drafter_section(found, out)]
        page = replace(page, sections=sections, tiles=[*page.tiles, *drafter_tiles(found)])
    return write_page(page, out, "certify.html")


def certify_tables(report: CertifyReport) -> list[Table]:
    """Tables 1–6 in the paper's layout."""
    data = report.data
    rules = {row["rule"]: row for row in data["certificates"]}
    runs = data["runs"]
    shown = [r for r in _RUN_RULES if r in rules]
    shown += [n for n, row in rules.items() if _family(row) in ("typical", "coverage")]
    budgets = [f"ε = {b:g}" for b in runs["budgets"]]
    return [
        Table(
            "Table 1. Cumulative probability of the target's k most probable tokens",
            ["k", "mean", "median", "5th pct.", "25th pct."],
            [[str(r["k"]), *_cells(r)] for r in data["mass"]],
            "Shares in [0, 1]. How much of the target a head of k tokens holds.",
            "table1",
        ),
        Table(
            "Table 2. Exact certificate by rule (nats)",
            ["rule", "mean", "median", "5th pct.", "25th pct.", "mean, ∞ as ceiling", "nothing rejected"]
            + ["bound"],
            [
                [name, *_cells(r, p5_digits=4), number(r["mean_capped"])]
                + [percent(r["unbounded"]), percent(r["short_head"], 2)]
                for name, r in rules.items()
                if _family(r) != "topm"
            ],
            "A drafter with KL(target‖drafter) below the certificate is accepted at that step. Where no "
            "token can be rejected the certificate is infinite: such steps (“nothing rejected”) count in "
            "the percentiles, not in the first mean. “Bound”: steps whose head was too short, where the "
            "value is a lower bound.",
            "table2",
        ),
        Table(
            "Table 3. 5th percentile of the certificate by slack (nats)",
            ["additive t", "5th pct.", "multiplicative α", "5th pct. "],
            _side_by_side(
                [[f"{r['t']:g}", number(r["p5"], 4)] for r in rules.values() if _family(r) == "additive"],
                [
                    [f"{r['alpha']:g}", number(r["p5"], 4)]
                    for r in rules.values()
                    if _family(r) == "multiplicative"
                ],
            ),
            "The hardest twentieth of the steps: what a slack buys where it is needed.",
            "table3",
        ),
        _grid(rules),
        Table(
            "Table 5. Mean certified run from a random position (steps)",
            ["rule", *budgets],
            [[n, *(number(v, 2) for v in runs["rules"][n]["from_position"])] for n in shown],
            "From each counted step, how many steps in a row have a certificate above ε; 0 when the first "
            f"does not; at most {runs['cap']}; cut at the end of the text. Add 1 for the bonus token: a "
            "guaranteed acceptance length of any drafter within ε nats everywhere.",
            "table5",
        ),
        Table(
            "Table 6. Mean length of the maximal runs of certified steps (steps)",
            ["rule", *budgets],
            [[n, *(number(v, 2) for v in runs["rules"][n]["maximal"])] for n in shown],
            "The other reading of the paper's run length: certified steps ÷ unbroken runs of them; short "
            "runs weigh as much as long ones, and no run has length 0.",
            "table6",
        ),
    ]


def _grid(rules: Mapping[str, Row]) -> Table:
    cells = {(r["m"], r["t"]): r["p5"] for r in rules.values() if _family(r) == "topm"}
    ranks, slacks = sorted({m for m, _ in cells}), sorted({t for _, t in cells})
    return Table(
        "Table 4. 5th percentile of the top-m additive certificate (nats)",
        ["t", *(f"m = {m}" for m in ranks)],
        [[f"{t:g}", *(number(cells.get((m, t)), 4) for m in ranks)] for t in slacks],
        "A token passes when it is above p(x₀) − t and more probable than the target's m-th token.",
        "table4",
    )


def headline_of_certificates(report: CertifyReport) -> Table:
    """Return the share of steps certified at a few KL budgets, by rule."""
    budgets = [b for b in _HEADLINE_BUDGETS if b in report.data["survival"]["budgets"]]
    wanted = ("strict", "additive", "multiplicative", "typical", "coverage")
    typical_slack = {"additive": 0.1, "multiplicative": 0.5}
    rows = []
    for row in report.data["certificates"]:
        family = _family(row)
        value = row.get("t", row.get("alpha"))
        if family in wanted and typical_slack.get(family, value) == value:
            rows.append([row["rule"], *(percent(_above(report.data, row["rule"], b)) for b in budgets)])
    return Table(
        "Steps at which a drafter within ε nats of the target cannot be rejected",
        ["rule", *(f"ε = {b:g}" for b in budgets)],
        rows,
        "Read a row from left to right: the worse the drafter, the fewer steps are guaranteed. coverage(m) "
        "needs the target's greedy token among the drafter's m best: what a tree of width m needs.",
        emphasis=0,
    )


def _page(
    report: CertifyReport, figures: dict[str, Figure], provenance: Mapping[str, str], title: str
) -> Page:
    data = report.data
    trace = data["trace"]
    tables = certify_tables(report)
    warnings = []
    short = [(r["rule"], r["short_head"]) for r in data["certificates"] if r["short_head"] > 0.01]
    if short:
        worst = max(short, key=lambda x: x[1])
        warnings.append(
            f"The head of {trace['kept']} tokens is too short for some steps of {len(short)} rules (worst: "
            f"{worst[0]}, {percent(worst[1])} of steps). There the certificate is a sound lower bound, so "
            "means and percentiles err on the safe side. A longer head makes them exact."
        )
    median = report.rule("strict")["median"]
    below = data["margin"]["below"]["0.1"]
    tiles = [
        (count(trace["counted_steps"]), "target steps measured"),
        (
            percent(below),
            "of them have a margin p(x₀) − p(x₁) below 0.1: near-ties that only width can cover",
        ),
        (f"{number(median)} nats", "median certificate of strict greedy: half the steps survive this KL"),
    ]
    widths = [r for r in data["certificates"] if _family(r) == "coverage"]
    if widths:
        widest = widths[-1]
        label = f"median certificate of coverage(m={widest['m']}): what a tree of width {widest['m']} adds"
        tiles.append((f"{number(widest['median'])} nats", label))
    return Page(
        title,
        f"{trace['counted_steps']} steps of {trace['rows']} greedy texts of the target. A certificate is the "
        "KL divergence, in nats, below which a drafter's proposal cannot be rejected at that step, whatever "
        "the drafter is." + ("" if "drafter" in data else " No drafter was involved."),
        headline_of_certificates(report),
        [
            Section(
                "The target's own certainty",
                "Where the greedy token leads by little, no affordable drafter is certain to name it first.",
                tables[:1],
                [figures["greedy_mass"]],
            ),
            Section(
                "Certificates by rule",
                "Each curve falls from all steps at ε = 0; the cliff at log 2 is the ceiling of every rule "
                "that judges one token, log(m+1) that of a tree of width m.",
                tables[1:4],
                [
                    figures[k]
                    for k in ("strict", "additive", "multiplicative", "coverage", "topm", "typical")
                    if k in figures
                ],
            ),
            Section(
                "Certified runs",
                "How far a drafter that stays within ε nats at every step is guaranteed to get.",
                tables[4:],
            ),
        ],
        {**{k.replace("_", " "): str(v) for k, v in trace.items()}, **provenance},
        tiles,
        warnings,
    )


def _figures(data: Mapping[str, Any], out: Path) -> dict[str, Figure]:
    """Figures 1–5 of the paper, then the top-m and typical rules."""
    figures = {
        "greedy_mass": Figure(
            plots.greedy_mass(out / "figure1-greedy-mass.png", data["p0"], data["margin"]),
            "Probability of the greedy token, and its lead over the runner-up.",
            "Two histograms over steps",
            wide=True,
        )
    }
    strict = [r for r in data["certificates"] if r["rule"] == "strict"]

    by = _families(data)
    log2, one = ((math.log(2), "log 2"),), _curve(data, 1.08 * math.log(2))
    widths = [r["m"] for r in by["coverage"]]
    logs = [(math.log(1 + m), f"log {1 + m}") for m in [1, *widths]]
    wide = _curve(data, 1.02 * math.log(1 + max(widths, default=1)))
    slack = max((r["t"] for r in by["topm"] if r["t"] <= 0.1), default=None)
    top_m = [r for r in by["topm"] if r["t"] == slack]
    drawn: list[tuple[str, str, list[Row], Callable[[Row], str], str, str]] = [
        (
            "strict", "figure2-strict.png", strict, lambda r: "strict greedy", "Strict greedy",
            "Share of steps at which a drafter within ε nats must name the greedy token.",
        ),
        (
            "additive", "figure3-additive.png", by["additive"], lambda r: f"t = {r['t']:g}",
            "Additive slack t",
            "Accept when p(y) > p(x₀) − t. Slack lifts the hard steps; the easy ones are at the ceiling "
            "anyway. What is left beyond log 2 are steps where nothing can be rejected.",
        ),
        (
            "multiplicative", "figure4-multiplicative.png", by["multiplicative"],
            lambda r: f"α = {r['alpha']:g}", "Multiplicative slack α", "Accept when p(y) > α p(x₀).",
        ),
        (
            "coverage", "figure5-tree.png", [*strict, *by["coverage"]], lambda r: f"m = {r.get('m', 1)}",
            "Tree of width m",
            "Greedy token among the drafter's m best. Each width has its own ceiling, log(m+1).",
        ),
        (
            "topm", "figure6-topm.png", top_m, lambda r: f"m = {r['m']}",
            f"Top-m with additive slack t = {slack}",
            "Additive slack, but only for the target's best m − 1 tokens; m = 2 is strict greedy.",
        ),
        (
            "typical", "figure7-typical.png", by["typical"],
            lambda r: f"ε₀ = {r['epsilon']:g}, δ₀ = {r['delta']:g}", "Typical acceptance",
            "Accept when p(y) > min(ε₀, δ₀ exp(−H(p))): the paper's constants, then the published decoder's.",
        ),
    ]  # fmt: skip
    for key, file, rows, label, title, caption in drawn:
        if rows:
            ceilings, curve = (logs, wide) if key == "coverage" else (log2, one)
            curves = [(label(r), *curve(r["rule"])) for r in rows]
            path = plots.survival(
                out / file, curves, title=title, ordered=key != "typical", ceilings=ceilings
            )
            figures[key] = Figure(path, caption, f"Survival curves: {title}")
    return figures


def _curve(data: Mapping[str, Any], limit: float) -> Callable[[str], tuple[list[float], list[float]]]:
    budgets = [b for b in data["survival"]["budgets"] if b <= limit]
    return lambda rule: (budgets, list(data["survival"]["fraction"][rule])[: len(budgets)])


def _above(data: Mapping[str, Any], rule: str, budget: float) -> float:
    return float(data["survival"]["fraction"][rule][data["survival"]["budgets"].index(budget)])


def _family(row: Row) -> str:
    return str(row["rule"]).split("(")[0]


def _families(data: Mapping[str, Any]) -> dict[str, list[Row]]:
    names = ("additive", "multiplicative", "topm", "typical", "coverage")
    return {n: [r for r in data["certificates"] if _family(r) == n] for n in names}


def _cells(row: Row, p5_digits: int = 3) -> list[str]:
    return [number(row[k], p5_digits if k == "p5" else 3) for k in _QUARTET]


def _side_by_side(left: list[list[str]], right: list[list[str]]) -> list[list[str]]:
    blank = ["", ""]
    size = max(len(left), len(right))
    return [
        (left[i] if i < len(left) else blank) + (right[i] if i < len(right) else blank) for i in range(size)
    ]
