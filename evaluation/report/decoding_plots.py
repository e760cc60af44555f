"""The pictures of real decoding: what trees promise against what they keep, and where the time goes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from certdraft.evaluation.report.plots import MARKERS, OKABE_ITO, canvas


def promises(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Accepted against expected draft tokens of a round, one line per drafter and tree.

    Args:
        path: PNG to write.
        rows: {"drafter", "builder", "bins": [{"expected", "accepted", "error"}]}; a drafter keeps its
            colour, a tree its marker.
    """
    drafters = list(dict.fromkeys(row["drafter"] for row in rows))
    builders = list(dict.fromkeys(row["builder"] for row in rows))
    with canvas(path, size=(6.4, 4.2 + 0.1 * len(rows))) as axes:
        ax = axes[0, 0]
        for row in rows:
            d, b = drafters.index(row["drafter"]), builders.index(row["builder"])
            name = row["builder"] if len(drafters) == 1 else f"{row['drafter']}, {row['builder']}"
            ax.errorbar(
                [part["expected"] for part in row["bins"]],
                [part["accepted"] for part in row["bins"]],
                [1.96 * part["error"] for part in row["bins"]],
                color=OKABE_ITO[(b if len(drafters) == 1 else d) % 8],
                marker=MARKERS[b % 8],
                ls=("-", "--", "-.", ":")[b % 4],
                ms=5,
                capsize=2.5,
                elinewidth=1,
                label=name,
            )
        top = 1.05 * max(max(p["expected"], p["accepted"]) for row in rows for p in row["bins"])
        ax.plot([0, top], [0, top], color="#555555", lw=0.9, ls=(0, (2, 2)))
        ax.set(
            xlim=(0, top),
            ylim=(0, None),
            xlabel="expected accepted draft tokens (drafter's own probabilities)",
        )
        ax.set_ylabel("accepted draft tokens of a round")
        ax.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=2, handlelength=2.4)
    return path


def time_split(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    """Milliseconds a token by where they are spent, plain decoding first.

    Args:
        path: PNG to write.
        rows: {"label", "draft", "verify", "host", "prefill": milliseconds per token}; None where not known.
    """
    parts = (
        ("prefill", "prefill", OKABE_ITO[6]),
        ("draft", "drafter", OKABE_ITO[1]),
        ("verify", "target and verdict", OKABE_ITO[0]),
        ("host", "everything else", OKABE_ITO[2]),
    )
    with canvas(path, size=(7.2, 1.3 + 0.4 * len(rows))) as axes:
        ax = axes[0, 0]
        left = [0.0] * len(rows)
        for key, label, colour in parts:
            width = [row[key] for row in rows]
            ax.barh(range(len(rows)), width, 0.66, left=left, color=colour, label=label)
            left = [a + b for a, b in zip(left, width, strict=True)]
        for y, total in enumerate(left):
            ax.annotate(
                f"{total:.1f}", (total, y), (4, 0), textcoords="offset points", va="center", fontsize=8.5
            )
        ax.set_yticks(range(len(rows)), [row["label"] for row in rows])
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.set(xlim=(0, 1.1 * max(left)), xlabel="milliseconds per token")
        ax.legend(loc="lower center", bbox_to_anchor=(0.45, 1.0), ncols=4, handlelength=1.2)
    return path
