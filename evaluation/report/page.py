"""A report as data, and its two renderings: one self-contained HTML page, and Markdown tables.

A page is a title, a headline table, then sections of tables and figures, then where the numbers come from.
Nothing is fetched and nothing runs: pictures are embedded, there is no script, so the file can be mailed,
archived and printed.
"""

from __future__ import annotations

import base64
import json
import math
import os
import re
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from certdraft.evaluation.measure.statistics import Interval

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

    def markdown(self) -> str:
        """The table as GitHub Markdown: caption, grid, note."""
        lines = [f"**{self.caption}**", "", _markdown_row(self.columns)]
        words = self.text_columns
        lines.append(_markdown_row(["---"] * words + ["---:"] * (len(self.columns) - words)))
        lines += [_markdown_row(row) for row in self.rows]
        return "\n".join([*lines, "", self.note] if self.note else lines) + "\n"

    def text(self) -> str:
        """The table for a terminal: caption, and one line per row with columns aligned."""
        columns = [[str(cell) for cell in column] for column in zip(self.columns, *self.rows, strict=True)]
        for index, cells in enumerate(columns):
            width = max(map(len, cells))
            left = index < self.text_columns
            columns[index] = [cell.ljust(width) if left else cell.rjust(width) for cell in cells]
        return "\n".join([self.caption, *("  ".join(row) for row in zip(*columns, strict=True))])


@dataclass(frozen=True)
class Figure:
    """A PNG on disk, its caption, the text for those who cannot see it; `wide` takes the full width."""

    path: Path
    caption: str
    alt: str
    wide: bool = False

    @property
    def data_uri(self) -> str:
        """The picture itself as a `data:` address."""
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
    """Everything a report shows.

    Attributes:
        title: page title.
        lead: one or two sentences: what was measured, on what.
        tiles: the few numbers to remember: (number, what it is).
        headline: the table a reader wants first.
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
        """The page as one self-contained HTML document."""
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
        """All tables of the page, for people who paste."""
        tables = [self.headline, *(t for s in self.sections for t in s.tables)]
        return f"# {self.title}\n\n{self.lead}\n\n" + "\n".join(t.markdown() for t in tables)


def number(value: float | None, digits: int = 3) -> str:
    """A number for a table cell: fixed digits, "∞", or "–" where there is none.

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
    """A share in [0, 1] as per cent, "–" where there is none."""
    return number(None if value is None else 100.0 * value, digits) + ("" if _empty(value) else " %")


def interval(value: Interval | Mapping[str, Any] | None, digits: int = 3, scale: float = 1.0) -> str:
    """`value [low, high]`, scaled (100 for per cent)."""
    if value is None:
        return "–"
    v, low, high = (
        (value.value, value.low, value.high)
        if isinstance(value, Interval)
        else (
            value["value"],
            value["low"],
            value["high"],
        )
    )
    return f"{number(v * scale, digits)} [{number(low * scale, digits)}, {number(high * scale, digits)}]"


def _empty(value: float | None) -> bool:
    return value is None or math.isnan(value)


def _markdown_row(cells: Sequence[str]) -> str:
    return "| " + " | ".join(str(c).replace("|", "\\|").replace("\n", " ") for c in cells) + " |"


def claim_directory(out: str | os.PathLike[str]) -> Path:
    """Create an output directory, refusing one in use.

    Raises:
        FileExistsError: the directory exists and holds something, or is a file.
    """
    path = Path(out)
    if path.is_file() or (path.is_dir() and any(path.iterdir())):
        raise FileExistsError(
            f"{path}: output directory already in use; results are never overwritten: name another "
            "one with --out, or move this one away"
        )
    path.mkdir(parents=True, exist_ok=True)
    return path


def write_atomic(path: Path, text: str) -> None:
    """Write a UTF-8 text file whole or not at all: temporary name, fsync, rename."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write strict JSON: ±infinity becomes "inf"/"-inf", NaN null; a list of numbers is one line."""
    text = json.dumps(_strict(value), indent=1, ensure_ascii=False, allow_nan=False)
    write_atomic(path, _FLAT_LIST.sub(lambda found: " ".join(found[0].split()), text) + "\n")


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
    """Write `tables.md` and the HTML page into `out`.

    Returns:
        Path of the HTML file.
    """
    write_atomic(out / "tables.md", page.markdown())
    path = out / html_name
    write_atomic(path, page.html())
    return path
