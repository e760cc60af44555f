"""The three drafter families at equal training time and equal trainable parameters, on the embedded target.

    OMP_NUM_THREADS=1 python benchmarks/families.py --seconds 150          # about 12 minutes of one core
    OMP_NUM_THREADS=1 python benchmarks/families.py --seconds 150 --seed 1 --family eagle     # add one run

One trace of standard-library text with target features is recorded once (1.4 GB under runs/families/, five
minutes). Each family then trains for the same CPU seconds of one thread on the same batches with the same
loss, its learning rate falling along the time; the trace is read, the target is not run. Then each drafts,
live, for the target's greedy text of held-out prompts: τ is the mean of tokens committed per target pass.

Time is process time, because the machine may be shared. Ratios are within one seed.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
import warnings
from dataclasses import dataclass, replace
from datetime import date
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from certdraft.data import (
    Corpus,
    Generation,
    Prompts,
    Recording,
    TraceDataModule,
    load_target,
    load_tokenizer,
    open_trace,
)
from certdraft.decoding import BestFirst, Chain, TargetRunner, acceptance_length, decode, device_name, greedy
from certdraft.drafters import BlockConfig, BlockDrafter, CausalDrafter, Drafter, EagleConfig, EagleDrafter
from certdraft.losses import Chunked, DepthWeights, MarginDiscountedCE, TargetBatch

FOLDER = Path("runs/families")
LAYERS = (1, 3, 6)
SIZES = {"hidden_size": 128, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32}


@dataclass(frozen=True)
class Family:
    """One contender: how it is made, and what it learns with."""

    drafter: Drafter
    lr: float
    gamma: float


def families(target: PreTrainedModel, seed: int, short_until: float | None) -> dict[str, Family]:
    """About 542,000 trainable parameters each; the target's embeddings and head are in none of the counts
    where they are frozen, in the causal drafter's and the EAGLE head's where they are trained.

    What reads the current token through attention alone has as many key-value heads as query heads: with
    half of them its 128 numbers would pass through 64.
    """
    vocab = int(target.config.vocab_size)
    spare = max(load_tokenizer("embedded").get_vocab().values()) + 1
    torch.manual_seed(seed)
    config = {**SIZES, "intermediate_size": 600, "num_hidden_layers": 1, "tie_word_embeddings": True}
    causal = CausalDrafter(config=config | {"max_position_embeddings": 2048}, init_from_target=True)
    eagle = EagleDrafter(
        EagleConfig(target_layer_ids=LAYERS, intermediate_size=300, num_key_value_heads=4),
        unroll=3,
        short_until=short_until,
    )
    block = BlockDrafter(
        BlockConfig(
            num_hidden_layers=1, intermediate_size=1152, num_key_value_heads=4, block_size=8,
            target_layer_ids=(1, 6),
        ),
        num_anchors=48,
        short_until=short_until,
    )  # fmt: skip
    return {
        "causal": Family(causal.build(vocab, target), 3e-3, 7.0),
        "eagle": Family(eagle.build(vocab, target), 5e-3, 4.48),
        "block": Family(block.build(vocab, target, spare), 5e-3, 4.0),
    }


def train(family: Family, data: TraceDataModule, seconds: float, seed: int) -> dict[str, Any]:
    """Trains for some CPU seconds; what came of it."""
    drafter = family.drafter.train()
    chunked, weights = Chunked(MarginDiscountedCE()), DepthWeights(family.gamma)
    optimizer = torch.optim.AdamW(drafter.parameters(), family.lr, betas=(0.9, 0.95), weight_decay=0.0)
    index = [LAYERS.index(tap) for tap in drafter.taps]
    batches, losses, tokens, drafts = iter(()), [], 0, 0
    torch.manual_seed(seed)
    start = time.process_time()
    while (spent := time.process_time() - start) < seconds:
        batch = next(batches, None)
        if batch is None:
            batches = iter(data.train_dataloader())
            batch = next(batches)
        drafter.at(spent / seconds)
        warm = min(1.0, (len(losses) + 1) / 20)
        for group in optimizer.param_groups:
            group["lr"] = family.lr * warm * 0.5 * (1 + math.cos(math.pi * min(1.0, spent / seconds)))
        features = batch.features[:, :, index] if index else None
        paths = drafter.paths(
            batch.input_ids, batch.position_ids, batch.document_ids, batch.loss_mask, features
        )
        steps = paths.steps[paths.mask]
        num = batch.input_ids.shape[1]
        said = TargetBatch(batch.head[steps // num, steps % num])
        weight = weights.on_paths(paths.hidden.new_zeros(paths.mask.shape), paths.mask)[paths.mask]
        loss = chunked(paths.hidden[paths.mask], drafter.head_weight, said, step_weight=weight)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(drafter.parameters(), 1.0)
        optimizer.step()
        losses.append(float(loss.detach()))
        tokens += batch.num_tokens
        drafts += len(steps)
    took = time.process_time() - start
    drafter.eval()
    tail = max(1, len(losses) // 10)
    return {
        "parameters": sum(p.numel() for p in drafter.parameters() if p.requires_grad),
        "optimizer_steps": len(losses),
        "text_tokens_per_s": tokens / took,
        "drafts_per_s": drafts / took,
        "first_loss_nats": sum(losses[:tail]) / tail,
        "last_loss_nats": sum(losses[-tail:]) / tail,
    }


def measure(family: Family, target: PreTrainedModel, prompts: list[list[int]], new: int) -> dict[str, float]:
    """τ by builder; every text is checked to be the target's own."""
    runner = TargetRunner(target, family.drafter.taps)
    builders = {"chain_4": Chain(4), "chain_7": Chain(7), "best_first_32": BestFirst(32, max_depth=7)}
    texts = [greedy(runner, prompt, new) for prompt in prompts]
    found = {}
    for name, builder in builders.items():
        results = [decode(runner, family.drafter, p, builder, max_new_tokens=new) for p in prompts]
        assert [r.tokens for r in results] == texts, "a drafter changed the text"
        found[name] = round(acceptance_length(results), 4)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seconds", type=float, default=120.0, help="of CPU time each family trains")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--family", default=None, help="one of them only; results are added to those in --out"
    )
    parser.add_argument("--lr", type=float, default=None, help="instead of the family's own")
    parser.add_argument("--short-until", type=float, default=None, help="instead of the drafters' own")
    parser.add_argument("--rows", type=int, default=220, help="source files of the training trace")
    parser.add_argument("--prompts", type=int, default=48, help="held-out prompts decoded")
    parser.add_argument("--new", type=int, default=40, help="tokens decoded per prompt")
    parser.add_argument("--out", default="benchmarks/results/families.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore", module="pytorch_lightning")
    recording = Recording(
        target="embedded", corpus=Corpus(max_rows=args.rows), prompts=Prompts(max_prompt_tokens=240),
        generation=Generation(max_new_tokens=0),
        num_kept=16, feature_layers=LAYERS, batch_size=256,
    )  # fmt: skip
    data = TraceDataModule(
        str(FOLDER / "train"), str(FOLDER / "validation"), seq_len=256, batch_size=4,
        record=recording, validation_rows=8,
    )  # fmt: skip
    data.prepare_data()
    data.setup()
    target = load_target("embedded")
    held_out = open_trace(FOLDER / "validation")
    every = max(1, len(held_out) // args.prompts)  # documents of one file stand together
    chosen = range(0, len(held_out), every)[: args.prompts]
    prompts = [held_out.columns(i).input_ids[:64].tolist() for i in chosen]
    out = Path(args.out)
    runs: list[dict[str, Any]] = json.loads(out.read_text())["runs"] if out.exists() else []
    for name, family in families(target, args.seed, args.short_until).items():
        if args.family not in (None, name):
            continue
        family = replace(family, lr=args.lr or family.lr)
        print(f"{name}: lr {family.lr:g}, {args.seconds:g} s", flush=True)
        said = {"family": name, "seed": args.seed, "lr": family.lr, "seconds": args.seconds}
        said["short_until"] = getattr(family.drafter, "short_until", None)
        result = said | train(family, data, args.seconds, args.seed)
        print(json.dumps(result), flush=True)
        result["tau"] = measure(family, target, prompts, args.new)
        print(json.dumps(result["tau"]), flush=True)
        runs = [run for run in runs if (run["family"], *key(run)) != (name, *key(result))] + [result]
    report = {
        "command": "python benchmarks/families.py " + " ".join(sys.argv[1:]),
        "date": str(date.today()), "machine": device_name(), "torch": torch.__version__,
        "train_tokens": data.train_packing.num_tokens, "prompts": len(prompts), "new_tokens": args.new,
        "runs": runs, "summary": summary(runs),
    }  # fmt: skip
    out.write_text(json.dumps(report, indent=1) + "\n")


def key(run: dict[str, Any]) -> tuple[int, float]:
    """Runs that compare: one seed, one training time."""
    return run["seed"], run["seconds"]


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Ratios between families of one seed and training time."""
    by = {(run["family"], key(run)): run["tau"] for run in runs}
    pairs = {
        "eagle/causal, chain of 4": (("eagle", "chain_4"), ("causal", "chain_4")),
        "block/causal, chain of 4": (("block", "chain_4"), ("causal", "chain_4")),
        "block, best-first 32/chain of 7": (("block", "best_first_32"), ("block", "chain_7")),
    }
    found: dict[str, Any] = {}
    for seed, seconds in sorted({key(run) for run in runs}):
        at = (seed, seconds)
        for name, (over, under) in pairs.items():
            if (over[0], at) in by and (under[0], at) in by:
                ratio = by[over[0], at][over[1]] / by[under[0], at][under[1]]
                found.setdefault(name, {})[f"seed {seed}, {seconds:g} s"] = round(ratio, 4)
    return found


if __name__ == "__main__":
    main()
