"""The style of all figures: one meaning per colour, and every figure as PNG, SVG and PDF.

| colour | means |
|---|---|
| blue, dark and light | certified and realised acceptance |
| `SERIES` | drafters and runs, in the order of their table |
| `TIMES` | parts of a token's time |
| `CAUSES` | causes of rejection |
| `TARGET` | properties of the target |
| cividis, dark to light | an ordered parameter of a rule |

Five of `SERIES` and the dark blue are Okabe-Ito's; markers and line styles distinguish series as well.
matplotlib is imported inside, on the Agg canvas: no display is needed.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

SERIES = ("#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000", "#7F7F7F", "#8C510A", "#4B2E83")
CERTIFIED, REALISED = "#0072B2", "#A9D6F0"
TIMES = ("#D9D9D9", "#543005", "#BF812D", "#F6E8C3")
CAUSES = ("#762A83", "#C2A5CF", "#D9D9D9")
TARGET = "#4D4D4D"
LINES = ("-", "--", "-.", ":")
MARKERS = "osD^vPX*"
_STYLE: dict[Any, Any] = {
    "figure.dpi": 100,
    "savefig.dpi": 170,
    "figure.constrained_layout.use": True,
    "svg.hashsalt": "certdraft",
    "pdf.fonttype": 42,  # TrueType, as publishers ask
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
    path: Path,
    rows: int = 1,
    columns: int = 1,
    size: tuple[float, float] = (6.4, 3.9),
    vector: bool = True,
    **grid: Any,
) -> Iterator[Any]:
    """Yield the axes [rows, columns] of a figure in the house style, and save it on leaving."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=size)
        FigureCanvasAgg(figure)
        yield figure.subplots(rows, columns, squeeze=False, **grid)
        figure.savefig(path, metadata={"Software": None})
        if vector:
            figure.savefig(path.with_suffix(".svg"), metadata={"Date": None})
            figure.savefig(path.with_suffix(".pdf"), metadata={"CreationDate": None})


def shades(count: int) -> list[Any]:
    """`count` colours from dark to light for an ordered parameter."""
    from matplotlib import colormaps

    return [colormaps["cividis"](0.02 + 0.83 * i / max(count - 1, 1)) for i in range(count)]


def marks(index: int) -> dict[str, Any]:
    """Return colour and marker of the series number `index`."""
    return {"color": SERIES[index % len(SERIES)], "marker": MARKERS[index % len(MARKERS)], "ms": 5}
