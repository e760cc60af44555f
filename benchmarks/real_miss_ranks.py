"""Where low-margin misses lie: the rank of the target's greedy token in EAGLE-3 heads of `real_losses.py`.

    python benchmarks/real_miss_ranks.py --run runs/real --seeds 1 --steps 200 --prompts 64     # minutes

A loss that acts on the order near the top of the drafter's distribution can repair a miss of rank 5 to 8, not
one of rank 500, and none can where the draft vocabulary of 8,000 lacks the token. Stored are counts of ranks
on the test text, and the median KL radius of coverage(4) of the target there.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from real_loss_tables import WIDTHS, ranks_table
from real_losses import LOSSES, Study, parse_study, study_parser

from certdraft.certificates import Coverage, margin, radius
from certdraft.data import open_trace
from certdraft.evaluation import measure_acceptance
from certdraft.evaluation.measure.acceptance import LOW_MARGIN
from certdraft.evaluation.measure.trace_reading import concatenate
from certdraft.support import write_json


@torch.inference_mode()
def covered_at_low_margins(study: Study, export: Path) -> dict[str, int]:
    """Low-margin positions, and those whose greedy token is among the drafter's first m choices."""
    trace = open_trace(study.test)
    drafter, features = study.loaded(export, trace)
    found = measure_acceptance(drafter, trace, features=features, widths=WIDTHS)
    counts = {m: found.coverage_counts(m, low_margin=True) for m in WIDTHS}
    positions = int(counts[WIDTHS[0]][1].sum())
    return {"positions": positions, **{str(m): int(hits.sum()) for m, (hits, _) in counts.items()}}


def median_radius(study: Study) -> float:
    """Median KL radius of coverage(4) at low-margin positions, nats."""
    trace = open_trace(study.test)
    rows = [trace.row(index) for index in range(len(trace))]
    head = concatenate([row.head[torch.as_tensor(row.loss_mask, dtype=torch.bool)] for row in rows])
    return float(radius(head, Coverage(4))[margin(head) < LOW_MARGIN].median())


def main() -> None:
    parser = study_parser(str(__doc__), "real-miss-ranks.json", steps=400, prompts=80)
    parser.add_argument("--losses", nargs="+", default=["ce+kl", "l2r"], choices=list(LOSSES), metavar="LOSS")
    args = parse_study(parser)
    study = Study.of(args)
    heads = [
        {"loss": loss, "seed": seed, **covered_at_low_margins(study, study.trained(loss, seed))}
        for loss in args.losses
        for seed in args.seeds
    ]
    facts = {"drafter": study.kind, "steps": args.steps, "median_radius_nats": median_radius(study)}
    write_json(args.results, {**facts, "heads": heads})
    sys.stdout.write(ranks_table(args.results).markdown())


if __name__ == "__main__":
    main()
