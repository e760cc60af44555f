"""The figures about drafters, drawn from the numbers in report.json."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from certdraft.evaluation.report import plots
from certdraft.evaluation.report.decoding_plots import promises, time_split
from certdraft.evaluation.report.evaluate_tables import promise_rows, short, value_of
from certdraft.evaluation.report.page import Figure

Data = Mapping[str, Any]
_PANEL_RULES = ("strict", "coverage(m=4)")


def draw(data: Data, out: Path) -> dict[str, Figure]:
    """Every figure the numbers allow, by name, drawn into `out`."""
    drafters = data["drafters"]
    panels = [
        panel
        for name, entry in drafters.items()
        for row in entry["acceptance"]["rules"]
        if row["rule"] in _PANEL_RULES
        for panel in [_panel(name, row)]
    ]
    lengths = [
        {"drafter": n, "builder": short(b), "tau": row["tau"]}
        for n, e in drafters.items()
        for b, row in e["lengths"].items()
    ]
    first = next(iter(next(iter(drafters.values()))["lengths"]))
    found: dict[str, Figure] = {}
    if kept := promise_rows(data):
        found["promises"] = Figure(
            promises(out / "promises.png", kept),
            "Rounds in groups of equal size by what their tree expected; bars: 95 % of the mean. On the "
            "diagonal a tree's expected length can be trusted.",
            "Accepted against expected draft tokens",
        )
    if data["bench"]:
        found["time"] = Figure(
            time_split(out / "time.png", _times(data["bench"])),
            "Where a token's time goes. Plain decoding: its prefill is part of the bar.",
            "Stacked bars of milliseconds per token",
            wide=True,
        )
    depths = [{"label": n, "depths": e["lengths"][first]["depths"]} for n, e in drafters.items()]
    return found | {
        "lengths": Figure(
            plots.acceptance_lengths(out / "acceptance-length.png", lengths),
            "Acceptance length by drafter and tree, with 95 % intervals over texts.",
            "Bars of acceptance length",
            wide=True,
        ),
        "certified": Figure(
            plots.certified_realised(out / "certified-realised.png", panels),
            "By the target's margin. Bars of rare buckets have wide intervals.",
            "Bars of certified and realised acceptance by margin",
            wide=True,
        ),
        "coverage": Figure(
            plots.coverage(
                out / "coverage.png", {n: e["acceptance"]["coverage"] for n, e in drafters.items()}
            ),
            "Coverage of the greedy token by width.",
            "Lines of coverage by width",
            wide=True,
        ),
        "depths": Figure(
            plots.depths(out / "depth.png", depths),
            f"Acceptance at each depth of {short(first)}, among the rounds that got there.",
            "Lines of acceptance by depth",
        ),
        "calibration": Figure(
            plots.calibration(
                out / "calibration.png", {n: e["acceptance"]["calibration"] for n, e in drafters.items()}
            ),
            "On the diagonal a drafter's confidence can be trusted, which is what best-first trees do.",
            "Reliability diagram",
        ),
    }


def _times(bench: Data) -> list[dict[str, Any]]:
    plain = {"label": "plain decoding", "prefill": 0.0, "draft": 0.0, "host": 0.0}
    rows = [{**plain, "verify": 1000 / bench["plain_tokens_per_s"]["value"]}]
    for m in bench["methods"]:
        whole = 1000 / m["tokens_per_s"]["value"]
        label = f"{m['drafter']}, {short(m['builder'])}"
        rows.append({"label": label, **{key: whole * share for key, share in m["share"].items()}})
    return rows


def _panel(name: str, row: Data) -> dict[str, Any]:
    buckets = row["buckets"]
    return {
        "title": f"{name}: {row['rule']}",
        "buckets": [f"{b['low']:g}–{b['high']:g}" for b in buckets],
        "steps": [b["steps"] for b in buckets],
        "certified": [b["certified"] for b in buckets],
        "realised": [value_of(b["realised"]) for b in buckets],
        "low": [b["realised"]["low"] if b["realised"] else None for b in buckets],
        "high": [b["realised"]["high"] if b["realised"] else None for b in buckets],
    }
