"""`certdraft compare`: training runs and evaluation reports side by side on one page.

A folder with metrics.csv is a training run: the page shows its validation curves, best values and settings.
A folder with report.json is an evaluation: the page shows every drafter with its intervals. A warning on top
names numbers that are not about the same text.
"""

from __future__ import annotations

import csv
import json
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import yaml

from certdraft.evaluation.evaluate import SCHEMA, EvaluationReport
from certdraft.evaluation.report.figure_style import canvas, marks
from certdraft.evaluation.report.page import (
    Figure,
    Page,
    Section,
    Table,
    interval,
    number,
    refuse_folder_in_use,
    report_folder,
    write_json,
    write_page,
)
from certdraft.evaluation.report.provenance import provenance

_CURVES = {  # what is drawn, and its axis
    "val/tau_expected": "expected acceptance length τ (tokens per target pass)",
    "val/coverage@4": "share of token positions",
    "val/low_margin_coverage@4": "share of low-margin token positions",
}
_KINDS = _RUN, _REPORT = "metrics.csv", "report.json"
_TIME = re.compile(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d")
# Settings of where a run is stored, not of what it is.
_PLACES = (
    "config", "name", "runs_dir", "ckpt_path", "allow_change", "trainer.default_root_dir",
    "checkpoint.dirpath",
)  # fmt: skip


@dataclass(frozen=True)
class Run:
    """A training run as stored on disk.

    Attributes:
        label: how the page calls it.
        curves: metric → (steps, values).
        settings: dotted key → value.
    """

    label: str
    curves: Mapping[str, tuple[list[int], list[float]]]
    settings: Mapping[str, Any]

    def best(self, metric: str) -> tuple[float, int]:
        """Return the metric's best value and its step; losses and divergences are best when small."""
        steps, values = self.curves[metric]
        pick = min if metric.endswith("_nats") else max
        value = pick(values)
        return value, steps[values.index(value)]


def compare(runs: list[str], out: str | None = None, title: str = "") -> Path:
    """Put training runs and evaluation reports side by side on one self-contained page.

    Args:
        runs: folders of training runs (runs/NAME/TIME) or of `certdraft evaluate` reports, two or more.
        out: new folder for compare.html, compare.json, tables.md and figures; runs/compare/TIME if not given.
        title: title of the page.

    Returns:
        Path of the HTML page.

    Raises:
        FileNotFoundError: a folder holds neither metrics.csv nor report.json.
        ValueError: fewer than two things to compare, or a report of another schema.
        FileExistsError: `out` is in use.
    """
    folders = {kind: [Path(run) for run in runs if (Path(run) / kind).is_file()] for kind in _KINDS}
    for run in runs:
        if not any(Path(run) in found for found in folders.values()):
            raise FileNotFoundError(
                f"{run}: neither metrics.csv (a training run) nor report.json (an evaluation) is there; "
                "give folders such as runs/NAME/TIME"
            )
    trained = [read_run(f, n) for f, n in zip(folders[_RUN], labels(folders[_RUN]), strict=True)]
    read = [read_report(folder / _REPORT) for folder in folders[_REPORT]]
    reports = list(zip(labels(folders[_REPORT]), read, strict=True))
    drafters = entries(reports)
    if len(trained) + len(drafters) < 2:
        raise ValueError(f"compare needs two runs or drafters; {', '.join(runs) or 'nothing'} holds fewer")
    path = refuse_folder_in_use(out or Path("runs", "compare", f"{datetime.now():%Y-%m-%d_%H-%M-%S}"))
    summary = summary_table(trained, drafters)
    with report_folder(path) as folder:
        sections = [
            *([training_section(trained, folder)] if trained else []),
            *([settings_section(trained)] if len(trained) > 1 else []),
            *([drafter_section(drafters, folder)] if drafters else []),
        ]
        page = Page(
            title=title or "Comparison",
            lead=f"{len(trained)} training runs and {len(drafters)} evaluated drafters.",
            headline=summary,
            sections=sections,
            provenance=provenance(),
            warnings=warnings(trained, reports),
        )
        best = {r.label: {m: r.best(m)[0] for m in r.curves} for r in trained}
        content = {"schema": "certdraft.compare/1", "runs": best, "drafters": drafters}
        write_json(folder / "compare.json", content)
        name = write_page(page, folder, "compare.html").name
    print(summary.text())
    print(f"report: {path / name}", file=sys.stderr)
    return path / name


def labels(folders: Sequence[Path]) -> list[str]:
    """Short names that differ: a run's name, or as many trailing parts of each path as tell them apart.

    Examples:
        >>> labels([Path("runs/ce/2026-11-22_10-00-00"), Path("runs/kl/2026-11-22_11-00-00")])
        ['ce', 'kl']
        >>> labels([Path("runs/ce/2026-11-22_10-00-00"), Path("runs/ce/2026-11-22_11-00-00")])
        ['2026-11-22_10-00-00', '2026-11-22_11-00-00']
    """
    parts = [folder.absolute().parts for folder in folders]
    names = [p[-2] if _TIME.match(p[-1]) else p[-1] for p in parts]
    depth = 1
    while len(set(names)) < len(set(parts)):
        names, depth = ["/".join(p[-depth:]) for p in parts], depth + 1
    return names


def flatten_settings(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested settings by dotted key; an empty group is a value.

    Examples:
        >>> flatten_settings({"trainer": {"max_steps": 5, "logger": {}}})
        {'trainer.max_steps': 5, 'trainer.logger': {}}
    """
    found: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            found |= flatten_settings(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def read_run(folder: Path, label: str) -> Run:
    """Read curves and settings of a training run; raise ValueError without validation metrics."""
    found: dict[str, tuple[list[int], list[float]]] = {}
    try:
        with (folder / "metrics.csv").open(newline="", encoding="utf-8") as stream:
            for row in csv.DictReader(stream):
                for metric, value in row.items():
                    if metric and metric.startswith("val/") and value:
                        steps, values = found.setdefault(metric, ([], []))
                        steps.append(int(row["step"]) + 1)
                        values.append(float(value))
    except (ValueError, LookupError, csv.Error) as error:
        raise ValueError(f"{folder / 'metrics.csv'} is damaged ({error}); leave this run out") from error
    if not found:
        raise ValueError(
            f"{folder / 'metrics.csv'} holds no validation metric yet; train past the first validation"
        )
    config = folder / "config.yaml"
    try:
        settings = yaml.safe_load(config.read_text(encoding="utf-8")) if config.is_file() else {}
        return Run(label, found, flatten_settings(settings))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, AttributeError) as error:
        raise ValueError(f"{config} is damaged; restore it, or delete it to compare the numbers") from error


def read_report(file: Path) -> dict[str, Any]:
    """Read a report.json; raise ValueError for another schema."""
    try:
        data = json.loads(file.read_text(encoding="utf-8"))
        data.get("schema")
    except (ValueError, RecursionError, AttributeError) as error:
        raise ValueError(f"{file} is damaged; restore it, or evaluate again") from error
    if data.get("schema") != SCHEMA:
        raise ValueError(f"{file}: schema {data.get('schema')!r}, this version reads {SCHEMA!r}")
    return data


def entries(reports: Sequence[tuple[str, Mapping[str, Any]]]) -> dict[str, dict[str, Any]]:
    """Return drafter label → quantity → interval, over all reports."""
    words = {"low_margin_": "low-margin ", "tau/": "τ ", "speedup/": "speed-up "}
    found = {}
    for label, report in reports:
        for name in report["drafters"]:
            row = {}
            for quantity, value in EvaluationReport(dict(report)).intervals(name).items():
                if not quantity.startswith("certified/"):
                    for key, word in words.items():
                        quantity = quantity.replace(key, word)
                    row[quantity] = value
            found[name if len(reports) == 1 else f"{label}: {name}"] = row
    return found


def summary_table(trained: Sequence[Run], drafters: Mapping[str, Mapping[str, Any]]) -> Table:
    """The few numbers of everything: expected or replayed τ, and coverage@4."""
    metrics = ("val/tau_expected", "val/coverage@4")
    rows = [[run.label, *(number(_best(run, m)) for m in metrics), "validation"] for run in trained]
    for name, row in drafters.items():
        tau = next((value for key, value in row.items() if key.startswith("τ ")), None)
        rows.append([name, interval(tau), interval(row.get("coverage@4")), "evaluation"])
    return Table(
        caption="Acceptance length and coverage",
        columns=("", "τ", "coverage@4", "measured by"),
        rows=rows,
        note="Validation: best value of the run, τ expected of a chain along the trace. Evaluation: with "
        "95 % intervals over prompts, τ of the first decoder.",
        name="headline",
    )


def training_section(trained: Sequence[Run], folder: Path) -> Section:
    """Best values of every metric, and the curves."""
    metrics = sorted({metric for run in trained for metric in run.curves})
    rows = []
    for metric in metrics:
        cells = []
        for run in trained:
            value, step = run.best(metric) if metric in run.curves else (None, 0)
            cells.append("–" if value is None else f"{number(value, 4)} @ {step:,}")
        rows.append([metric.removeprefix("val/"), *cells])
    shown = [metric for metric in _CURVES if metric in metrics]
    path = _draw_curves(folder / "training.png", shown, trained)
    figure = Figure(
        path, "Validation along training.", "Validation metrics against optimiser steps", wide=True
    )
    columns = ("metric", *(run.label for run in trained))
    table = Table("Best value of each run, and its step", columns, rows, name="runs")
    return Section("Training", tables=(table,), figures=(figure,) if shown else ())


def settings_section(trained: Sequence[Run]) -> Section:
    """The settings that differ between runs."""
    keys = sorted({key for run in trained for key in run.settings})
    rows = []
    for key in keys:
        values = [str(run.settings.get(key, "–")) for run in trained]
        if len(set(values)) > 1 and key not in _PLACES:
            rows.append([key, *values])
    columns = ("setting", *(run.label for run in trained))
    return Section(
        "What was different",
        tables=(Table("Settings that differ", columns, rows, name="settings", text_columns=len(columns)),),
    )


def drafter_section(drafters: Mapping[str, Mapping[str, Any]], folder: Path) -> Section:
    """Every quantity of every drafter, and a figure of τ."""
    quantities = list(dict.fromkeys(quantity for row in drafters.values() for quantity in row))
    rows = [[q, *(interval(row.get(q)) for row in drafters.values())] for q in quantities]
    taus = [q for q in quantities if q.startswith("τ ")]
    path = _draw_taus(folder / "tau.png", taus, drafters)
    alt = "Acceptance length of each drafter under each decoder"
    figure = Figure(path, "Acceptance length, with 95 % intervals.", alt)
    table = Table("Evaluated drafters", ("quantity", *drafters), rows, name="drafters")
    return Section("Drafters", tables=(table,), figures=(figure,))


def warnings(trained: Sequence[Run], reports: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Return why some of these numbers may not be compared."""
    found = []
    if len({report["provenance"].get("sha-256 of trace.json") for _, report in reports}) > 1:
        found.append(
            "The evaluations used different traces: their differences are not only those of the drafters."
        )
    if len({report["provenance"].get("machine") for _, report in reports}) > 1:
        found.append("The evaluations were made on different machines: compare no speeds.")
    data = ("data.init_args.validation", "data.init_args.validation_rows")
    if any(len({str(run.settings.get(key)) for run in trained}) > 1 for key in data):
        found.append("The runs validated on different traces: their validation metrics are not comparable.")
    return found


def _best(run: Run, metric: str) -> float | None:
    return run.best(metric)[0] if metric in run.curves else None


def _draw_curves(path: Path, metrics: Sequence[str], trained: Sequence[Run]) -> Path:
    """One panel per metric, one line per run."""
    if not metrics:
        return path
    with canvas(path, 1, len(metrics), (3.6 * len(metrics), 3.4)) as axes:
        for ax, metric in zip(axes[0], metrics, strict=True):
            for number_, run in enumerate(r for r in trained if metric in r.curves):
                ax.plot(*run.curves[metric], **marks(number_), label=run.label)
            ax.set(title=metric.removeprefix("val/"), xlabel="optimiser steps", ylabel=_CURVES[metric])
            ax.set_xlim(left=0)
            ax.set_ylim(bottom=0)
        axes[0, 0].legend(loc="lower right")
    return path


def _draw_taus(path: Path, taus: Sequence[str], drafters: Mapping[str, Mapping[str, Any]]) -> Path:
    """Intervals of τ in rows: one group per decoder, one mark per drafter."""
    height = 1.0 + 0.32 * len(taus) * len(drafters)
    with canvas(path, size=(6.6, max(2.4, height))) as axes:
        ax = axes[0, 0]
        for index, (name, row) in enumerate(drafters.items()):
            style = marks(index)
            for y, quantity in enumerate(taus):
                if (found := row.get(quantity)) is not None:
                    place = y + 0.7 * ((index + 0.5) / len(drafters) - 0.5)
                    ax.plot([found["low"], found["high"]], [place, place], color=style["color"])
                    ax.plot(found["value"], place, **style)
            ax.plot([], [], **style, ls="-", label=name)
        ax.set_yticks(range(len(taus)), [quantity.removeprefix("τ ") for quantity in taus])
        ax.set(xlabel="acceptance length τ (tokens per target pass)")
        ax.set_xlim(left=0)
        ax.invert_yaxis()
        ax.grid(axis="y", visible=False)
        ax.legend(loc="upper center", bbox_to_anchor=(0.5, -0.18 if height > 3 else -0.3))
    return path
