"""Collaborative arbitration on arithmetic: train three pairs and their policies, print and store the table.

    python benchmarks/cospec.py                  # every seed: target, drafter, policy, measurement, null
    python benchmarks/cospec.py --seeds 1        # one seed, a few minutes

Each seed trains its own target, drafter and policy from `configs/arbiter/`, all through `certdraft fit`. The
*null* pair has the same target and a noisy copy of it as drafter: no skill to complement it with. Finished
stages are found again in `--work` and not repeated; the result holds the CPU seconds of each training.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch

from certdraft.arbitration import (
    ArbitrationResult,
    ArbitrationSettings,
    arithmetic,
    as_text,
    load_policy,
    measure_arbitration,
    open_env,
    write_arbitration,
)
from certdraft.data import load_target, load_tokenizer
from certdraft.train.commands.cli import main as certdraft

CONFIGS = Path("configs/arbiter")
TEXTS = ArbitrationSettings(depth=4, max_new_tokens=8, look_ahead=True, texts_at_once=8192, branches=256)
PARTS = 2
NOISE = 0.1  # of each weight matrix of the null drafter, in units of its standard deviation


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--pairs", type=int, help="pairs of models; one per seed when not given")
    parser.add_argument("--problems", type=int, default=600, help="test problems of a seed")
    parser.add_argument("--work", type=Path, default=Path("runs/cospec"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cospec.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    ours, null = [], []
    for seed in range(1, arguments.seeds + 1):
        number = 1 + (seed - 1) % (arguments.pairs or arguments.seeds)
        folder = arguments.work / str(number)
        pair(folder, number)
        noisy_copy(folder, number)
        for drafter, results in (("drafter", ours), ("null-drafter", null)):
            policy(folder, seed, drafter)
            results.append(measure(folder, seed, drafter, arguments.problems))
    seconds = {
        file.parent.name: json.loads(file.read_text())
        for file in sorted(arguments.work.glob("*/seconds.json"))
    }
    facts = {
        "what": "collaborative arbitration, arithmetic with complementary skill",
        "pairs of models": arguments.pairs or arguments.seeds,
        "texts": asdict(TEXTS),
        "CPU seconds of each training, one thread": seconds,
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    stem = arguments.out.with_suffix("")
    print("\ncomplementary pair")
    print(as_text(write_arbitration(ours, arguments.out, facts)))
    print("\nnull pair: the drafter is a noisy copy of the target")
    facts["what"] = "the same targets with a noisy copy as drafter: nothing to gain"
    print(as_text(write_arbitration(null, f"{stem}-null.json", facts)))


def pair(folder: Path, seed: int) -> None:
    """Target and drafter of a seed."""
    for number, name in enumerate(("target", "drafter")):
        fit(
            folder, name, CONFIGS / f"{name}.yaml",
            f"--seed_everything={10 * seed + number}",
            f"--model.init_args.export_dir={folder / name}",
            f"--data.init_args.tokenizer_dir={folder / 'tokenizer'}",
            f"--data.init_args.seed={seed}",
        )  # fmt: skip


def policy(folder: Path, seed: int, drafter: str) -> None:
    """A policy of a pair."""
    name = f"{drafter}-policy-{seed}"
    fit(
        folder, name, CONFIGS / "arithmetic.yaml",
        f"--seed_everything={10 * seed + 2}",
        f"--model.init_args.target={folder / 'target'}",
        f"--model.init_args.drafter.init_args.pretrained={folder / drafter}",
        f"--model.init_args.export_dir={folder / name}",
        f"--data.init_args.seed={seed}",
    )  # fmt: skip


def fit(folder: Path, name: str, config: Path, *settings: str) -> None:
    """One training, unless its result is there; its seconds are kept."""
    if (folder / name).is_dir():
        return
    start = time.process_time()
    certdraft(["fit", "--config", str(config), "--runs_dir", str(folder / "runs"), *settings])
    file = folder / "seconds.json"
    seconds = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps({**seconds, name: round(time.process_time() - start, 1)}))


def noisy_copy(folder: Path, seed: int) -> None:
    """A drafter that knows nothing the target does not know."""
    out = folder / "null-drafter"
    if out.is_dir():
        return
    model = load_target(str(folder / "target"))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.ndim == 2:
                weight += NOISE * weight.std() * torch.randn(weight.shape, generator=generator)
    model.save_pretrained(out)
    load_tokenizer(str(folder / "target")).save_pretrained(out)


def measure(folder: Path, seed: int, drafter: str, problems: int) -> ArbitrationResult:
    """All arms of a seed, on problems that nothing was trained or matched on."""
    env = open_env(str(folder / "target"), str(folder / drafter), TEXTS)
    test, matching = arithmetic("test", problems, seed, PARTS), arithmetic("validation", 150, seed, PARTS)
    trained = load_policy(folder / f"{drafter}-policy-{seed}")
    result = measure_arbitration(env, trained, test, matching, seed=seed)
    print(f"seed {seed}, {drafter}: measured", file=sys.stderr)
    return result


if __name__ == "__main__":
    main()
