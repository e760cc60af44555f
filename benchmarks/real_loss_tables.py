"""Every table of the loss studies on a real target, from stored results.

    python benchmarks/real_loss_tables.py     # those of docs/losses-real-target.md, between the same comments

`real_losses.py` stores the counts of a head, a prompt each, in one file; nothing is trained or replayed here.
Intervals are paired: 95 % bootstrap, prompts and seeds resampled independently of each other. Heads of
another trace count as other seeds.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from certdraft.evaluation import Table, compare_ratios

RESULTS = Path(__file__).parent / "results"
BASELINES = ("ce", "ce+kl", "top-10 ce", "lk", "spec-auf", "d-pard", "l2r", "e2e-tv")
SHOWN = {
    "ce": "hard CE",
    "ce+kl": "CE + KL",
    "ce+kl, 218 steps": "CE + KL, 218 steps",
    "top-10 ce": "CE + top-10 CE (HASS)",
    "lk": "LK",
    "spec-auf": "Spec-AUF",
    "d-pard": "D-PARD",
    "l2r": "L2R",
    "e2e-tv": "end-to-end TV",
    "l2r x4": "L2R, shares of *reached*",
    "ce+kl, reach": "CE + KL, reach",
    "ce+kl, l2r": "CE + KL, L2R weights",
    "ce+3 kl, l2r x4": "CE + 3 KL, reached",
    "ce+9 kl, verified": "CE + 9 KL, reached, depth 0.05",
    "adaptive, l2r": "adaptive, L2R weights",
    "adaptive": "adaptive sharpened KL",
    "runner-up-4+adaptive": "runner-up 4 + adaptive",
    "runner-up-4+sharp-1.5": "runner-up 4 + sharpened 1.5",
    "runner-up-8+kl, low": "runner-up 8 + KL, low margins",
    "by depth+adaptive": "by depth + adaptive, reach",
    "by depth+adaptive, depth": "by depth + adaptive, depth",
    "by depth+adaptive, low": "by depth + adaptive, reach × low margins",
    "by depth+adaptive, reach 0, low 4": "by depth + adaptive, reach (beyond 0) × low margins (boost 4)",
    "by depth+adaptive, l2r": "by depth + adaptive, L2R weights",
    "by depth+adaptive, l2r x4": "by depth + adaptive, reached",
    "by depth+3 adaptive, l2r": "by depth + 3 adaptive, L2R weights",
    "by depth+3 adaptive, l2r x4": "by depth + 3 adaptive, reached",
    "by depth+9 adaptive, l2r x4": "by depth + 9 adaptive, reached",
    "by depth+9 gaussian, l2r x4": "by depth + 9 adaptive (Gaussian), reached",
    "by depth+9 sharp-1.5, l2r x4": "by depth + 9 sharpened 1.5, reached",
    "by depth+9 sharp-1 to 3, l2r x4": "by depth + 9 sharpened 1 to 3, reached",
    "pool by depth+9 adaptive, l2r x4": "pool by depth + 9 adaptive, reached",
    "by depth+3 adaptive, focal": "by depth + 3 adaptive, shares 0.5, 2, 0.5",
    "by depth+3 adaptive, verified": "by depth + 3 adaptive, reached, depth 0.05",
    "by depth+9 adaptive, verified": "by depth + 9 adaptive, reached, depth 0.05",
    "text": "the target's text, CE + KL",
    "rounds": "own rounds, CE + KL",
    "draft-opd": "own rounds, Draft-OPD",
    "avoidable": "own rounds, Draft-OPD by KL radius",
}
"""Names of losses and their step weights, in the order of the tables; the last are of `on_policy.py`."""
NUMBERS = [
    *(("lengths", label) for label in ("chain 4", "4-ary", "best-first 8", "best-first 32")),
    *(("rates", rate) for rate in ("top-1", "coverage@4", "low-margin misses@4")),
]

WIDTHS = (1, 4, 8, 16, 64, 512, 8000)
"""Of `real_miss_ranks.py`: low-margin positions are counted whose greedy token is among so many choices."""

Stored = Mapping[str, Mapping[int, dict[str, Any]]]


def read_stored(folders: Sequence[Path]) -> Stored:
    """Counts of every head by loss and seed; seeds of a second folder, of another trace, are other seeds."""
    stored: dict[str, dict[int, dict[str, Any]]] = {}
    for number, folder in enumerate(folders):
        for file in sorted(folder.glob("*.json")):
            data = json.loads(file.read_text(encoding="utf-8"))
            stored.setdefault(data["loss"], {})[100 * number + data["seed"]] = data
    return stored


def value(stored: Stored, name: str, number: tuple[str, str], seeds: list[int] | None = None) -> float:
    """A number over all prompts and the given seeds, all of them when not given."""
    above, below = _arrays(stored, name, number, seeds or sorted(stored[name]))
    return float(above.sum() / below.sum())


def against(stored: Stored, name: str, other: str, number: tuple[str, str]) -> str:
    """Per cent by which a number differs from that of another loss, on the seeds that both have."""
    seeds = sorted(set(stored[name]) & set(stored.get(other, {})))
    if name == other or not seeds:
        return ""
    ratio = compare_ratios(
        _arrays(stored, name, number, seeds), _arrays(stored, other, number, seeds), "ratio"
    )
    middle, low, high = (f"{100 * (part - 1):+.1f}" for part in (ratio.value, ratio.low, ratio.high))
    return f" ({middle} [{low}, {high}])".replace("-", "−")


def against_best(stored: Stored, name: str, number: tuple[str, str]) -> str:
    """Per cent by which a number differs from that of the best baseline on the seeds of this loss."""
    sign = -1 if "misses" in number[1] else 1
    rivals = [b for b in BASELINES if set(stored.get(b, {})) >= set(stored[name])]
    if name in BASELINES or not rivals:
        return ""
    best = max(rivals, key=lambda b: sign * value(stored, b, number, sorted(stored[name])))
    return against(stored, name, best, number)


def table(stored: Stored, baseline: str | None = None) -> Table:
    """Every number of every loss, and its ratio to a baseline, the best one when none is given.

    Args:
        stored: as `read_stored` gives it.
        baseline: whose numbers the others are held against.
    """

    def ratio(name: str, number: tuple[str, str]) -> str:
        return against(stored, name, baseline, number) if baseline else against_best(stored, name, number)

    rows = []
    for name in [*(n for n in SHOWN if n in stored), *sorted(set(stored) - set(SHOWN))]:
        errors = [one["ece"] for one in stored[name].values()]
        cells = [f"{value(stored, name, n):.3f}{ratio(name, n)}" for n in NUMBERS]
        rows.append([SHOWN.get(name, name), str(len(errors)), *cells, f"{float(np.mean(errors)):.3f}"])
    held_against = SHOWN.get(baseline, baseline) if baseline else "the best baseline"
    columns = ["loss", "seeds", *(label for _, label in NUMBERS), "calibration error"]
    return Table(f"Test prompts; in brackets, per cent against {held_against}", columns, rows)


def validation_table(file: Path) -> Table:
    """What `fit` found on validation text, of `real_losses.py --validation`."""
    columns = ("tau_expected", "coverage@1", "coverage@4", "low_margin_coverage@4")
    stored = json.loads(file.read_text(encoding="utf-8"))["heads"]
    rows = [
        [SHOWN.get(head["loss"], head["loss"]), str(head["seed"]), *(f"{head[name]:.3f}" for name in columns)]
        for head in stored
    ]
    return Table("Validation text", ["loss", "seed", *columns], rows)


def ranks_table(file: Path) -> Table:
    """Shares of the low-margin misses@4 by the rank of the greedy token, of `real_miss_ranks.py`."""
    rows, stored = [], json.loads(file.read_text(encoding="utf-8"))
    for head in stored["heads"]:
        misses = head["positions"] - head["4"]
        beyond = [*(head["positions"] - head[str(m)] for m in WIDTHS[1:]), 0]
        shares = [f"{(more - less) / misses:.0%}" for more, less in zip(beyond, beyond[1:], strict=False)]
        rows.append(
            [SHOWN.get(head["loss"], head["loss"]), str(misses), f"{misses / head['positions']:.3f}", *shares]
        )
    bounds = [f"rank {low + 1}–{high}" for low, high in zip(WIDTHS[1:], WIDTHS[2:], strict=False)]
    columns = ["loss", "misses", "share of positions", *bounds, "not in the draft vocabulary"]
    median = f"median KL radius of coverage(4) there {stored['median_radius_nats']:.2f} nats"
    return Table(f"Low-margin misses@4 by the drafter's rank of the greedy token; {median}", columns, rows)


def seconds_table(file: Path) -> Table:
    """CPU seconds of a training step, of `loss_seconds.py`; ratios are to the first loss of each turn."""
    stored = json.loads(file.read_text(encoding="utf-8"))
    turns, first, rows = stored["seconds"], stored["losses"][0], []
    for name in stored["losses"]:
        ratios = sorted(turn[name] / turn[first] for turn in turns)
        shown = f"{float(np.median(ratios)):.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f})"
        seconds = float(np.median([turn[name] for turn in turns]))
        rows.append([SHOWN.get(name, name), f"{seconds:.2f}", "1" if name == first else shown])
    columns = ["loss", "CPU seconds a step", f"ratio to {SHOWN.get(first, first)}, its range"]
    return Table(f"A training step of 1,000 tokens, median of {len(turns)} turns", columns, rows)


@dataclass(frozen=True)
class Spec:
    """A table of the docs.

    Attributes:
        name: in the comments around it.
        folders: under `results`; several are of several traces.
        baseline: whose numbers the others are held against; the best at each number when None.
        losses: shown ones; all when empty.
        seeds: counted ones of each folder; all when empty.
    """

    name: str
    folders: tuple[str, ...]
    baseline: str | None = None
    losses: tuple[str, ...] = ()
    seeds: tuple[int, ...] = ()

    def table(self, results: Path) -> Table:
        """The table of what is stored under `results`."""
        stored = {
            loss: {seed: data for seed, data in heads.items() if not self.seeds or seed % 100 in self.seeds}
            for loss, heads in read_stored([results / folder for folder in self.folders]).items()
            if not self.losses or loss in self.losses
        }
        return table({loss: heads for loss, heads in stored.items() if heads}, self.baseline)


TABLES = (
    Spec("first trace", ("real-losses",)),
    Spec("by depth", ("real-losses-by-depth",), "ce+kl"),
    Spec("three baselines", ("real-losses-baselines",), seeds=(0,)),
    Spec(
        "baselines of others",
        ("real-losses-peers",),
        losses=(
            "ce",
            "ce+kl",
            "top-10 ce",
            "spec-auf",
            "d-pard",
            "l2r",
            "by depth+3 adaptive, l2r x4",
            "by depth+9 adaptive, l2r x4",
            "by depth+9 adaptive, verified",
        ),
    ),
    Spec("one seed", ("real-losses-peers",), seeds=(1,)),
    Spec(
        "four combinations",
        ("real-losses-peers",),
        losses=(
            "ce+kl",
            "spec-auf",
            "l2r",
            "by depth+3 adaptive, l2r x4",
            "by depth+9 adaptive, l2r x4",
            "by depth+3 adaptive, verified",
            "by depth+9 adaptive, verified",
        ),
        seeds=(0, 1),
    ),
    Spec(
        "pairs",
        ("real-losses-by-depth", "real-losses-baselines", "real-losses-peers"),
        "ce+kl",
        losses=("ce+kl", "by depth+adaptive"),
        seeds=(0, 1),
    ),
    Spec(
        "equal time",
        ("real-losses-peers",),
        "ce+kl, 218 steps",
        losses=("ce+kl, 218 steps", "by depth+9 adaptive, l2r x4"),
        seeds=(1,),
    ),
    Spec("DFlash", ("real-losses-dflash",)),
    Spec("causal", ("real-losses-causal",), "ce+kl"),
    Spec("on-policy", ("on-policy",), "text"),
)


def _arrays(
    stored: Stored, name: str, number: tuple[str, str], seeds: list[int]
) -> tuple[np.ndarray, np.ndarray]:
    """Numerator and denominator of a number, a prompt each; a row a seed where there are several."""
    kind, label = number
    both = np.array([stored[name][seed][kind][label] for seed in seeds], dtype=float)
    return (both[:, 0], both[:, 1]) if len(seeds) > 1 else (both[0, 0], both[0, 1])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    args = parser.parse_args()
    for spec in TABLES:
        shown = spec.table(args.results).markdown()
        sys.stdout.write(f"<!-- {spec.name} -->\n{shown}<!-- end {spec.name} -->\n\n")
    for pattern, of in (
        ("real-losses-validation*.json", validation_table),
        ("real-miss-ranks*.json", ranks_table),
        ("real-losses-seconds*.json", seconds_table),
    ):
        for file in sorted(args.results.glob(pattern)):
            shown = of(file).markdown()
            sys.stdout.write(f"<!-- {file.stem} -->\n{shown}<!-- end {file.stem} -->\n\n")


if __name__ == "__main__":
    main()
