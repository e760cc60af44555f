"""The loss study: tune every loss, train drafters of two sizes at two budgets, replay, fine-tune.

    python benchmarks/study/run.py                      # everything that is missing; hours on one core
    python benchmarks/study/run.py --stages tune        # one stage
    python benchmarks/study/run.py --tiny --out /tmp/x  # seconds: shows that the command runs
    python benchmarks/study/analyse.py                  # tables, intervals and the figure from the results

The target is the embedded one (8 layers of 128, vocabulary 2,048) on text of the standard library, split by
file: training text, the target's continuations of validation text (learning rates, and which losses go on),
and of test text (every number that is reported). Every finished cell is one line of a jsonl file; a killed
study goes on where it stopped. Traces and weights lie under runs/study, which git ignores.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, fields
from datetime import datetime
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import cells
import torch
from plan import (
    BAR,
    CLOSE,
    DECAY,
    FINE_TUNING,
    GRID,
    LARGE,
    LOSSES,
    OURS,
    REPLAYED,
    SEEDS,
    SHOWN,
    SIZES,
    SMALL,
    Cell,
    recording,
)

from certdraft.data import Corpus, Generation, Prompts, Recording, load_target, open_trace, record_trace

HERE = Path(__file__).parent


class Study:
    """Where things lie, and what is done already.

    Args:
        results: folder of the jsonl files.
        work: folder of traces and weights.
        tiny: a few texts and steps.
    """

    def __init__(self, results: Path, work: Path, tiny: bool = False) -> None:
        self.results, self.work, self.tiny = results, work, tiny
        self.small, self.large, self.fine = (4, 8, 4) if tiny else (SMALL, LARGE, FINE_TUNING)
        self.target = load_target("embedded")
        results.mkdir(parents=True, exist_ok=True)
        (work / "weights").mkdir(parents=True, exist_ok=True)
        for split in ("train", "validation", "test"):
            if not (self.folder(split) / "trace.json").exists():
                made = self.recording(split)
                settings = {f.name: getattr(made, f.name) for f in fields(made)}
                record_trace(str(self.folder(split)), **settings, accelerator="cpu")
        self.vocab_size = open_trace(self.folder("train")).meta.vocab_size
        self._splits: dict[tuple[str, int | None], cells.Split] = {}

    def recording(self, split: str) -> Recording:
        """How a split is recorded."""
        if not self.tiny:
            return recording(split)
        return recording(
            split,
            corpus=Corpus(split=split, max_rows=12),
            prompts=Prompts(prompts_per_document=1),
            generation=Generation(max_new_tokens=16, corpus_positions=split == "train"),
        )

    def folder(self, split: str) -> Path:
        """The trace of a split."""
        return self.work / "traces" / split

    def split(self, name: str, replayed: int | None) -> cells.Split:
        """A held-out split; `replayed` of its texts are replayed, all when None."""
        replayed = 4 if self.tiny else replayed
        if (name, replayed) not in self._splits:
            self._splits[name, replayed] = cells.read_split(self.folder(name), self.recording(name), replayed)
        return self._splits[name, replayed]

    def done(self, stage: str) -> dict[str, dict[str, Any]]:
        """Finished lines of a stage by key."""
        file = self.results / f"{stage}.jsonl"
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        return {line["key"]: line for line in map(json.loads, lines)}

    def write(self, stage: str, key: str, cell: Cell, **found: Any) -> None:
        """Appends a finished cell."""
        line = {"key": key, **asdict(cell), **found, "at": datetime.now().isoformat(timespec="seconds")}
        with (self.results / f"{stage}.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(line, separators=(",", ":")) + "\n")
        shown = {k: v for k, v in found["summary"].items() if k in SHOWN}
        print(f"{datetime.now():%H:%M:%S} {key} {found['seconds']:.0f}s {shown}", file=sys.stderr, flush=True)

    # ---- stages

    def tune(self, cell: Cell) -> None:
        """The small budget, judged on the validation split."""
        if cell.key in self.done("tune"):
            return
        run = self.start(cell)
        run.train(cells.train_batches(self.folder("train"), cell.seed), self.small, self.small)
        found = self.judge(run.drafter)
        self.write("tune", cell.key, cell, seconds=run.seconds, steps=run.step, summary=found)

    def train(self, cell: Cell) -> None:
        """Both budgets, the small one a branch of the large one, counted on the test split."""
        if f"{cell.key}/large" in self.done("train"):
            return
        run, data = self.start(cell), _Shared(cells.train_batches(self.folder("train"), cell.seed))
        run.train(data.since(0), self.small - round(DECAY * self.small), self.large)
        branch = run.branch()
        branch.train(data.since(branch.step), self.small, self.small)
        self.finish("train", cell, "small", branch)
        run.train(data.since(run.step), self.large, self.large)
        self.finish("train", cell, "large", run)

    def pick(self, cell: Cell) -> None:
        """The large budget, judged on the validation split: what decides between our own losses."""
        key = f"{cell.key}/large"
        if key in self.done("pick"):
            return
        self.train(cell)
        self.write("pick", key, cell, seconds=0.0, summary=self.judge(self.finished(cell, key)))

    def fine_tune(self, cell: Cell) -> None:
        """From the drafter that hard cross-entropy trained with the large budget and the same seed."""
        if f"{cell.key}/fine" in self.done("fine-tune"):
            return
        lr = self.best_lr(cell.size, "ce")
        start = self.weights(f"{Cell('train', cell.size, 'ce', lr, cell.seed).key}/large")
        run = self.start(cell)
        run.drafter.load_state_dict(torch.load(start))
        run.train(cells.train_batches(self.folder("train"), 1000 + cell.seed), self.fine, self.fine, 0.5)
        self.finish("fine-tune", cell, "fine", run)

    def recount(self, size: str) -> None:
        """Counts finished drafters again whose trees were replayed on fewer texts than the plan says now."""
        names = [f.name for f in fields(Cell)]
        texts = len(self.split("test", REPLAYED[size]).texts)
        for stage in ("train", "fine-tune"):
            for key, line in self.done(stage).items():
                if line["size"] == size and line["texts"] != texts:
                    cell = Cell(**{name: line[name] for name in names})
                    done = {name: line[name] for name in ("budget", "seconds", "steps")}
                    self.count(stage, key, cell, self.finished(cell, key), **done)

    def start(self, cell: Cell) -> cells.Run:
        """A run at step 0."""
        drafter = cells.fresh_drafter(cell.size, cell.seed, self.vocab_size, self.target)
        return cells.Run.start(drafter, cell.loss, cell.lr)

    def finish(self, stage: str, cell: Cell, budget: str, run: cells.Run) -> None:
        """Keeps the weights and what they count."""
        key = f"{cell.key}/{budget}"
        torch.save(run.drafter.state_dict(), self.weights(key))
        done = {"budget": budget, "seconds": round(run.seconds, 2), "steps": run.step}
        self.count(stage, key, cell, run.drafter, **done)

    def count(self, stage: str, key: str, cell: Cell, drafter: Any, **done: Any) -> None:
        """Counts on the test split; a later line of a key counts for an earlier one."""
        split, begin = self.split("test", REPLAYED[cell.size]), time.process_time()
        found = cells.evaluate(drafter, split)
        done |= {"texts": len(split.texts), "evaluation_s": round(time.process_time() - begin, 1)}
        self.write(stage, key, cell, **done, summary=cells.summary(found), counts=found)

    def judge(self, drafter: Any) -> dict[str, float]:
        """Rates on the validation split, from which all choices are made."""
        split = self.split("validation", REPLAYED["validation"])
        return cells.summary(cells.evaluate(drafter, split, certify=False))

    def finished(self, cell: Cell, key: str) -> Any:
        """A drafter as its training left it."""
        drafter = cells.fresh_drafter(cell.size, cell.seed, self.vocab_size, self.target)
        drafter.load_state_dict(torch.load(self.weights(key)))
        return drafter

    def weights(self, key: str) -> Path:
        """File of a drafter's weights."""
        return self.work / "weights" / f"{key.replace('/', '_')}.pt"

    # ---- what the validation split decides

    def tuned(self, size: str, loss: str) -> list[dict[str, Any]]:
        """Tuning lines of a loss, the best learning rate first: by validation coverage@4."""
        lines = [x for x in self.done("tune").values() if (x["size"], x["loss"]) == (size, loss)]
        return sorted(lines, key=lambda x: -x["summary"]["coverage@4"])

    def best_lr(self, size: str, loss: str) -> float:
        """The learning rate that won; where none was tried, the likeliest."""
        lines = self.tuned(size, loss)
        return lines[0]["lr"] if lines else GRID[size][0]

    def worth_tuning(self, size: str) -> list[str]:
        """The baselines of the bar, and every loss that comes close at the first learning rate."""
        first = {
            x["loss"]: x["summary"]["coverage@4"] for x in self.done("tune").values() if x["size"] == size
        }
        best = max(first.values())
        return [loss for loss in LOSSES if loss in BAR or first.get(loss, 0.0) > best - CLOSE]

    def finalists(self) -> list[str]:
        """The baselines of the bar, margin-discounted CE, and our best three others on the validation split.

        Best at low-margin coverage@4, at best-first trees of 32 nodes, at coverage@4; further places go by
        coverage@4. Judged with one layer, where every loss was tuned.
        """
        tuned = {loss: self.tuned("1-layer", loss) for loss in OURS}
        scores = {loss: lines[0]["summary"] for loss, lines in tuned.items() if lines}
        chosen = [*BAR, "margin"]
        for metric in (
            "low_margin_coverage@4",
            "tau/best-first-32",
            "coverage@4",
            "coverage@4",
            "coverage@4",
        ):
            left = [loss for loss in scores if loss not in chosen]
            if left and len(chosen) < len(BAR) + 4:
                chosen.append(max(left, key=lambda loss: scores[loss][metric]))
        return chosen


class _Shared:
    """Batches that a branch and its trunk both read, from the same place."""

    def __init__(self, source: Iterator[Any]) -> None:
        self.source, self.seen = source, []

    def since(self, step: int) -> Iterator[Any]:
        """Batches from number `step` on."""
        while True:
            while len(self.seen) <= step:
                self.seen.append(next(self.source))
            yield self.seen[step]
            step += 1


def main() -> None:
    """Runs the stages that are asked for, cell by cell."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    stages = ["tune", "pick", "train", "fine-tune", "recount"]
    parser.add_argument("--stages", nargs="+", default=["tune", "train", "fine-tune"], choices=stages)
    parser.add_argument("--losses", nargs="+", help="only these")
    parser.add_argument("--sizes", nargs="+", help="only these")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these")
    parser.add_argument("--lrs", nargs="+", type=float, help="to tune over, instead of the grid")
    parser.add_argument("--out", type=Path, help="folder for results, traces and weights")
    parser.add_argument("--tiny", action="store_true", help="a few texts and steps, to see it run")
    given = parser.parse_args()
    torch.set_num_threads(1)
    results = given.out / "results" if given.out else HERE / "results"
    study = Study(results, given.out or HERE.parents[1] / "runs" / "study", given.tiny)
    if "recount" in given.stages:
        for size in given.sizes or list(SIZES):
            study.recount(size)
    seeds = given.seeds or ([0] if given.tiny else SEEDS)
    tiny = ["ce", "margin"] if given.tiny else None
    sizes = given.sizes or list(SIZES)
    if "tune" in given.stages:
        for size in sizes:
            chosen = given.losses or tiny or (list(LOSSES) if size == "1-layer" else study.finalists())
            rates = given.lrs or GRID[size][: 1 if given.tiny else None]
            for loss in chosen:
                study.tune(Cell("tune", size, loss, rates[0], 0))
            for lr in rates[1:]:
                for loss in given.losses or study.worth_tuning(size):
                    study.tune(Cell("tune", size, loss, lr, 0))
    if "pick" in given.stages:
        for size in sizes:
            for loss in given.losses or tiny or study.finalists():
                study.pick(Cell("train", size, loss, study.best_lr(size, loss), 0))
    for seed in seeds:
        losses = given.losses or tiny or study.finalists()
        if "train" in given.stages:
            for size in sizes:
                for loss in losses:
                    study.train(Cell("train", size, loss, study.best_lr(size, loss), seed))
        if "fine-tune" in given.stages and "2-layer" in sizes:
            for loss in losses:
                lr = 0.5 * study.best_lr("2-layer", loss)
                study.fine_tune(Cell("fine-tune", "2-layer", loss, lr, seed))
    about = {
        "command": "python benchmarks/study/run.py",
        "machine": platform.processor() or platform.machine(),
        "cpu": _cpu(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "commit": _commit(),
        "losses": {name: repr(make()) for name, make in LOSSES.items()},
    }
    (results / "machine.json").write_text(json.dumps(about, indent=1) + "\n", encoding="utf-8")


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((x.split(":")[1].strip() for x in lines if x.startswith("model name")), "unknown")


def _commit() -> str:
    done = subprocess.run(["git", "-C", HERE, "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


if __name__ == "__main__":
    main()
