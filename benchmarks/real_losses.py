"""Losses compared on a real target: drafters trained from one trace, judged on held-out prompts.

    certdraft real --drafters '[eagle3]'
    python benchmarks/real_losses.py --run runs/real --seeds 0 1 2  # hours on one core; goes on where killed
    python benchmarks/real_loss_tables.py                           # every table of what is stored

Every drafter starts from the same weights (a seed's), sees the same batches for the same number of steps,
and is trained by `certdraft fit` with the config of its kind in `configs/real`; only the loss and its step
weights differ. A causal drafter has no depths: step weights by depth fall away.
The test text is the target's greedy answers to prompts that nothing was trained on (`configs/real/held-out-
prompts.jsonl`), recorded once with hidden states. Chains and trees are replayed exactly.

Counts are stored a prompt, so that intervals can be paired. The table at the end holds every loss against the
baseline that is best at that number.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Self

import torch
from real_loss_tables import BASELINES, read_stored, table, validation_table

from certdraft.data import (
    TRACE_FILE,
    Corpus,
    Generation,
    Prompts,
    Trace,
    load_target,
    open_trace,
    record_trace,
)
from certdraft.decoding import BestFirst, Chain, StaticTree
from certdraft.drafters import load_drafter
from certdraft.evaluation import greedy_documents, measure_acceptance, replay_lengths
from certdraft.evaluation.measure.trace_reading import DrafterFeatures, features_for
from certdraft.support import sha256_of, write_json
from certdraft.train.commands import lightning_cli
from certdraft.train.commands.export_command import export_run
from certdraft.train.commands.real import drafter_options, held_out_prompts, target_of
from certdraft.train.commands.real_sizes import run_sizes
from certdraft.train.runs import run_folder
from certdraft.train.runs.metrics_csv import whole_rows

Part = dict[str, Any]


def part(name: str, **settings: Any) -> Part:
    """One loss or weight as a config names it; "measured" stands for `Study.candidates`."""
    return {"class_path": name, "init_args": settings}


def mixed(first: Part, second: Part, share: float = 0.5) -> Part:
    """A mixture of a share of the first loss, half when not given, and the rest of the second."""
    return part("Mixture", losses=[first, second], weights=[share, 1 - share])


CE, KL = part("HardCE"), part("ForwardKL")
FORGIVING, ADAPTIVE = part("RunnerUpForgivingCE", m="measured"), part("AdaptiveSharpenedKL")
BY_DEPTH, MOSTLY_KL, TENTH = (mixed(FORGIVING, ADAPTIVE, share) for share in (0.5, 0.25, 0.1))
LOSSES: dict[str, tuple[Part, tuple[str, ...]]] = {
    "ce": (CE, ("depth",)),
    "ce+kl": (mixed(CE, KL), ("depth",)),
    "top-10 ce": (mixed(CE, part("TopKCE", k=10)), ("depth",)),  # HASS
    "lk": (part("LK"), ("depth",)),
    "spec-auf": (CE, ("to the first failure",)),
    "d-pard": (part("RenyiHalf"), ("d-pard",)),
    "l2r": (CE, ("l2r",)),
    "e2e-tv": (part("LK", form="alpha"), ("e2e-tv",)),
    "by depth+adaptive": (BY_DEPTH, ("reach",)),
    "by depth+adaptive, depth": (BY_DEPTH, ("depth",)),
    "by depth+adaptive, low": (BY_DEPTH, ("reach", "low")),
    "by depth+adaptive, reach 0, low 4": (BY_DEPTH, ("reach 0", "low 4")),
    "by depth+adaptive, l2r": (BY_DEPTH, ("l2r",)),
    "adaptive, l2r": (ADAPTIVE, ("l2r",)),
    "by depth+3 adaptive, l2r": (MOSTLY_KL, ("l2r",)),
    "by depth+adaptive, l2r x4": (BY_DEPTH, ("l2r x4",)),
    "by depth+3 adaptive, l2r x4": (MOSTLY_KL, ("l2r x4",)),
    "by depth+9 adaptive, l2r x4": (TENTH, ("l2r x4",)),
    "by depth+9 gaussian, l2r x4": (
        mixed(FORGIVING, part("AdaptiveSharpenedKL", noise="gaussian"), 0.1),
        ("l2r x4",),
    ),
    "by depth+9 sharp-1.5, l2r x4": (mixed(FORGIVING, part("SharpenedKL", a=1.5), 0.1), ("l2r x4",)),
    "by depth+9 sharp-1 to 3, l2r x4": (
        mixed(FORGIVING, part("SharpenedKL", a=1.0, stop=3.0), 0.1),
        ("l2r x4",),
    ),
    "pool by depth+9 adaptive, l2r x4": (
        mixed(part("PoolDiscountedCE", m="measured"), ADAPTIVE, 0.1),
        ("l2r x4",),
    ),
    "by depth+3 adaptive, focal": (MOSTLY_KL, ("focal",)),
    "by depth+3 adaptive, verified": (MOSTLY_KL, ("verified",)),
    "by depth+9 adaptive, verified": (TENTH, ("verified",)),
    "ce+9 kl, verified": (mixed(CE, KL, 0.1), ("verified",)),
    "l2r x4": (CE, ("l2r x4",)),
    "ce+3 kl, l2r x4": (mixed(CE, KL, 0.25), ("l2r x4",)),
    "ce+kl, l2r": (mixed(CE, KL), ("l2r",)),
    "ce+kl, reach": (mixed(CE, KL), ("reach",)),
    "runner-up-4+sharp-1.5": (
        mixed(part("RunnerUpForgivingCE", m=4), part("SharpenedKL", a=1.5)),
        ("depth",),
    ),
    "runner-up-4+adaptive": (mixed(part("RunnerUpForgivingCE", m=4), ADAPTIVE), ("depth",)),
    "runner-up-8+kl, low": (mixed(part("RunnerUpForgivingCE", m=8), KL), ("depth", "low")),
    "adaptive": (ADAPTIVE, ("depth",)),
}


def l2r(depth: float, reach: float, chain: float) -> Part:
    """L2R's weights: decay by depth, and the first-error focal and chain terms of drafts that are reached."""
    factors = [
        part("DepthWeights", gamma=4.48),
        part("ReachWeights", depth=4, acceptance="greedy", focal=1.0),
        part("PrefixWeights", depth=4, smoothing=0.0),
    ]
    return part("SumWeights", factors=factors, shares=[depth, reach, chain])


WEIGHTS = {
    "depth": part("DepthWeights", gamma=4.48),
    "reach": part("ReachWeights", depth=4, candidates="measured", beyond=0.2),
    "reach 0": part("ReachWeights", depth=4, candidates="measured", beyond=0.0),
    "low": part("LowMarginWeights", threshold=0.1, boost=2.0),
    "low 4": part("LowMarginWeights", threshold=0.1, boost=4.0),
    "to the first failure": part("ReachWeights", depth=4),
    "d-pard": part("PrefixWeights", depth=4, smoothing=0.5, acceptance="overlap"),
    "e2e-tv": part("PrefixWeights", depth=4, smoothing=0.0, acceptance="overlap"),
    "l2r": l2r(1.0, 0.5, 0.5),  # not tuned
    "l2r x4": l2r(0.5, 1.0, 1.0),  # configs/step_weights/reached.yaml
    "focal": l2r(0.5, 2.0, 0.5),
    "verified": l2r(0.05, 1.0, 1.0),
}


def step_weights(kind: str, names: Sequence[str]) -> Part | None:
    """The product of the named step weights; None for none.

    A causal drafter has one draft a position, so weights by depth alone change nothing and are left out.
    """
    factors = [WEIGHTS[name] for name in names if (kind, name) != ("causal", "depth")]
    if len(factors) < 2:
        return factors[0] if factors else None
    return part("ProductWeights", factors=factors)


def suits(kind: str, name: str) -> bool:
    """Whether a drafter kind can be trained with a loss: candidates by depth need draft paths."""
    return kind != "causal" or "measured" not in json.dumps(
        [LOSSES[name][0], step_weights(kind, LOSSES[name][1])]
    )


BUILDERS = {
    "chain 4": Chain(4),
    "4-ary": StaticTree((4, 4, 4, 4)),
    "best-first 8": BestFirst(8, max_depth=5),
    "best-first 32": BestFirst(32, max_depth=7),
}
RATES = {"top-1": (1, False), "coverage@4": (4, False), "low-margin misses@4": (4, True)}


def fit(kind: str, label: str, runs: Path, steps: int, options: list[str]) -> None:
    """Train from existing traces with the config of `certdraft real` for this kind.

    Goes on with a run of this label in `runs` that was killed.
    """
    typed = [
        "--config", str(held_out_prompts().parent / f"{kind}.yaml"), "--name", label, "--runs_dir", str(runs),
        "--data.record", "null", *options,
        "--trainer.max_steps", str(steps), "--trainer.val_check_interval", str(steps),
    ]  # fmt: skip
    lightning_cli.run("fit", [*typed, "--ckpt_path", "last"], "certdraft fit")


def fit_and_export(kind: str, label: str, runs: Path, steps: int, options: list[str], out: Path) -> None:
    """Train with `fit`; export the last step to `out`."""
    fit(kind, label, runs, steps, options)
    found = run_folder.find_checkpoint(runs / label, "last")
    assert found is not None
    export_run(str(found), str(out), name=f"{kind}-smollm2")


class Study:
    """Traces of the run, trained heads under RUN/losses, counts in one JSON file a head."""

    def __init__(
        self,
        run: Path,
        results: Path,
        steps: int,
        target: str,
        prompts: int,
        kind: str = "eagle3",
        replayed: int | None = None,
        first_seed: int = 0,
    ) -> None:
        self.first_seed = first_seed
        self.run, self.results, self.steps, self.target, self.kind = run, results, steps, target, kind
        self.sizes, self.replayed = run_sizes(run), replayed
        self.test = run / "losses" / "test-trace"
        if not (self.test / TRACE_FILE).exists():
            record_trace(
                str(self.test), target=target,
                corpus=Corpus(str(held_out_prompts()), split="all", max_rows=prompts),
                prompts=Prompts(max_prompt_tokens=160), generation=Generation(128, max_length=512),
                dtype=self.sizes.dtype, feature_layers=self.layers, accelerator="cpu",
            )  # fmt: skip

    @classmethod
    def of(cls, args: argparse.Namespace, kind: str = "eagle3", replayed: int | None = None) -> Self:
        """The study that options of `study_parser` ask for."""
        name = args.target or target_of(args.run)
        return cls(args.run, args.results, args.steps, name, args.prompts, kind, replayed, args.seeds[0])

    @cached_property
    def model(self) -> Any:
        """The target, whose embeddings the heads share."""
        return load_target(self.target)

    @property
    def layers(self) -> tuple[int, ...]:
        """Target layers that the heads read."""
        return tuple(open_trace(self.run / "traces" / "train").meta.feature_layers)

    @cached_property
    def traces(self) -> str:
        """Hashes of what is trained on and judged by: counts of other traces cannot be paired."""
        folders = (self.run / "traces" / "train", self.test)
        return " ".join(sha256_of(folder / TRACE_FILE)[:12] for folder in folders)

    @cached_property
    def candidates(self) -> list[int]:
        """Candidates by depth in the best-first trees of 32 nodes of a CE + KL drafter, validation text.

        Measured once, with the first seed, for the drafters of every seed.
        """
        file = self.run / "losses" / f"candidates-{self.kind}-{self.steps}.json"
        if not file.is_file():
            trace = open_trace(self.run / "traces" / "validation")
            drafter, features = self.loaded(self.trained("ce+kl", self.first_seed), trace)
            trees = {"": BestFirst(32, max_depth=7)}
            found = replay_lengths(drafter, greedy_documents(trace)[:24], trees, features=features)[""]
            means = [c / max(r, 1) for c, r in zip(found.candidates, found.reached, strict=True)][:4]
            write_json(file, {"means": means, "m": [max(1, round(mean)) for mean in means]})
        return json.loads(file.read_text(encoding="utf-8"))["m"]

    def counted(self, name: str, seed: int) -> dict[str, Any]:
        """The counts of one head, trained first where it is missing."""
        file = self.results / f"{name.replace(' ', '_')}-{seed}.json"
        own = {"drafter": self.kind, "steps": self.steps, "traces": self.traces}
        if not file.is_file():
            counts = self.count(self.trained(name, seed))
            self.results.mkdir(parents=True, exist_ok=True)
            write_json(file, {"loss": name, "seed": seed, **own, **counts})
            tau = {label: round(sum(t) / sum(p), 3) for label, (t, p) in counts["lengths"].items()}
            print(f"{file}: tau {tau}", file=sys.stderr, flush=True)
        found = json.loads(file.read_text(encoding="utf-8"))
        if stored := {key: found.get(key) for key, wanted in own.items() if found.get(key) != wanted}:
            raise ValueError(f"{file} is of {stored}, not {own}; give another --results folder")
        return found

    def validated(self, name: str, seed: int) -> dict[str, float]:
        """What `fit` found on validation text at the last step of one head, trained first where missing."""
        self.trained(name, seed)
        found = run_folder.find_checkpoint(self.run / "losses" / "runs" / self.label(name, seed))
        metrics = None if found is None else run_folder.run_folder(found)
        assert metrics is not None
        row = whole_rows(metrics / "metrics.csv")[-1]
        return {
            key.removeprefix("val/"): float(value) for key, value in row.items() if key.startswith("val/")
        }

    def label(self, name: str, seed: int) -> str:
        """Name of a head's run and export."""
        prefix = "" if self.kind == "eagle3" else f"{self.kind}-"
        return f"{prefix}{name.replace(' ', '_')}-{self.steps}-{seed}"

    def trained(self, name: str, seed: int) -> Path:
        """The exported head."""
        label = self.label(name, seed)
        out = self.run / "losses" / "exports" / label
        if not out.exists():
            self.fit(label, seed, self.options(name), out)
        return out

    def options(self, name: str) -> list[str]:
        """Of `fit`: the drafter, one loss and its step weights."""
        loss, names = LOSSES[name]
        parts = [json.dumps(part) for part in (loss, step_weights(self.kind, names))]
        loss_text, weights = (
            text.replace('"measured"', json.dumps(self.candidates)) if '"measured"' in text else text
            for text in parts
        )
        options = drafter_options(self.kind, self.target, self.layers)
        return [*options, "--model.loss", loss_text, "--model.step_weights", weights]

    def fit(self, label: str, seed: int, options: list[str], out: Path) -> None:
        """Train with the config of `certdraft real` for this kind and more options; export to `out`."""
        runs = self.run / "losses" / "runs"
        fit_and_export(self.kind, label, runs, self.steps, self.typed(seed, options), out)

    def typed(self, seed: int, options: list[str]) -> list[str]:
        """Options of `fit` with the traces, the precision and a seed."""
        return [
            f"--seed_everything={seed}", f"--data.seed={seed}",
            "--data.train", str(self.run / "traces" / "train"),
            "--data.validation", str(self.run / "traces" / "validation"),
            "--trainer.precision", self.sizes.precision, *options,
        ]  # fmt: skip

    def loaded(self, export: Path, trace: Trace) -> tuple[Any, DrafterFeatures | None]:
        """An exported drafter in fp32 and what it reads of the target along a trace."""
        drafter = load_drafter(export, target=self.model, dtype="float32").eval()
        return drafter, features_for({"": drafter}, None, trace=trace)[""]

    @torch.inference_mode()
    def count(self, export: Path) -> dict[str, Any]:
        """Tokens and target passes of every tree, hits and steps of every rate, a prompt each."""
        trace = open_trace(self.test)
        drafter, features = self.loaded(export, trace)
        found = replay_lengths(drafter, greedy_documents(trace, self.replayed), BUILDERS, features=features)
        acceptance = measure_acceptance(drafter, trace, features=features, max_documents=None)
        rates = {}
        for rate, (m, low) in RATES.items():
            hits, steps = acceptance.coverage_counts(m, low)
            rates[rate] = [(steps - hits if "miss" in rate else hits).tolist(), steps.tolist()]
        lengths = {label: [list(map(int, c)) for c in one.counts()] for label, one in found.items()}
        return {"lengths": lengths, "rates": rates, "ece": acceptance.summary()["calibration"]["ece"]}


def study_parser(doc: str, results: str, steps: int, prompts: int) -> argparse.ArgumentParser:
    """The options that every study of losses on a real target has, with its own defaults."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/real"), help="folder of `certdraft real`")
    parser.add_argument("--target", help="where it has moved; else the target of the run's trace")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=steps)
    parser.add_argument("--prompts", type=int, default=prompts)
    parser.add_argument("--results", type=Path, help=f"RUN/losses/{results} when not given")
    parser.set_defaults(results_name=results)
    return parser


def parse_study(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """The options as typed; results lie beside the run where no other place is given."""
    args = parser.parse_args()
    args.results = args.results or args.run / "losses" / args.results_name
    return args


def main() -> None:
    parser = study_parser(str(__doc__), "real-losses", steps=400, prompts=80)
    parser.add_argument("--drafter", choices=["eagle3", "causal", "dflash"], default="eagle3")
    parser.add_argument("--losses", nargs="+", default=list(LOSSES), choices=list(LOSSES), metavar="LOSS")
    parser.add_argument("--replayed", type=int, help="prompts whose trees are replayed; all when not given")
    parser.add_argument(
        "--validation",
        type=Path,
        help="judge by validation text, stored in this file, and not by the test text",
    )
    parser.add_argument(
        "--against", choices=BASELINES, help="baseline; the best at each number when not given"
    )
    args = parse_study(parser)
    study = Study.of(args, args.drafter, args.replayed)
    heads = [(loss, seed) for seed in args.seeds for loss in args.losses if suits(args.drafter, loss)]
    if args.validation:
        found = [{"loss": loss, "seed": seed, **study.validated(loss, seed)} for loss, seed in heads]
        write_json(args.validation, {"drafter": args.drafter, "steps": args.steps, "heads": found})
        sys.stdout.write(validation_table(args.validation).markdown())
        return
    for loss, seed in heads:
        study.counted(loss, seed)
    sys.stdout.write(table(read_stored([args.results]), args.against).markdown())


if __name__ == "__main__":
    main()
