"""What a training step costs with each loss: the exchange rate between equal steps and equal time.

    python benchmarks/study/timing.py        # under a minute; writes results/timing.json

One batch, one drafter of each size; losses take turns, so that whatever else the machine does hits all of
them alike. CPU seconds (process time), the least and the median of the repeats; ratios to hard cross-entropy.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cells
import torch
from plan import LOSSES, SIZES

from certdraft.data import load_target
from certdraft.losses import Chunked


def main() -> None:
    """Times all losses in both sizes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--trace", type=Path, default=Path(__file__).parents[2] / "runs/study/traces/train")
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), help="only these, and ce")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "timing.json")
    given = parser.parse_args()
    torch.set_num_threads(1)
    names = ["ce", *(loss for loss in given.losses if loss != "ce")]
    batch, target = next(cells.train_batches(given.trace, 0)), load_target("embedded")
    found: dict[str, dict[str, dict[str, float]]] = {}
    for size in SIZES:
        runs = {
            loss: cells.Run.start(cells.fresh_drafter(size, 0, 2048, target), loss, 1e-3) for loss in names
        }
        seconds: dict[str, list[float]] = {loss: [] for loss in names}
        for repeat in range(given.repeats + 1):
            for loss, run in runs.items():
                begin = time.process_time()
                run.update(batch, Chunked(run.loss))
                if repeat:  # the first is a warm-up
                    seconds[loss].append(time.process_time() - begin)
        base = min(seconds["ce"]), statistics.median(seconds["ce"])
        found[size] = {
            loss: {
                "least_ms": round(1e3 * min(times), 1),
                "median_ms": round(1e3 * statistics.median(times), 1),
                "ratio_of_least": round(min(times) / base[0], 3),
                "ratio_of_median": round(statistics.median(times) / base[1], 3),
            }
            for loss, times in seconds.items()
        }
    given.out.parent.mkdir(parents=True, exist_ok=True)
    about = {"command": "python benchmarks/study/timing.py", "repeats": given.repeats, "threads": 1}
    given.out.write_text(json.dumps(about | {"tokens": 1024, "sizes": found}, indent=1) + "\n")
    for size, rows in found.items():
        print(size, {loss: row["ratio_of_median"] for loss, row in rows.items()})


if __name__ == "__main__":
    main()
