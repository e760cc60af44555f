"""`certify` with a drafter: its section of the page, beside the target's own certificates.

The measurements are those of `evaluate`. Per step, with the target's text before it: is acceptance guaranteed
by the divergence, does it happen, and in which margin bucket. Per round of a tree: which cause ended it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from certdraft.evaluation.report import plots
from certdraft.evaluation.report.evaluate_report import bucket_panel, certified_tile
from certdraft.evaluation.report.evaluate_tables import CAUSES, UNDECIDED, cause_columns, short, value_of
from certdraft.evaluation.report.page import Figure, Section, Table, interval, number, percent

Data = Mapping[str, Any]
_PANELS = ("strict", "additive(t=0.1)", "multiplicative(alpha=0.5)", "coverage(m=4)")


def drafter_section(found: Data, out: Path) -> Section:
    """Tables 7 to 9 and figures 8 and 9, drawn into `out`."""
    kl = found["acceptance"]["kl"]
    return Section(
        f"With the drafter {found['name']}",
        "Certified and realised acceptance. A certified step that is rejected would be an error, and there "
        "would be no report. Steps are accepted without being certified because the certificate covers the "
        "worst drafter at this divergence. This drafter's KL from the target is "
        f"{number(kl['mean'])} nats in the mean, {number(kl['median'])} in the median, "
        f"{number(kl['p95'])} at the 95th percentile.",
        [_rule_table(found), _bucket_table(found), _cause_table(found)],
        _figures(found, out),
    )


def drafter_tiles(found: Data) -> list[tuple[str, str]]:
    """The numbers to remember."""
    rules = {row["rule"]: row for row in found["acceptance"]["rules"]}
    tiles = [certified_tile([found["acceptance"]])]
    if "strict" in rules:
        certified, realised = (value_of(rules["strict"][k]) for k in ("certified", "realised"))
        tiles.append(
            (
                f"{percent(certified, 0)} of {percent(realised, 0)}",
                f"steps of {found['name']} certified, of those accepted, by strict greedy",
            )
        )
    return tiles


def _rule_table(found: Data) -> Table:
    rows = []
    undecided = [row["unknown"] / found["acceptance"]["steps"] for row in found["acceptance"]["rules"]]
    for row, unknown in zip(found["acceptance"]["rules"], undecided, strict=True):
        certified, realised = value_of(row["certified"]), value_of(row["realised"])
        part = certified / realised if certified is not None and realised else None
        rows.append(
            [row["rule"], interval(row["certified"], 1, 100), interval(row["realised"], 1, 100)]
            + [percent(part, 0), percent(unknown)]
        )
    shown = 5 if any(undecided) else 4
    return Table(
        "Table 7. Certified and realised acceptance by rule (% of steps)",
        ["rule", "certified", "realised", "certified ÷ realised", "undecided"][:shown],
        [row[:shown] for row in rows],
        "Intervals: 95 %, bootstrap over texts." + (UNDECIDED if any(undecided) else ""),
        "table7",
    )


def _bucket_table(found: Data) -> Table:
    rules = found["acceptance"]["rules"]
    buckets = rules[0]["buckets"]
    total = max(sum(b["steps"] for b in buckets), 1)
    share = ["share of steps", *(percent(b["steps"] / total) for b in buckets)]
    return Table(
        "Table 8. Certified / realised acceptance by rule and margin of the target (% of steps)",
        ["rule", *(f"{b['low']:g}–{b['high']:g}" for b in buckets)],
        [share] + [[row["rule"], *(_pair(b) for b in row["buckets"])] for row in rules],
        "Margin: p(x₀) − p(x₁), a bucket holds its lower end. Near-ties cannot be certified by closeness; "
        "they can by a slack or a width.",
        "table8",
    )


def _cause_table(found: Data) -> Table:
    steps = found["acceptance"]["rejections"]
    top_m = steps["top_m"]
    n = max(steps["rejected"], 1)
    rows = [
        ["first choices", f"{steps['steps']} steps", percent(steps["rejected"] / max(steps["steps"], 1))]
        + [percent(steps[k] / n) for k in ("not_in_top_m", "in_top_m", "numerical_tie")]
    ]
    for label, row in found["lengths"].items():
        r = row["rejections"]
        rows.append(
            [short(label), f"{r['rounds']} rounds", percent(r["rejected"] / max(r["rounds"], 1))]
            + [percent(r[cause] / max(r["rejected"], 1)) for cause in CAUSES]
        )
    return Table(
        "Table 9. Why the drafter is rejected",
        ["tree", "of", "rejected", *cause_columns(top_m)],
        rows,
        "The last three columns share out the rejections. First choices: every step on its own, with the "
        "target's text before it; a tree of one node. Trees: rounds that end before the tree's full depth. "
        f"Not in top-{top_m}: train. In top-{top_m} but not in the tree: widen or reshape the tree. Tie: the "
        f"target's own token leads by at most {found['tie_gap']:g} nats, so kernels and precision decide.",
        "table9",
        text_columns=2,
    )


def _figures(found: Data, out: Path) -> list[Figure]:
    rules = {row["rule"]: row for row in found["acceptance"]["rules"]}
    panels = [bucket_panel(rule, rules[rule]) for rule in _PANELS if rule in rules]
    top_m = found["acceptance"]["rejections"]["top_m"]
    return [
        Figure(
            plots.certified_realised(out / "figure8-certified-realised.png", panels),
            "Certified (dark) and realised (light) acceptance by the target's margin, with 95 % intervals.",
            "Bars of certified and realised acceptance by margin",
            wide=True,
        ),
        Figure(
            plots.rejection_causes(out / "figure9-rejections.png", _cause_rows(found), top_m),
            "Why the drafter is rejected, step by step and in each tree.",
            "Stacked bars of the causes of rejections",
            wide=True,
        ),
    ]


def _cause_rows(found: Data) -> list[dict[str, Any]]:
    steps = found["acceptance"]["rejections"]
    first = {"not_in_top_m": steps["not_in_top_m"], "not_in_tree": steps["in_top_m"]}
    rows = [
        {"label": "first choices", **first, "numerical_tie": steps["numerical_tie"], "of": steps["steps"]}
    ]
    for label, row in found["lengths"].items():
        r = row["rejections"]
        rows.append({"label": short(label), **{c: r[c] for c in CAUSES}, "of": r["rounds"]})
    return rows


def _pair(bucket: Data) -> str:
    shares = (bucket["certified"], value_of(bucket["realised"]))
    return " / ".join(number(None if x is None else 100 * x, 0) for x in shares)
