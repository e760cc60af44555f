"""Speed of the acceptance certificates, as ratios measured in one run.

    python benchmarks/certificates.py                  # 2 minutes, 1.5 GB, one thread
    python benchmarks/certificates.py --device cuda --rows 8192

Three questions: what the radii of all rules cost on full probabilities, against one `torch.topk(p, 9)` and
one entropy pass over the same tensor; how much wider trees cost (m = 32 against m = 1); and how many steps a
second the heads of a trace give. The plain entropy pass is −(p * p.log()).sum(-1); `entropy` is this
package's, which works in the cache, and makes the stricter baseline.

Rows come in two kinds. *language*: heads as sharp as those of a small language model over a flat tail.
*flat*: softmax of Gaussian logits, perplexity in the thousands, where typical acceptance takes in hundreds of
tokens and leaves the fast path on every row. On a CPU the times are process times, the least of the repeats,
because the machine may be shared; on CUDA they are wall times.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
from torch import Tensor

from certdraft.certificates import (
    Additive,
    Coverage,
    Head,
    Multiplicative,
    Rule,
    StrictGreedy,
    TopM,
    Typical,
    entropy,
    radii,
    radius,
)
from certdraft.decoding import device_name

RULES: tuple[Rule, ...] = (
    StrictGreedy(),
    Additive(0.1),
    Multiplicative(0.5),
    TopM(4, t=0.1),
    Typical(0.1, 0.09),
    Coverage(4),
)
KEPT = 32


def gaps(rows: int, kept: int, generator: torch.Generator) -> Tensor:
    """Logit gaps of a model whose confidence varies from step to step, [rows, kept]."""
    sharpness = torch.exp(1.2 * torch.randn(rows, 1, generator=generator) + 0.9)
    steps = torch.empty(rows, kept - 1).exponential_(generator=generator)
    found = (steps * sharpness * torch.linspace(1.0, 0.2, kept - 1)).cumsum(-1)
    return torch.cat([torch.zeros(rows, 1), found], dim=-1)


def language_rows(rows: int, vocab_size: int) -> Tensor:
    """Probabilities with a sharp head of 16 tokens and a tail of 1e-4 to 0.1 of the mass."""
    generator = torch.Generator().manual_seed(0)
    head = (-gaps(rows, 16, generator)).softmax(-1)
    tail = (3 * torch.randn(rows, vocab_size - 16, generator=generator)).softmax(-1)
    rest = 10 ** (-1 - 3 * torch.rand(rows, 1, generator=generator))
    p = torch.cat([head * (1 - rest), tail * rest], dim=-1)
    return p[:, torch.randperm(vocab_size, generator=generator)]


def flat_rows(rows: int, vocab_size: int) -> Tensor:
    """Probabilities without a head."""
    generator = torch.Generator().manual_seed(0)
    return (3 * torch.randn(rows, vocab_size, generator=generator)).softmax(-1)


def trace_heads(steps: int, vocab_size: int) -> Head:
    """Heads as a trace stores them."""
    generator = torch.Generator().manual_seed(0)
    gap = gaps(steps, KEPT, generator)
    rest = 10 ** (-1 - 3 * torch.rand(steps, generator=generator))
    lse_gap = ((-gap).exp().sum(-1) / (1 - rest)).log()
    p = (-gap - lse_gap.unsqueeze(-1)).exp()
    entropy = torch.special.entr(p).sum(-1) + rest * (7 - rest.log())
    return Head(torch.arange(KEPT).expand(steps, KEPT), gap, lse_gap, vocab_size, entropy)


def seconds(work: dict[str, Callable[[], object]], repeats: int, device: str) -> dict[str, float]:
    """Least time of each piece of work; the pieces take turns, so that a busy minute hits all alike."""
    clock = time.process_time if device == "cpu" else time.perf_counter
    best = dict.fromkeys(work, float("inf"))
    for repeat in range(repeats + 1):
        for name, run in work.items():
            start = clock()
            run()
            if device != "cpu":
                torch.cuda.synchronize()
            if repeat:  # the first round warms up
                best[name] = min(best[name], clock() - start)
    return best


def measure_dense(p: Tensor, repeats: int) -> dict[str, object]:
    """Microseconds a row, and the ratios the project holds itself to."""
    work: dict[str, Callable[[], object]] = {
        "topk(p, 9)": lambda: p.topk(9),
        "entropy pass": lambda: -(p * p.log()).sum(-1),
        "entropy(p)": lambda: entropy(p),
        "all rules, one call": lambda: radii(p, RULES),
        "all rules, one call, reverse": lambda: radii(p, RULES, "reverse"),
        "coverage(m=1)": lambda: radius(p, Coverage(1)),
        "coverage(m=32)": lambda: radius(p, Coverage(32)),
    }
    work |= {f"alone: {rule}": lambda rule=rule: radius(p, rule) for rule in RULES}
    times = seconds(work, repeats, p.device.type)
    baseline = times["topk(p, 9)"] + times["entropy pass"]
    alone = sum(times[f"alone: {rule}"] for rule in RULES)
    return {
        "microseconds_per_row": {name: round(1e6 * t / len(p), 1) for name, t in times.items()},
        "all_rules_over_baseline": round(times["all rules, one call"] / baseline, 3),
        "all_rules_over_stricter_baseline": round(
            times["all rules, one call"] / (times["topk(p, 9)"] + times["entropy(p)"]), 3
        ),
        "all_rules_one_by_one_over_baseline": round(alone / baseline, 3),
        "m32_over_m1": round(times["coverage(m=32)"] / times["coverage(m=1)"], 3),
    }


def measure_heads(head: Head, repeats: int) -> dict[str, float]:
    """Million steps a second for each rule."""
    rules = (*RULES, Coverage(1), Coverage(31))
    work = {str(rule): lambda rule=rule: radius(head, rule) for rule in rules}
    times = seconds(work, repeats, head.device.type)
    return {name: round(len(head.lse_gap) / t / 1e6, 2) for name, t in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=int, default=128, help="rows of probabilities (the goal is stated for 8192)"
    )
    parser.add_argument("--vocab", type=int, default=151_936)
    parser.add_argument("--steps", type=int, default=262_144, help="steps of the heads")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "certificates.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()
    result = {
        "command": "python benchmarks/certificates.py " + " ".join(sys.argv[1:]),
        "date": date.today().isoformat(),
        "machine": f"{device_name()} of {os.cpu_count()}, load {load[0]:.1f} at the start",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "clock": "process time" if args.device == "cpu" else f"wall time on {torch.cuda.get_device_name()}",
        "rows": args.rows,
        "vocab": args.vocab,
        "rules": [str(rule) for rule in RULES],
        "dense": {
            "language": measure_dense(language_rows(args.rows, args.vocab).to(args.device), args.repeats),
            "flat": measure_dense(flat_rows(args.rows, args.vocab).to(args.device), args.repeats),
        },
        "heads_million_steps_per_second": measure_heads(
            trace_heads(args.steps, args.vocab).to(args.device), args.repeats
        ),
    }
    text = json.dumps(result, indent=1)
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
