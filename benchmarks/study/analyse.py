"""Tables, paired intervals and the figure of the loss study, from the counts that `run.py` left.

    python benchmarks/study/analyse.py    # results/*.jsonl → summary.json, figure, tables of docs/losses.md

Claims are paired: two losses are compared on the same source files and the same seeds, both resampled
(crossed bootstrap). "Best baseline" is whichever of CE, CE + KL, LK and TV + CE is best at that very number
on the test text, the choice that is hardest on our own losses. Equal time: the other budget's result, moved
along the line through both budgets (in log steps) to the steps that fit into the baseline's time.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy import ndarray
from plan import BAR, LARGE, LOSSES, SHOWN, SMALL

from certdraft.evaluation.measure.statistics import compare_ratios, pooled_ratio

HERE = Path(__file__).parent
Counts = dict[str, Any]
Pair = tuple[ndarray, ndarray]  # numerator and denominator, [S, U]
LOW = 0  # margin bucket below 0.1

METRICS: dict[str, Callable[[Counts], tuple[Sequence[float], Sequence[float]]]] = {
    "coverage@1": lambda c: (np.sum(c["covered"][0], 1), np.sum(c["steps"], 1)),
    "coverage@2": lambda c: (np.sum(c["covered"][1], 1), np.sum(c["steps"], 1)),
    "coverage@4": lambda c: (np.sum(c["covered"][2], 1), np.sum(c["steps"], 1)),
    "coverage@8": lambda c: (np.sum(c["covered"][3], 1), np.sum(c["steps"], 1)),
    "low-margin misses@4": lambda c: _misses(c, 2),
    "low-margin misses@8": lambda c: _misses(c, 3),
    "certified@4": lambda c: (c["certified"][0], np.sum(c["steps"], 1)),
    "certified strict": lambda c: (c["certified"][1], np.sum(c["steps"], 1)),
} | {
    f"tau {name}": lambda c, name=name: (c["tokens"], c["passes"][name])
    for name in ("chain-4", "4-ary", "static-4-2-2-1", *(f"best-first-{b}" for b in (8, 16, 32, 64)))
}
LOWER_IS_BETTER = {"low-margin misses@4", "low-margin misses@8"}


def _misses(counts: Counts, width: int) -> tuple[ndarray, ndarray]:
    steps = np.array(counts["steps"])[:, LOW]
    return steps - np.array(counts["covered"][width])[:, LOW], steps


def read(results: Path, stage: str) -> list[dict[str, Any]]:
    """Finished cells of a stage."""
    file = results / f"{stage}.jsonl"
    return [json.loads(x) for x in file.read_text().splitlines()] if file.exists() else []


Found = dict[int, Counts]  # one loss: its counts by seed


def table(lines: list[dict[str, Any]]) -> dict[str, Found]:
    """Counts by loss and seed, losses in the plan's order."""
    return {
        loss: found
        for loss in LOSSES
        if (found := {line["seed"]: line["counts"] for line in lines if line["loss"] == loss})
    }


def pair(found: Found, metric: str, seeds: Iterable[int]) -> Pair:
    """Numerator and denominator of a metric, [S, U] each."""
    made = [METRICS[metric](found[seed]) for seed in sorted(seeds)]
    first, second = (np.array([np.asarray(m[i], float) for m in made]) for i in (0, 1))
    return first, second


def rate(found: Found, metric: str, seeds: Iterable[int] | None = None) -> float:
    """The ratio, averaged over seeds."""
    first, second = pair(found, metric, found if seeds is None else seeds)
    return float(np.mean(first.sum(-1) / second.sum(-1)))


def best_baseline(found: dict[str, Found], metric: str, seeds: Iterable[int]) -> str | None:
    """Which baseline of the bar is best at a metric, each on those of the seeds that it has."""
    sign = -1 if metric in LOWER_IS_BETTER else 1
    there = {b: set(found[b]) & set(seeds) for b in BAR if b in found}
    there = {b: common for b, common in there.items() if common}
    return max(there, key=lambda b: sign * rate(found[b], metric, there[b])) if there else None


def versus(first: Found, second: Found, metric: str) -> dict[str, Any] | None:
    """first ÷ second − 1, paired over files and seeds; None when the second is 0 in a seed."""
    seeds = set(first) & set(second)
    if not seeds or not np.all(pair(second, metric, seeds)[0].sum(-1) > 0):
        return None
    ratio = compare_ratios(pair(first, metric, seeds), pair(second, metric, seeds), "ratio", n_resamples=4000)
    ends = {"value": ratio.value - 1, "low": ratio.low - 1, "high": ratio.high - 1}
    return vars(ratio) | ends | {"seeds": len(seeds)}


def difference(first: Found, second: Found, metric: str) -> dict[str, Any]:
    """first − second, paired over files and seeds."""
    seeds = set(first) & set(second)
    both = (pair(found, metric, seeds) for found in (first, second))
    return vars(compare_ratios(*both, "difference", n_resamples=4000)) | {"seeds": len(seeds)}


def summarise(results: Path) -> dict[str, Any]:
    """Everything the docs say, as JSON."""
    train = read(results, "train")
    file = results / "timing.json"
    timing = json.loads(file.read_text()) if file.exists() else None
    groups = {
        f"{size}, {budget}": [x for x in train if (x["size"], x["budget"]) == (size, budget)]
        for size in ("1-layer", "2-layer")
        for budget in ("small", "large")
    } | {"2-layer, fine-tuned": read(results, "fine-tune")}
    tables = {name: made for name, lines in groups.items() if (made := table(lines))}
    return {
        "groups": {name: group(found) for name, found in tables.items()},
        "equal_time": equal_time(tables, timing),
        "tuning": tuning(results),
    }


def group(found: dict[str, Found]) -> dict[str, Any]:
    """Rates and comparisons of all losses in one setting."""
    losses: dict[str, Any] = {}
    for loss, counts in found.items():
        rows: dict[str, Any] = {}
        for metric in METRICS:
            row: dict[str, Any] = {"rate": vars(pooled_ratio(*pair(counts, metric, counts)))}
            best = best_baseline(found, metric, counts)
            if best is not None and loss != best:
                row |= {"best": best, "vs_best": versus(counts, found[best], metric)}
            if "ce" in found and loss != "ce":
                row["vs_ce"] = versus(counts, found["ce"], metric)
            rows[metric] = row
        fewest = best_baseline(found, "low-margin misses@4", counts)
        if fewest is not None and loss != fewest:  # what the fewest misses among the baselines cost in top-1
            rows["coverage@1"]["minus_best"] = difference(counts, found[fewest], "coverage@1")
        losses[loss] = {"seeds": sorted(counts), "metrics": rows}
    files = max(len(counts["tokens"]) for by_seed in found.values() for counts in by_seed.values())
    return {"files": files, "losses": losses}


def equal_time(tables: dict[str, Any], timing: dict[str, Any] | None) -> dict[str, Any]:
    """Relative difference to the best baseline in the time that its large budget takes."""
    made: dict[str, Any] = {}
    for size, cost in (timing or {"sizes": {}})["sizes"].items():
        small, large = (tables.get(f"{size}, {budget}", {}) for budget in ("small", "large"))
        for metric in ("low-margin misses@4", "tau best-first-32", "tau chain-4", "tau 4-ary"):
            for loss in (x for x in large if x in small):
                base = best_baseline(large, metric, large[loss])
                timed = base in cost and loss in cost
                whole = None if base == loss or not timed else versus(large[loss], large[base], metric)
                if whole is None:
                    continue
                steps = LARGE * cost[base]["least_ms"] / cost[loss]["least_ms"]
                seeds = set(large[loss]) & set(small[loss])
                at = [rate(found[loss], metric, seeds) for found in (small, large)]
                moved = at[1] + (at[1] - at[0]) * math.log(steps / LARGE) / math.log(LARGE / SMALL)
                shift = moved / at[1]
                made.setdefault(size, {}).setdefault(metric, {})[loss] = {
                    "baseline": base,
                    "steps": round(steps),
                    **{end: (1 + whole[end]) * shift - 1 for end in ("value", "low", "high")},
                }
    return made


def tuning(results: Path) -> dict[str, Any]:
    """Learning rates tried, and what the validation split said at the best."""
    made: dict[str, Any] = {}
    for line in read(results, "tune"):
        row = made.setdefault(line["size"], {}).setdefault(line["loss"], {"tried": {}})
        row["tried"][f"{line['lr']:g}"] = line["summary"]["coverage@4"]
        if line["summary"]["coverage@4"] >= max(row["tried"].values()):
            row |= {"best_lr": line["lr"], "summary": line["summary"]}
    return made


# ---- tables for the docs


def percent(interval: dict[str, Any] | None) -> str:
    """A relative difference with its interval, bold when it excludes 0."""
    if interval is None:
        return "·"
    low, value, high = (100 * interval[key] for key in ("low", "value", "high"))
    text = f"{value:+.1f} [{low:+.1f}, {high:+.1f}]"
    return f"**{text}**" if low > 0 or high < 0 else text


def result_table(group: dict[str, Any]) -> str:
    """One row a loss: rates, and differences from the best baseline."""
    rows = [
        "| loss | seeds | top-1 | coverage@4 | certified@4 | τ chain 4 | τ 4-ary | τ best-first 32 "
        "| low-margin top-4 misses, Δ % | τ best-first 32, Δ % |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for loss, row in group["losses"].items():
        metrics = row["metrics"]
        rates = [
            f"{metrics[m]['rate']['value']:.3f}"
            for m in (
                "coverage@1",
                "coverage@4",
                "certified@4",
                "tau chain-4",
                "tau 4-ary",
                "tau best-first-32",
            )
        ]
        deltas = [percent(metrics[m].get("vs_best")) for m in ("low-margin misses@4", "tau best-first-32")]
        rows.append(f"| {loss} | {len(row['seeds'])} | {' | '.join([*rates, *deltas])} |")
    return "\n".join(rows)


def tuning_table(tuned: dict[str, Any], size: str) -> str:
    """One row a loss: the best learning rate and the validation split's verdict."""
    rows = [
        "| loss | rates tried | best | top-1 | coverage@4 | low-margin coverage@4 | τ chain 4 | τ 4-ary "
        "| τ best-first 32 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    order = sorted(tuned[size].items(), key=lambda item: -item[1]["summary"]["coverage@4"])
    for loss, row in order:
        found = " | ".join(f"{row['summary'][name]:.3f}" for name in SHOWN)
        rows.append(f"| {loss} | {len(row['tried'])} | {row['best_lr']:g} | {found} |")
    return "\n".join(rows)


def write_docs(summary: dict[str, Any], page: Path) -> None:
    """Puts the tables between the page's markers; prose around them is written by hand."""
    text = page.read_text(encoding="utf-8")
    blocks = {f"study {name}": result_table(group) for name, group in summary["groups"].items()} | {
        f"study tuning {size}": tuning_table(summary["tuning"], size) for size in summary["tuning"]
    }
    for name, block in blocks.items():
        begin, end = f"<!-- {name} -->", f"<!-- end {name} -->"
        if begin in text and end in text:
            head, rest = text.split(begin, 1)
            text = f"{head}{begin}\n{block}\n{end}{rest.split(end, 1)[1]}"
    page.write_text(text, encoding="utf-8")


# ---- figure


def figure(summary: dict[str, Any], path: Path) -> None:
    """Misses and best-first τ of every loss against hard cross-entropy, with intervals."""
    from certdraft.evaluation.report.figure_style import MARKERS, SERIES, canvas

    groups = {name: group for name, group in summary["groups"].items() if "ce" in group["losses"]}
    losses = [x for x in LOSSES if x != "ce" and any(x in g["losses"] for g in groups.values())]
    if not losses:
        return
    panels = (
        ("low-margin misses@4", "low-margin top-4 misses against CE (%)\n← fewer is better"),
        ("tau best-first-32", "τ of best-first trees, 32 nodes, against CE (%)\nmore is better →"),
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    with canvas(path, 1, 2, (9.0, 1.2 + 0.42 * len(losses)), vector=False, sharey=True) as axes:
        for ax, (metric, label) in zip(axes[0], panels, strict=True):
            ax.axvline(0, color="#000000", lw=1)
            for i, (name, group) in enumerate(groups.items()):
                found = [
                    (k, group["losses"][x]["metrics"][metric]["vs_ce"])
                    for k, x in enumerate(losses)
                    if x in group["losses"]
                ]
                y = [k + 0.13 * (i - (len(groups) - 1) / 2) for k, _ in found]
                value = [100 * f["value"] for _, f in found]
                spread = [
                    [100 * (f["value"] - f["low"]) for _, f in found],
                    [100 * (f["high"] - f["value"]) for _, f in found],
                ]
                ax.errorbar(
                    value, y, xerr=spread, fmt=MARKERS[i], ms=4.5, lw=1.2, color=SERIES[i], label=name
                )
            ax.set(xlabel=label, yticks=range(len(losses)), yticklabels=losses)
        axes[0, 0].invert_yaxis()
        axes[0, 1].legend(loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=3)


def main() -> None:
    """Writes summary.json, the figure and the tables."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--results", type=Path, default=HERE / "results")
    parser.add_argument("--page", type=Path, default=HERE.parents[1] / "docs" / "losses.md")
    parser.add_argument("--figure", type=Path, default=HERE.parents[1] / "docs" / "images" / "loss-study.png")
    given = parser.parse_args()
    summary = summarise(given.results)
    machine = given.results / "machine.json"
    summary["machine"] = json.loads(machine.read_text()) if machine.exists() else None
    (given.results / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    if given.page.exists():
        write_docs(summary, given.page)
    figure(summary, given.figure)
    for name, group in summary["groups"].items():
        print(f"\n{name}\n{result_table(group)}")
    for size in summary["tuning"]:
        print(f"\ntuning, {size}\n{tuning_table(summary['tuning'], size)}")


if __name__ == "__main__":
    main()
