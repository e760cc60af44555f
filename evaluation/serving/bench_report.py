"""The report of a benchmark in the engine: bench.html, bench.json, bench.csv, tables.md and a figure."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from certdraft.evaluation.report.figure_style import LINES, REALISED, TARGET, canvas, marks
from certdraft.evaluation.report.page import (
    Figure,
    Page,
    Section,
    Table,
    interval,
    number,
    percent,
    write_json,
    write_page,
)
from certdraft.evaluation.report.plots import error_sides
from certdraft.support import write_text

Data = Mapping[str, Any]
_PASSED = {True: "yes", False: "NO", None: "not checked"}


def write_bench(data: Data, out: Path, provenance: Mapping[str, str], title: str = "") -> Path:
    """Write the report into `out`, bench.json last; return the path of the page.

    Args:
        data: from `summarise`, with "settings" and "servers".
        out: folder.
        provenance: name → text.
        title: of the page.
    """
    figures = []
    if any(row["speedup"] for row in data["levels"]):
        path = speedup_figure(out / "speedup.png", data)
        caption = "Speed-up and output tokens per second against the requests in flight."
        figures.append(Figure(path, caption, "Speed-up of the drafter against load", wide=True))
    page = Page(
        title or "The drafter in the engine",
        _lead(data),
        level_table(data),
        [
            Section("Load", tables=[latency_table(data)], figures=figures),
            Section("Acceptance", tables=[acceptance_table(data)]),
            Section("Checks", tables=[check_table(data)]),
        ],
        provenance,
        warnings=data["warnings"],
    )
    found = write_page(page, out, "bench.html")
    write_text(out / "bench.csv", csv_text(data))
    write_json(out / "bench.json", {**data, "provenance": dict(provenance)})
    return found


def _lead(data: Data) -> str:
    servers, settings = data["servers"], data["settings"]
    facts = servers["drafter"]
    engine = " ".join(filter(None, (facts["engine"], facts["version"])))
    return (
        f"{facts['model']} in {engine}: {settings['prompts']} prompts, greedy, up to "
        f"{settings['max_new_tokens']} tokens, {settings['repetitions']} repetitions at each load."
    )


def break_even_words(data: Data) -> str:
    """One sentence on where the drafter stops paying."""
    known = [row["requests"] for row in data["levels"] if row["speedup"]]
    if not known:
        return "There is no baseline, so nothing is said about speed-up."
    if data["break_even"] is None:
        return f"No break-even load up to {known[-1]} requests: the drafter is faster at every load measured."
    if data["break_even"] == 0:
        return f"The drafter is slower from {known[0]} requests on, the smallest load measured."
    return f"The drafter breaks even at about {data['break_even']:.1f} requests in flight."


def level_table(data: Data) -> Table:
    """One row per load: speed with and without, speed-up, τ."""
    rows = []
    for row in data["levels"]:
        plain = row["plain"]
        rows.append(
            [
                str(row["requests"]),
                number(plain["tokens_per_s"], 1) if plain else "–",
                number(row["drafter"]["tokens_per_s"], 1),
                interval(row["speedup"], 2),
                number(row["tau_engine"], 3),
                interval(row["tau"], 3),
                f"{row['texts']['equal']} / {row['texts']['prompts']}" if row["texts"] else "–",
            ]
        )
    own = data["own_loop"]
    note = (
        "Tokens/s: output tokens of all requests over wall-clock time. Speed-up: tokens per second of a "
        "request, the same prompts with and without the drafter, 95 % interval over repetitions and prompts. "
        "τ: tokens per target pass, by the engine's counters, and as streamed to the client, which leaves "
        f"out what is accepted behind the end of a text. {break_even_words(data)}"
    )
    if own is not None:
        note += f" Our loop on the same texts: τ {interval(own['tau'], 3)}."
    return Table(
        "The drafter in the engine, by requests in flight",
        ["requests", "tokens/s without", "with", "speed-up", "τ engine", "τ streamed", "equal texts"],
        rows,
        note,
        "bench",
    )


def latency_table(data: Data) -> Table:
    """Time between tokens and to the first token, by load and arm."""
    rows = []
    for row in data["levels"]:
        for arm, label in (("plain", "without"), ("drafter", "with")):
            if row[arm] is None:
                continue
            found = row[arm]
            rows.append(
                [str(row["requests"]), label]
                + [number(found["between_tokens_ms"][q], 1) for q in ("p50", "p99")]
                + [number(found["first_token_ms"][q], 1) for q in ("p50", "p99")]
                + [interval(found["request_tokens_per_s"], 1)]
            )
    return Table(
        "Latency, milliseconds",
        ["requests", "drafter", "between tokens p50", "p99", "first token p50", "p99"]
        + ["tokens/s of a request"],
        rows,
        "Between tokens: the wait for a part of the stream, shared by the tokens that it brings.",
        "latency",
        text_columns=2,
    )


def acceptance_table(data: Data) -> Table:
    """Share of rounds that accept their draft up to each position, by load, and in our loop."""
    own = data["own_loop"]
    shares = [(f"engine, {row['requests']} requests", row["accepted_by_position"]) for row in data["levels"]]
    if own is not None:
        shares.append(("our loop, same texts", own["accepted_by_position"]))
    width = max(len(values) for _, values in shares)
    return Table(
        "Rounds that accept their draft up to a position",
        ["measured by", *(str(at + 1) for at in range(width))],
        [[label, *(percent(v) for v in values), *["–"] * (width - len(values))] for label, values in shares],
        "" if width else "This engine does not count acceptance by position.",
        "acceptance",
    )


def check_table(data: Data) -> Table:
    """What was checked before the numbers are believed."""
    rows = [[check["check"], _PASSED[check["passed"]], check["says"] or "–"] for check in data["checks"]]
    return Table("Checks", ["check", "passed", "what was found"], rows, name="checks", text_columns=3)


def csv_text(data: Data) -> str:
    """One line per load and arm, for spreadsheets."""
    columns = [
        "requests", "drafter", "tokens_per_s", "request_tokens_per_s", "between_tokens_p50_ms",
        "between_tokens_p99_ms", "first_token_p50_ms", "first_token_p99_ms", "tokens", "drift", "speedup",
        "speedup_low", "speedup_high", "tau_engine", "tau_streamed", "tau_low", "tau_high",
    ]  # fmt: skip
    lines: list[Sequence[Any]] = [columns]
    for row in data["levels"]:
        for arm in ("plain", "drafter"):
            if (found := row[arm]) is None:
                continue
            with_drafter = arm == "drafter"
            lines.append(
                [
                    row["requests"],
                    "yes" if with_drafter else "no",
                    found["tokens_per_s"],
                    found["request_tokens_per_s"]["value"],
                    *(
                        found[name][q]
                        for name in ("between_tokens_ms", "first_token_ms")
                        for q in ("p50", "p99")
                    ),
                    found["tokens"],
                    found["drift"],
                    *_ends(row["speedup"] if with_drafter else None),
                    row["tau_engine"] if with_drafter else None,
                    *_ends(row["tau"] if with_drafter else None),
                ]
            )
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(lines)
    return out.getvalue()


def _ends(found: Mapping[str, Any] | None) -> list[Any]:
    return [None] * 3 if found is None else [found[key] for key in ("value", "low", "high")]


def speedup_figure(path: Path, data: Data) -> Path:
    """Draw speed-up with its interval against load, the break-even load marked, and tokens/s of both arms."""
    rows = [row for row in data["levels"] if row["speedup"]]
    loads = [row["requests"] for row in rows]
    with canvas(path, 1, 2, (8.4, 3.6)) as axes:
        left, right = axes[0]
        middle, low, high = ([row["speedup"][key] for row in rows] for key in ("value", "low", "high"))
        left.axhline(1.0, color=TARGET, lw=1, ls=LINES[1])
        if data["break_even"]:
            left.axvline(data["break_even"], color=REALISED, lw=5, zorder=0)
            late = data["break_even"] ** 2 > loads[0] * loads[-1]  # in the right half of a logarithmic axis
            left.annotate(
                f"break-even {data['break_even']:.1f}", (data["break_even"], 0.0), (-6 if late else 6, 4),
                ha="right" if late else "left", fontsize=8.5, xycoords=left.get_xaxis_transform(),
                textcoords="offset points",
            )  # fmt: skip
        left.errorbar(loads, middle, error_sides(middle, low, high), capsize=3, **marks(0))
        left.set(ylabel="speed-up with the drafter")
        for index, (arm, label) in enumerate((("drafter", "with the drafter"), ("plain", "without"))):
            speeds = [row[arm]["tokens_per_s"] for row in rows]
            right.plot(loads, speeds, label=label, ls=LINES[index], **marks(0 if arm == "drafter" else 4))
        right.set(ylabel="output tokens/s", ylim=(0, None))
        right.legend(loc="upper left")
        for ax in (left, right):
            ax.set_xscale("log", base=2)
            ax.set_xticks(loads, [str(load) for load in loads])
            ax.minorticks_off()
            ax.set(xlabel="requests in flight")
    return path
