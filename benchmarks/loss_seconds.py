"""CPU seconds of a training step under each loss of `real_losses.py`: whether equal steps are equal time.

    python benchmarks/loss_seconds.py --run runs/real      # 20 minutes on one core; the machine must be idle

Each loss is trained for few and for many steps, and the difference leaves start-up and export out. Losses
take turns, so that a change of the machine's speed reaches all of them; ratios are taken within a turn.
"""

from __future__ import annotations

import sys
import tempfile
import time
from datetime import date
from pathlib import Path

from real_loss_tables import seconds_table
from real_losses import LOSSES, Study, fit, parse_study, study_parser

from certdraft.decoding import device_name
from certdraft.support import write_json

FEW, MANY = 4, 24
"""Optimiser steps; the first half of either has short draft paths, as in the study."""


def step_seconds(study: Study, name: str) -> float:
    """CPU seconds of one optimiser step under a loss."""
    options = study.typed(study.first_seed, [*study.options(name), "--trainer.limit_val_batches", "0"])
    spent = []
    for steps in (FEW, MANY):
        with tempfile.TemporaryDirectory() as runs:
            start = time.process_time()
            fit(study.kind, "timed", Path(runs), steps, options)
            spent.append(time.process_time() - start)
    return (spent[1] - spent[0]) / (MANY - FEW)


def main() -> None:
    parser = study_parser(str(__doc__), "real-losses-seconds.json", steps=200, prompts=64)
    losses = ["ce+kl", "ce", "l2r", "by depth+9 adaptive, l2r x4"]
    parser.add_argument(
        "--losses", nargs="+", default=losses, choices=list(LOSSES), metavar="LOSS", help="the first is 1"
    )
    parser.add_argument("--repeats", type=int, default=3)
    args = parse_study(parser)
    study = Study.of(args)
    turns = [{name: step_seconds(study, name) for name in args.losses} for _ in range(args.repeats)]
    where = {"date": date.today().isoformat(), "device": device_name("cpu")}
    result = {**where, "losses": args.losses, "seconds": turns}
    write_json(args.results, result)
    sys.stdout.write(seconds_table(args.results).markdown())


if __name__ == "__main__":
    main()
