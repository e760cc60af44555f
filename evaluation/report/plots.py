"""The figures of `certify` and `evaluate`, each drawn from the numbers in certify.json or report.json.

Every function writes the PNG `path`, an SVG and a PDF beside it, and returns `path`; its other arguments are
entries of the JSON. Shares of token positions begin at 0: no axis makes a small difference look large.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from certdraft.evaluation.report.figure_style import (
    CAUSES,
    CERTIFIED,
    LINES,
    REALISED,
    SERIES,
    TARGET,
    TIMES,
    canvas,
    marks,
    shades,
)


def error_sides(middle: Sequence[float], low: Sequence[float], high: Sequence[float]) -> list[list[float]]:
    """Return the two sides of error bars, never negative."""
    return [
        [max(0.0, m - v) for m, v in zip(middle, low, strict=True)],
        [max(0.0, v - m) for m, v in zip(middle, high, strict=True)],
    ]


def _stacked_bars(
    path: Path,
    labels: Sequence[str],
    parts: Sequence[tuple[str, str, Sequence[float]]],
    show: bool,
    **axis: Any,
) -> Path:
    """Draw one horizontal bar per label, stacked from (name, colour, widths); `show`: print widths from 4 on,
    else the totals."""
    with canvas(path, size=(7.2, 1.35 + 0.42 * len(labels))) as axes:
        ax = axes[0, 0]
        left = [0.0] * len(labels)
        text = {"va": "center", "fontsize": 8.5}
        for name, colour, widths in parts:
            ax.barh(range(len(labels)), widths, 0.64, left=left, color=colour, label=name)
            for y, (start, width) in enumerate(zip(left, widths, strict=True)):
                if show and width >= 4:
                    ax.annotate(f"{width:.0f} %", (start + width / 2, y), ha="center", **text)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        for y, total in enumerate([] if show else left):
            ax.annotate(f"{total:.1f}", (total, y), (4, 0), textcoords="offset points", **text)
        ax.set_yticks(range(len(labels)), labels)
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.set(xlim=(0, 100 if show else 1.1 * max(left)), **axis)
        ax.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=4, handlelength=1.2)
    return path


def greedy_mass(path: Path, p0: Mapping[str, Any], margin: Mapping[str, Any]) -> Path:
    """Histograms of the greedy token's probability p(x0) and of the margin p(x0) − p(x1)."""
    with canvas(path, 1, 2, (7.6, 3.2), sharey=True) as axes:
        for ax, data, label in (
            (axes[0, 0], p0, "probability of the greedy token  p(x₀)"),
            (axes[0, 1], margin, "margin  p(x₀) − p(x₁)"),
        ):
            edges, share = data["edges"], [100 * f for f in data["fraction"]]
            ax.bar(
                edges[:-1], share, width=edges[1] - edges[0], align="edge", color=TARGET, ec="white", lw=0.4
            )
            ax.set(xlabel=label, xlim=(0, 1))
        axes[0, 0].set_ylabel("token positions (%)")
    return path


def survival(
    path: Path,
    curves: Sequence[tuple[str, Sequence[float], Sequence[float]]],
    *,
    title: str,
    ordered: bool = True,
    ceilings: Sequence[tuple[float, str]] = ((math.log(2), "log 2"),),
) -> Path:
    """Survival curves: the share of steps whose certificate exceeds a KL budget.

    Args:
        path: PNG to write.
        curves: (label, budgets in nats, fraction of steps above each).
        title: one line.
        ordered: the curves are one family with an ordered parameter (else categories).
        ceilings: (nats, label) of universal ceilings, drawn as vertical lines.
    """
    colours = shades(len(curves)) if ordered else SERIES
    with canvas(path) as axes:
        ax = axes[0, 0]
        for i, (label, budgets, fraction) in enumerate(curves):
            ax.plot(
                budgets,
                [100 * f for f in fraction],
                color=colours[i % len(colours)],
                label=label,
                ls=LINES[i % 4] if not ordered else "-",
            )
        for x, name in ceilings:
            ax.axvline(x, color="#555555", lw=0.9, ls=(0, (2, 2)))
            ax.annotate(
                name, (x, 100), (-3, 2), textcoords="offset points", ha="right", fontsize=8, color="#555555"
            )
        right = max(x for _, budgets, _ in curves for x in budgets)
        ax.set(
            xlim=(0, right),
            ylim=(0, 103),
            xlabel="KL budget ε (nats)",
            ylabel="token positions with certificate > ε (%)",
        )
        ax.set_title(title)
        if len(curves) > 1:
            ax.legend(loc="best", handlelength=1.6)
    return path


def certified_realised(path: Path, panels: Sequence[Mapping[str, Any]]) -> Path:
    """Certified and realised acceptance by the target's margin; `panels` are those of `bucket_panel`."""
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    with canvas(path, rows, columns, (4.6 * columns, 0.5 + 2.7 * rows), sharey=True) as axes:
        flat = list(axes.flat)
        for ax, panel in zip(flat, panels, strict=False):
            x = range(len(panel["buckets"]))
            realised = [100 * (v or 0) for v in panel["realised"]]
            ends = ([100 * (v or 0) for v in panel[end]] for end in ("low", "high"))
            error = error_sides(realised, *ends)
            ax.bar(x, realised, 0.76, color=REALISED, label="realised")
            ax.bar(x, [100 * (v or 0) for v in panel["certified"]], 0.42, color=CERTIFIED, label="certified")
            ax.errorbar(
                [i + 0.3 for i in x], realised, error, fmt="none", elinewidth=1, capsize=2, ecolor="#333333"
            )
            total = max(sum(panel["steps"]), 1)
            shares = [f"{100 * n / total:.0f} %" for n in panel["steps"]]
            ticks = [f"{b}\n{share}" for b, share in zip(panel["buckets"], shares, strict=True)]
            ax.set_xticks(list(x), ticks, fontsize=8)
            ax.set(ylim=(0, 105))
            ax.grid(axis="x", visible=False)
            ax.set_title(panel["title"])
        for ax in axes[:, 0]:
            ax.set_ylabel("token positions (%)")
        for ax in axes[-1]:
            ax.set_xlabel("margin p(x₀) − p(x₁), and share of all token positions")
        for ax in flat[len(panels) :]:
            ax.axis("off")
        flat[0].legend(
            loc="upper left",
            ncols=2,
            bbox_to_anchor=(0.0, 1.0),
            handlelength=1.3,
            facecolor="white",
            framealpha=0.85,
            frameon=True,
            edgecolor="none",
        )
    return path


def coverage(path: Path, drafters: Mapping[str, Sequence[Mapping[str, Any]]]) -> Path:
    """Coverage of the greedy token by the drafter's top-m, over all and over low-margin positions."""
    panels = (("all", "all token positions"), ("low_margin", "low-margin positions (margin < 0.1)"))
    with canvas(path, 1, 2, (8.4, 3.5)) as axes:
        widths = [row["m"] for row in next(iter(drafters.values()))]
        for ax, (key, title) in zip(axes[0], panels, strict=True):
            for i, (name, rows) in enumerate(drafters.items()):
                rows = [r for r in rows if r[key] is not None]
                x = [widths.index(r["m"]) + 0.07 * (i - (len(drafters) - 1) / 2) for r in rows]
                y, low, high = ([100 * r[key][end] for r in rows] for end in ("value", "low", "high"))
                error = error_sides(y, low, high)
                ax.errorbar(x, y, error, **marks(i), capsize=2.5, elinewidth=1, label=name)
            ax.set_xticks(range(len(widths)), [str(m) for m in widths])
            ax.set(xlabel="m (drafter's most probable tokens)", title=title, ylim=(0, 102))
        axes[0, 0].set_ylabel("coverage@m (% of positions)")
        axes[0, 0].legend(loc="lower right")
    return path


def acceptance_lengths(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Acceptance length τ by drafter and tree ({"drafter", "builder", "tau"} a row), with intervals."""
    drafters = list(dict.fromkeys(r["drafter"] for r in rows))
    builders = list(dict.fromkeys(r["builder"] for r in rows))
    thick = 0.8 / len(drafters)
    with canvas(path, size=(6.6, 1.3 + 0.34 * len(rows) + 0.25 * len(builders))) as axes:
        ax = axes[0, 0]
        for row in rows:
            d, b, tau = drafters.index(row["drafter"]), builders.index(row["builder"]), row["tau"]
            y = b + (d - (len(drafters) - 1) / 2) * thick
            ax.barh(
                y,
                tau["value"],
                thick * 0.88,
                color=SERIES[d % len(SERIES)],
                label=row["drafter"] if b == builders.index(rows[0]["builder"]) else None,
                xerr=[[tau["value"] - tau["low"]], [tau["high"] - tau["value"]]],
                error_kw={"elinewidth": 1.1, "capsize": 2.5, "ecolor": "#222222"},
            )
            place = {"textcoords": "offset points", "va": "center", "fontsize": 8.5}
            ax.annotate(f"{tau['value']:.2f}", (tau["high"], y), (4, 0), **place)
        ax.axvline(1, color="#555555", lw=0.9, ls=(0, (2, 2)))
        ax.set_yticks(range(len(builders)), builders)
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.set(
            xlim=(0, 1.12 * max(r["tau"]["high"] for r in rows)),
            xlabel="acceptance length τ (tokens per target pass)",
        )
        if len(drafters) > 1:
            ax.legend(
                loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=min(len(drafters), 4), handlelength=1.2
            )
    return path


def depths(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Acceptance at each draft depth among the rounds that reach it, with Wilson intervals.

    `rows` hold "label" and "depths", a list of {"depth", "reached", "accepted"}.
    """
    from scipy.stats import binomtest

    with canvas(path) as axes:
        ax = axes[0, 0]
        for i, row in enumerate(rows):
            reached = [d for d in row["depths"] if d["reached"]]
            x = [d["depth"] + 0.05 * (i - (len(rows) - 1) / 2) for d in reached]
            tests = [binomtest(d["accepted"], d["reached"]) for d in reached]
            ends = [test.proportion_ci(method="wilson") for test in tests]
            y = [100 * test.statistic for test in tests]
            error = error_sides(y, [100 * e.low for e in ends], [100 * e.high for e in ends])
            ax.errorbar(x, y, error, **marks(i), capsize=2.5, elinewidth=1, label=row["label"])
        deepest = max((d["depth"] for r in rows for d in r["depths"] if d["reached"]), default=1)
        ax.set_xticks(range(1, deepest + 1))
        ax.set(ylim=(0, 103), xlabel="draft depth", ylabel="accepted, of rounds that reach this depth (%)")
        ax.legend(loc="best")
    return path


def calibration(path: Path, drafters: Mapping[str, Mapping[str, Any]]) -> Path:
    """Reliability of the drafter's confidence, and the share of steps at each confidence."""
    with canvas(path, 2, 1, (5.4, 5.2), sharex=True, gridspec_kw={"height_ratios": [3, 1]}) as axes:
        top, bottom = axes[0, 0], axes[1, 0]
        top.plot([0, 100], [0, 100], color="#555555", lw=0.9, ls=(0, (2, 2)))
        for i, (name, data) in enumerate(drafters.items()):
            kept = [j for j, n in enumerate(data["steps"]) if n]
            top.plot(
                [100 * data["confidence"][j] for j in kept],
                [100 * data["frequency"][j] for j in kept],
                **marks(i),
                label=f"{name} (ECE {100 * data['ece']:.1f} %)",
            )
            total = max(sum(data["steps"]), 1)
            share = [100 * n / total for n in data["steps"]]
            bottom.stairs(share, [100 * e for e in data["edges"]], color=SERIES[i % len(SERIES)], lw=1.5)
        top.set(ylabel="it was the target's greedy token (%)", ylim=(0, 102), xlim=(0, 100))
        top.legend(loc="upper left")
        bottom.set(xlabel="drafter's probability of its own first choice (%)", ylabel="token positions (%)")
    return path


def rejection_causes(path: Path, rows: Sequence[Mapping[str, Any]], top_m: int) -> Path:
    """Rejections by cause, one stacked bar a tree: the share of all positions or rounds (`row["of"]`)."""
    causes = (
        ("not_in_top_m", f"not in the drafter's top-{top_m}", CAUSES[0]),
        ("not_in_tree", f"in top-{top_m}, not in the tree", CAUSES[1]),
        ("numerical_tie", "numerical tie of the target", CAUSES[2]),
    )
    parts = [
        (label, colour, [100 * row[key] / max(row["of"], 1) for row in rows]) for key, label, colour in causes
    ]
    xlabel = "rejected, of all token positions (first choices) or rounds (trees) (%)"
    return _stacked_bars(path, [row["label"] for row in rows], parts, True, xlabel=xlabel)


def expected_accepted(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Accepted against expected draft tokens of a round: a panel per tree, a colour per drafter.

    Both axes are drawn by their square roots: most rounds expect little, and would lie on each other near 0.
    `rows` hold "drafter", "builder" and "bins", a list of {"expected", "accepted", "error"}.
    """
    drafters = list(dict.fromkeys(row["drafter"] for row in rows))
    builders = list(dict.fromkeys(row["builder"] for row in rows))
    columns = min(len(builders), 3)
    lines = -(-len(builders) // columns)
    top = 1.05 * max(p["accepted"] + 1.96 * p["error"] for row in rows for p in row["bins"])
    top = max(top, 1.05 * max(p["expected"] for row in rows for p in row["bins"]))
    ticks = [t for t in (0, 0.1, 0.25, 0.5, 1, 2, 3, 4, 6, 8, 12, 16) if t <= top]
    root = {"functions": (lambda x: np.sqrt(np.maximum(x, 0.0)), np.square)}
    size = (0.9 + 3.0 * columns, 0.9 + 3.0 * lines)
    with canvas(path, lines, columns, size, sharex=True, sharey=True) as axes:
        flat = list(axes.flat)
        for ax, builder in zip(flat, builders, strict=False):
            ax.plot([0, top], [0, top], color="#555555", lw=0.9, ls=(0, (2, 2)))
            for row in (row for row in rows if row["builder"] == builder):
                x, y = ([part[key] for part in row["bins"]] for key in ("expected", "accepted"))
                error = [1.96 * part["error"] for part in row["bins"]]
                sides = [[min(e, v) for e, v in zip(error, y, strict=True)], error]
                style = marks(drafters.index(row["drafter"]))
                ax.errorbar(x, y, sides, **style, lw=1.2, capsize=2.5, elinewidth=1, label=row["drafter"])
            ax.set_xscale("function", **root)
            ax.set_yscale("function", **root)
            ax.set(xlim=(0, top), ylim=(0, top), title=builder)
            for axis in (ax.xaxis, ax.yaxis):
                axis.set_ticks(ticks, [f"{t:g}" for t in ticks])
        for ax in flat[len(builders) :]:
            ax.axis("off")
        for ax in axes[:, 0]:
            ax.set_ylabel("accepted draft tokens of a round")
        for ax in flat[max(0, len(builders) - columns) : len(builders)]:
            ax.set_xlabel("expected draft tokens of a round")
        if len(drafters) > 1:
            flat[0].legend(loc="upper left")
    return path


def time_split(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Milliseconds a token by part ("prefill", "draft", "verify", "host" of a row), plain decoding first."""
    parts = (
        ("prefill", "prefill", TIMES[0]),
        ("draft", "drafter", TIMES[1]),
        ("verify", "target and verdict", TIMES[2]),
        ("host", "everything else", TIMES[3]),
    )
    widths = [(label, colour, [row[key] for row in rows]) for key, label, colour in parts]
    return _stacked_bars(path, [row["label"] for row in rows], widths, False, xlabel="milliseconds per token")
