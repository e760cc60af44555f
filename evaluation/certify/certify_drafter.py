"""`certify` with a drafter: its section of the page, beside the target's own certificates.

The measurements are those of `evaluate`. Per step, with the target's text before it: is acceptance guaranteed
by the divergence, does it happen, and in which margin bucket. Per round of a tree: which cause ended it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from certdraft.evaluation.report import plots
from certdraft.evaluation.report.evaluate_report import bucket_panel, certified_tile
from certdraft.evaluation.report.evaluate_tables import cause_rows, rejection_table, rule_table, value_of
from certdraft.evaluation.report.page import Figure, Section, Table, number, percent

Data = Mapping[str, Any]
_PANELS = ("strict", "additive(t=0.1)", "multiplicative(alpha=0.5)", "coverage(m=4)")


def drafter_section(found: Data, out: Path) -> Section:
    """Tables 7 to 9 and figures 8 and 9, drawn into `out`."""
    kl, name = found["acceptance"]["kl"], found["name"]
    return Section(
        f"With the drafter {name}",
        "Certified and realised acceptance. A certified step that is rejected would be an error, and there "
        "would be no report. Steps are accepted without being certified because the certificate covers the "
        "worst drafter at this divergence. This drafter's KL from the target is "
        f"{number(kl['mean'])} nats in the mean, {number(kl['median'])} in the median, "
        f"{number(kl['p95'])} at the 95th percentile.",
        [
            replace(
                rule_table({name: found["acceptance"]}),
                caption="Table 7. Certified and accepted steps by rule (%)",
                name="table7",
            ),
            _bucket_table(found),
            replace(
                rejection_table({name: found}), caption="Table 9. Why the drafter is rejected", name="table9"
            ),
        ],
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
            plots.rejection_causes(out / "figure9-rejections.png", cause_rows(found), top_m),
            "Why the drafter is rejected, step by step and in each tree.",
            "Stacked bars of the causes of rejections",
            wide=True,
        ),
    ]


def _pair(bucket: Data) -> str:
    shares = (bucket["certified"], value_of(bucket["realised"]))
    return " / ".join(number(None if x is None else 100 * x, 0) for x in shares)
