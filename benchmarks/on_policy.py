"""Does a causal drafter gain from training on its own draft tokens? Continued training, held-out prompts.

    certdraft real --drafters '[causal]'
    python benchmarks/on_policy.py --run runs/real      # about an hour and a quarter a seed on one core

The causal drafter of the run is trained further for the same number of steps, from the same weights and on
the same batches: on the target's text with CE + KL (*text*), and with half of the micro-batches ending in
its own rounds (`model.on_policy`), with CE + KL (*rounds*), with the loss of Draft-OPD (*draft-opd*), and
with the same loss weighted by the KL radius of each rejection (*avoidable*). The target runs beside it.
Counts are stored a prompt, replayed on the test text of `real_losses.py`; intervals are 95 %, paired
over prompts, against *text*.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from real_loss_tables import read_stored, table
from real_losses import CE, KL, Study, mixed, parse_study, part, study_parser

ROUNDS = {"depth": 4, "share": 0.5}
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, float] | None]] = {
    "text": (mixed(CE, KL), None),
    "rounds": (mixed(CE, KL), ROUNDS),
    "draft-opd": (part("OnPolicyKL", decay=0.8), ROUNDS),
    "avoidable": (part("OnPolicyKL", decay=0.8, avoidable=0.1), ROUNDS),
}


class Continued(Study):
    """The causal drafter of a run, trained further."""

    def trained(self, name: str, seed: int) -> Path:
        """The exported drafter."""
        label = f"causal-{name}-{self.steps}-{seed}"
        out = self.run / "losses" / "exports" / label
        if not out.exists():
            loss, rounds = VARIANTS[name]
            # The config of this kind cuts its drafter from the target instead.
            pretrained = {"pretrained": str(self.run / "exports" / "causal"), "from_target": None}
            options = [
                "--model.drafter", json.dumps({"class_path": "CausalDrafter", "init_args": pretrained}),
                "--model.target", json.dumps({"name": self.target, "full": False}),
                "--model.loss", json.dumps(loss), "--model.on_policy", json.dumps(rounds),
                "--model.optimizer.lr", "3.0e-4",
            ]  # fmt: skip
            self.fit(label, seed, options, out)
        return out


def main() -> None:
    parser = study_parser(str(__doc__), "on-policy", steps=100, prompts=64)
    parser.add_argument("--variants", nargs="+", default=list(VARIANTS), choices=list(VARIANTS))
    parser.add_argument("--replayed", type=int, help="prompts whose trees are replayed; all when not given")
    args = parse_study(parser)
    study = Continued.of(args, "causal", args.replayed)
    for seed in args.seeds:
        for variant in args.variants:
            study.counted(variant, seed)
    sys.stdout.write(table(read_stored([args.results]), "text").markdown())


if __name__ == "__main__":
    main()
