"""The pictures of a report, each drawn from the numbers in `certify.json` or `report.json`.

Colours are Okabe–Ito's for things and a cut cividis for an ordered parameter: both survive colour blindness
and grey paper. Axes carry units, estimates carry their intervals. matplotlib is imported inside, on the Agg
canvas: no display is needed and `import certdraft` stays light.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

OKABE_ITO = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#7F7F7F", "#000000")
MARKERS = "osD^vPX*"
_STYLE: dict[Any, Any] = {
    "figure.dpi": 100,
    "savefig.dpi": 170,
    "figure.constrained_layout.use": True,
    "font.family": "DejaVu Sans",
    "font.size": 9.5,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.titlesize": 10,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "grid.color": "#dddddd",
    "grid.linewidth": 0.6,
    "lines.linewidth": 1.8,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "hatch.linewidth": 0.6,
}


@contextmanager
def canvas(
    path: Path, rows: int = 1, columns: int = 1, size: tuple[float, float] = (6.4, 3.9), **grid: Any
) -> Iterator[Any]:
    """A figure in the house style, saved to `path` on leaving; yields the axes [rows, columns]."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size)
        FigureCanvasAgg(figure)
        yield figure.subplots(rows, columns, squeeze=False, **grid)
        figure.savefig(path, metadata={"Software": None})


def _ordered(count: int) -> list[Any]:
    """`count` colours from dark to light for an ordered parameter."""
    from matplotlib import colormaps

    return [colormaps["cividis"](0.02 + 0.83 * i / max(count - 1, 1)) for i in range(count)]


def greedy_mass(path: Path, p0: Mapping[str, Any], margin: Mapping[str, Any]) -> Path:
    """Histograms of p(x0) and of the margin: how sure the target is, and how nearly it said something else.

    Args:
        path: PNG to write.
        p0: {"edges": [B+1], "fraction": [B]} of the greedy token's probability.
        margin: the same of p(x0) − p(x1).
    """
    with canvas(path, 1, 2, (7.6, 3.2), sharey=True) as axes:
        for ax, data, colour, label in (
            (axes[0, 0], p0, OKABE_ITO[0], "probability of the greedy token  p(x₀)"),
            (axes[0, 1], margin, OKABE_ITO[2], "margin  p(x₀) − p(x₁)"),
        ):
            edges, share = data["edges"], [100 * f for f in data["fraction"]]
            ax.bar(
                edges[:-1], share, width=edges[1] - edges[0], align="edge", color=colour, ec="white", lw=0.4
            )
            ax.set(xlabel=label, xlim=(0, 1))
        axes[0, 0].set_ylabel("steps (%)")
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
    colours = _ordered(len(curves)) if ordered else OKABE_ITO
    with canvas(path) as axes:
        ax = axes[0, 0]
        for i, (label, budgets, fraction) in enumerate(curves):
            ax.plot(
                budgets,
                [100 * f for f in fraction],
                color=colours[i % len(colours)],
                label=label,
                ls=("-", "--", "-.", ":")[i % 4] if not ordered else "-",
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
            ylabel="steps with certificate > ε (%)",
        )
        ax.set_title(title)
        if len(curves) > 1:
            ax.legend(loc="best", handlelength=1.6)
    return path


def certified_realised(path: Path, panels: Sequence[Mapping[str, Any]]) -> Path:
    """Certified and realised acceptance by the target's margin, one panel per drafter and rule.

    Args:
        path: PNG to write.
        panels: {"title", "buckets": [labels], "steps": [counts], "certified": [share], "realised": [share],
            "low", "high": ends of the realised share's interval}.
    """
    columns = min(len(panels), 2)
    rows = -(-len(panels) // columns)
    with canvas(path, rows, columns, (4.6 * columns, 0.5 + 2.7 * rows), sharey=True) as axes:
        flat = list(axes.flat)
        for ax, panel in zip(flat, panels, strict=False):
            x = range(len(panel["buckets"]))
            realised = [100 * (v or 0) for v in panel["realised"]]
            error = [
                [max(0.0, r - 100 * (lo or 0)) for r, lo in zip(realised, panel["low"], strict=True)],
                [max(0.0, 100 * (hi or 0) - r) for r, hi in zip(realised, panel["high"], strict=True)],
            ]
            ax.bar(x, realised, 0.76, color="#a9d6f0", label="realised")
            ax.bar(
                x, [100 * (v or 0) for v in panel["certified"]], 0.42, color=OKABE_ITO[0], label="certified"
            )
            ax.errorbar(
                [i + 0.3 for i in x], realised, error, fmt="none", elinewidth=1, capsize=2, ecolor="#333333"
            )
            total = max(sum(panel["steps"]), 1)
            ax.set_xticks(
                list(x),
                [
                    f"{b}\n{100 * n / total:.0f} %"
                    for b, n in zip(panel["buckets"], panel["steps"], strict=True)
                ],
                fontsize=8,
            )
            ax.set(ylim=(0, 105))
            ax.grid(axis="x", visible=False)
            ax.set_title(panel["title"])
        for ax in axes[:, 0]:
            ax.set_ylabel("steps (%)")
        for ax in axes[-1]:
            ax.set_xlabel("margin p(x₀) − p(x₁), and share of all steps")
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
    """Coverage of the greedy token by the drafter's top-m, over all steps and over low-margin steps.

    Args:
        path: PNG to write.
        drafters: name → [{"m", "all": interval, "low_margin": interval or None}].
    """
    panels = (("all", "all steps"), ("low_margin", "low-margin steps (margin < 0.1)"))
    with canvas(path, 1, 2, (8.4, 3.5)) as axes:
        widths = [row["m"] for row in next(iter(drafters.values()))]
        for ax, (key, title) in zip(axes[0], panels, strict=True):
            for i, (name, rows) in enumerate(drafters.items()):
                rows = [r for r in rows if r[key] is not None]
                x = [widths.index(r["m"]) + 0.07 * (i - (len(drafters) - 1) / 2) for r in rows]
                y = [100 * r[key]["value"] for r in rows]
                error = [
                    [100 * (r[key]["value"] - r[key]["low"]) for r in rows],
                    [100 * (r[key]["high"] - r[key]["value"]) for r in rows],
                ]
                ax.errorbar(
                    x,
                    y,
                    error,
                    color=OKABE_ITO[i % 8],
                    marker=MARKERS[i % 8],
                    ms=5,
                    capsize=2.5,
                    elinewidth=1,
                    label=name,
                )
            ax.set_xticks(range(len(widths)), [str(m) for m in widths])
            ax.set(xlabel="m (drafter's most probable tokens)", title=title)
        axes[0, 0].set_ylabel("greedy token covered (%)")
        axes[0, 0].legend(loc="lower right")
    return path


def acceptance_lengths(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Acceptance length τ by drafter and builder, with intervals over prompts.

    Args:
        path: PNG to write.
        rows: {"drafter", "builder", "tau": interval}.
    """
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
                color=OKABE_ITO[d % 8],
                label=row["drafter"] if b == builders.index(rows[0]["builder"]) else None,
                xerr=[[tau["value"] - tau["low"]], [tau["high"] - tau["value"]]],
                error_kw={"elinewidth": 1.1, "capsize": 2.5, "ecolor": "#222222"},
            )
            ax.annotate(
                f"{tau['value']:.2f}",
                (tau["high"], y),
                (4, 0),
                textcoords="offset points",
                va="center",
                fontsize=8.5,
            )
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


def wilson(hits: int, trials: int) -> tuple[float, float]:
    """95 % interval of a share, sensible at 0 and 1 and for few trials.

    Examples:
        >>> [round(end, 2) for end in wilson(2, 2)]
        [0.34, 1.0]

    Source: Wilson, "Probable Inference, the Law of Succession, and Statistical Inference", JASA 1927.
    """
    z, share = 1.96, hits / trials
    middle = (share + z * z / (2 * trials)) / (1 + z * z / trials)
    half = z / (1 + z * z / trials) * math.sqrt(share * (1 - share) / trials + (z / (2 * trials)) ** 2)
    return max(0.0, middle - half), min(1.0, middle + half)


def depths(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Acceptance at each draft depth, among the rounds that got there.

    Args:
        path: PNG to write.
        rows: {"label", "depths": [{"depth", "reached", "accepted"}]}.
    """
    with canvas(path) as axes:
        ax = axes[0, 0]
        for i, row in enumerate(rows):
            x = [d["depth"] for d in row["depths"] if d["reached"]]
            counts = [(d["accepted"], d["reached"]) for d in row["depths"] if d["reached"]]
            share = [accepted / reached for accepted, reached in counts]
            ends = [wilson(*pair) for pair in counts]
            error = [
                [max(0.0, s - low) for s, (low, _) in zip(share, ends, strict=True)],
                [max(0.0, high - s) for s, (_, high) in zip(share, ends, strict=True)],
            ]
            ax.errorbar(
                [v + 0.05 * (i - (len(rows) - 1) / 2) for v in x],
                [100 * s for s in share],
                [[100 * e for e in side] for side in error],
                color=OKABE_ITO[i % 8],
                marker=MARKERS[i % 8],
                ms=5,
                capsize=2.5,
                elinewidth=1,
                label=row["label"],
            )
        deepest = max((d["depth"] for r in rows for d in r["depths"] if d["reached"]), default=1)
        ax.set_xticks(range(1, deepest + 1))
        ax.set(ylim=(0, 103), xlabel="draft depth", ylabel="accepted, of rounds that reach this depth (%)")
        ax.legend(loc="best")
    return path


def calibration(path: Path, drafters: Mapping[str, Mapping[str, Any]]) -> Path:
    """Reliability of the drafter's confidence, and how often each confidence is voiced.

    Args:
        path: PNG to write.
        drafters: name → {"edges": [B+1], "steps": [B], "confidence": [B], "frequency": [B], "ece"}.
    """
    with canvas(path, 2, 1, (5.4, 5.2), sharex=True, gridspec_kw={"height_ratios": [3, 1]}) as axes:
        top, bottom = axes[0, 0], axes[1, 0]
        top.plot([0, 100], [0, 100], color="#555555", lw=0.9, ls=(0, (2, 2)))
        for i, (name, data) in enumerate(drafters.items()):
            kept = [j for j, n in enumerate(data["steps"]) if n]
            top.plot(
                [100 * data["confidence"][j] for j in kept],
                [100 * data["frequency"][j] for j in kept],
                color=OKABE_ITO[i % 8],
                marker=MARKERS[i % 8],
                ms=5,
                label=f"{name} (ECE {100 * data['ece']:.1f} %)",
            )
            total = max(sum(data["steps"]), 1)
            share = [100 * n / total for n in data["steps"]]
            bottom.stairs(share, [100 * e for e in data["edges"]], color=OKABE_ITO[i % 8], lw=1.5)
        top.set(ylabel="it was the target's greedy token (%)", ylim=(0, 102), xlim=(0, 100))
        top.legend(loc="upper left")
        bottom.set(xlabel="drafter's probability of its own first choice (%)", ylabel="steps (%)")
    return path


def rejection_causes(path: Path, rows: Sequence[Mapping[str, Any]], top_m: int) -> Path:
    """Rejections by cause, one stacked bar a tree: the share of all steps or rounds.

    Args:
        path: PNG to write.
        rows: {"label", "of": steps or rounds, "not_in_top_m", "not_in_tree", "numerical_tie": counts}.
        top_m: the m of the labels.
    """
    causes = (
        ("not_in_top_m", f"not in the drafter's top-{top_m}", OKABE_ITO[5]),
        ("not_in_tree", f"in top-{top_m}, not in the tree", OKABE_ITO[1]),
        ("numerical_tie", "numerical tie of the target", OKABE_ITO[6]),
    )
    with canvas(path, size=(7.2, 1.35 + 0.42 * len(rows))) as axes:
        ax = axes[0, 0]
        left = [0.0] * len(rows)
        for key, label, colour in causes:
            share = [100 * row[key] / max(row["of"], 1) for row in rows]
            ax.barh(range(len(rows)), share, 0.62, left=left, color=colour, label=label)
            for y, (start, width) in enumerate(zip(left, share, strict=True)):
                if width >= 4:
                    ax.annotate(
                        f"{width:.0f} %", (start + width / 2, y), ha="center", va="center", fontsize=8.5
                    )
            left = [a + b for a, b in zip(left, share, strict=True)]
        ax.set_yticks(range(len(rows)), [row["label"] for row in rows])
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.set(xlim=(0, 100), xlabel="rejected, of all steps (first choices) or rounds (trees)  (%)")
        ax.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=3, handlelength=1.2)
    return path
