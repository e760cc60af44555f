"""A report as data, its two renderings (one self-contained HTML page, Markdown tables), and its folder.

A page is a title, a headline table, then sections of tables and figures, then where the numbers come from.
Pictures are embedded and there is no script, so that the file can be mailed, archived and printed.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from certdraft.evaluation.measure.statistics import Interval
from certdraft.support import appearing_folder, write_text

_FLAT_LIST = re.compile(r"\[[-+.\deE,\s]+\]")  # strings hold no newline, so only lists of numbers span lines


@dataclass(frozen=True)
class Table:
    """A table ready to print: cells are text already.

    Attributes:
        caption: what the table holds, a sentence without its full stop.
        columns: column heads.
        rows: cells, one list per row, as long as `columns`.
        note: what a number means, one or two sentences.
        name: file stem for the Markdown copy; "" keeps the table in the page only.
        emphasis: index of a row to set in bold, or None.
        text_columns: leading columns that hold words, set flush left.
    """

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    note: str = ""
    name: str = ""
    emphasis: int | None = None
    text_columns: int = 1

    def text(self) -> str:
        """Return the table for a terminal: caption, aligned columns, no note."""
        cells = [list(map(str, row)) for row in (self.columns, *self.rows)]
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = [
            "  ".join(
                cell.ljust(width) if i < self.text_columns else cell.rjust(width)
                for i, (cell, width) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in cells
        ]
        return "\n".join([self.caption, lines[0], "-" * max(map(len, lines)), *lines[1:]])

    def markdown(self) -> str:
        """Return the table as GitHub Markdown: caption, grid, note."""
        lines = [f"**{self.caption}**", "", _markdown_row(self.columns)]
        words = self.text_columns
        lines.append(_markdown_row(["---"] * words + ["---:"] * (len(self.columns) - words)))
        lines += [_markdown_row(row) for row in self.rows]
        return "\n".join([*lines, "", self.note] if self.note else lines) + "\n"


@dataclass(frozen=True)
class Figure:
    """A PNG on disk, its caption and its alternative text; `wide` takes the full width."""

    path: Path
    caption: str
    alt: str
    wide: bool = False

    @property
    def data_uri(self) -> str:
        """The picture as a `data:` address."""
        return "data:image/png;base64," + base64.b64encode(self.path.read_bytes()).decode("ascii")


@dataclass(frozen=True)
class Section:
    """A heading with a lead, then tables, then figures."""

    title: str
    lead: str = ""
    tables: Sequence[Table] = ()
    figures: Sequence[Figure] = ()


@dataclass(frozen=True)
class Page:
    """The content of a report.

    Attributes:
        title: page title.
        lead: one or two sentences: what was measured, on what.
        tiles: the few numbers to remember: (number, what it is).
        headline: the table shown first.
        sections: the rest.
        provenance: name → value: versions, command, hashes.
        warnings: things the reader must know before believing a number.
    """

    title: str
    lead: str
    headline: Table
    sections: Sequence[Section]
    provenance: Mapping[str, str]
    tiles: Sequence[tuple[str, str]] = ()
    warnings: Sequence[str] = field(default_factory=tuple)

    def html(self) -> str:
        """Return the page as one self-contained HTML document."""
        from jinja2 import Environment, PackageLoader, StrictUndefined

        environment = Environment(
            loader=PackageLoader("certdraft.evaluation.report", "templates"),
            autoescape=True,
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        return environment.get_template("report.html.j2").render(page=self)

    def markdown(self) -> str:
        """Return all tables of the page as Markdown."""
        tables = [self.headline, *(t for s in self.sections for t in s.tables)]
        text = f"# {self.title}\n\n{self.lead}\n\n" + "\n".join(t.markdown() for t in tables)
        return re.sub(r"<(?=[A-Za-z/!])", "&lt;", text)  # names from outside cannot bring HTML along


def number(value: float | None, digits: int = 3) -> str:
    """Format a number for a table cell: fixed digits, "∞", or "–" where there is none.

    Examples:
        >>> number(0.12345), number(float("inf")), number(float("nan"))
        ('0.123', '∞', '–')
    """
    if value is None or math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:.{digits}f}".replace("-", "−")


def percent(value: float | None, digits: int = 1) -> str:
    """Format a share in [0, 1] as per cent, "–" where there is none."""
    if value is None or math.isnan(value):
        return "–"
    return number(100.0 * value, digits) + " %"


def interval(value: Interval | Mapping[str, Any] | None, digits: int = 3, scale: float = 1.0) -> str:
    """Format `value [low, high]`, scaled (100 for per cent)."""
    if value is None:
        return "–"
    found = vars(value) if isinstance(value, Interval) else value
    middle, low, high = (number(found[key] * scale, digits) for key in ("value", "low", "high"))
    return f"{middle} [{low}, {high}]"


def count(value: int) -> str:
    """Format a count with narrow spaces between groups of three digits."""
    return f"{value:,}".replace(",", "\u202f")


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in cells) + " |"


def refuse_folder_in_use(out: str | os.PathLike[str]) -> Path:
    """Return `out` as a path; raise FileExistsError if it holds something or is a file."""
    path = Path(out)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(
            f"{path}: output directory already in use; results are never overwritten: name another "
            "one with --out, or move this one away"
        )
    return path


@contextmanager
def report_folder(out: str | os.PathLike[str]) -> Iterator[Path]:
    """A temporary folder that is renamed to `out` at the end of the block, or removed on an error.

    Raises FileExistsError if `out` is in use.
    """
    path = refuse_folder_in_use(out)
    with appearing_folder(path, overwrite=path.is_dir()) as folder:
        yield folder


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write strict JSON: ±infinity becomes "inf"/"-inf", NaN null; a list of numbers is one line."""
    text = json.dumps(_strict(value), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(path, _FLAT_LIST.sub(lambda found: " ".join(found[0].split()), text) + "\n")


def _strict(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _strict(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [_strict(v) for v in value]
    if hasattr(value, "tolist"):  # numpy scalars and arrays
        return _strict(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else ("inf" if value > 0 else "-inf")
    return value


def write_page(page: Page, out: Path, html_name: str = "report.html") -> Path:
    """Write `tables.md` and the HTML page into `out`; return the path of the page."""
    write_text(out / "tables.md", page.markdown())
    path = out / html_name
    write_text(path, page.html())
    return path
