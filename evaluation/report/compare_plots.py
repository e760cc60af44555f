"""The pictures of a comparison: curves along training, and intervals side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from certdraft.evaluation.report.plots import MARKERS, OKABE_ITO, canvas


@dataclass(frozen=True)
class Curve:
    """One line: its name, and its points."""

    label: str
    x: Sequence[int]
    y: Sequence[float]


def curves(path: Path, panels: Mapping[str, Sequence[Curve]], xlabel: str) -> Path:
    """One panel per quantity, one line per run.

    Args:
        path: PNG to write.
        panels: quantity → its lines.
        xlabel: what the horizontal axis counts.
    """
    with canvas(path, 1, len(panels), (3.6 * len(panels), 3.4)) as axes:
        for ax, (quantity, lines) in zip(axes[0], panels.items(), strict=True):
            for number, line in enumerate(lines):
                colour, marker = OKABE_ITO[number % len(OKABE_ITO)], MARKERS[number % len(MARKERS)]
                ax.plot(line.x, line.y, color=colour, marker=marker, ms=4, label=line.label)
            ax.set(title=quantity, xlabel=xlabel)
            ax.set_xlim(left=0)
        axes[0, 0].legend(loc="lower right")
    return path


def intervals(path: Path, entries: Mapping[str, Mapping[str, Any]], xlabel: str) -> Path:
    """Intervals in rows: one group per quantity, one mark per entry.

    Args:
        path: PNG to write.
        entries: entry → quantity → {"value", "low", "high"}.
        xlabel: what is measured, with its unit.
    """
    quantities = list(dict.fromkeys(quantity for row in entries.values() for quantity in row))
    height = 1.0 + 0.32 * len(quantities) * len(entries)
    with canvas(path, size=(6.6, max(2.4, height))) as axes:
        ax = axes[0, 0]
        for number, (name, row) in enumerate(entries.items()):
            colour, marker = OKABE_ITO[number % len(OKABE_ITO)], MARKERS[number % len(MARKERS)]
            places = [q + 0.7 * ((number + 0.5) / len(entries) - 0.5) for q in range(len(quantities))]
            for place, quantity in zip(places, quantities, strict=True):
                if (found := row.get(quantity)) is not None:
                    ax.plot([found["low"], found["high"]], [place, place], color=colour)
                    ax.plot(found["value"], place, marker, color=colour, ms=6)
            ax.plot([], [], marker, color=colour, ls="-", label=name)
        ax.set_yticks(range(len(quantities)), quantities)
        ax.set(xlabel=xlabel)
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18 if height > 3 else -0.3))
    return path
