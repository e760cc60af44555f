"""Fixed node budgets against cost-aware trees on a real target: how many draft tokens should a pass verify?

    certdraft real
    python benchmarks/budgets.py --run runs/real          # about 20 minutes a drafter on two idle cores

*Measured.* For each drafter, in fp32 and in bf16, the cost of drafting and verifying is measured, and
held-out prompts are decoded for real with best-first trees of every fixed budget (for a block drafter that
is DDTree) and with cost-aware trees. The question of arXiv 2606.01813 is whether the cost-aware tree finds,
without a sweep, at least the speed of the best fixed budget. Methods take turns prompt by prompt; intervals
are 95 % bootstrap over prompts, the best fixed budget is chosen on the same prompts, which favours it.

*Simulated.* The same drafter's rounds are replayed on the same texts and priced as if a target of 8.2 B
parameters and a head of 0.4 B ran on one H100 for 1 to 128 requests side by side. Prices come from the data
sheet alone: a pass reads every weight once or is limited by arithmetic, whichever takes longer; the
drafter's price is a line between 1 and 65 nodes, and a DFlash drafter is priced as the same head.
Attention, the key-value cache, kernel launches and the host are left out, so only the order of the budgets
is of interest there.

What is measured is kept in RUN/budgets, file by file; a killed run goes on with what is missing.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

from certdraft.data import Generation, Prompts, load_target, load_tokenizer, tokenizer_fingerprint
from certdraft.decoding import BestFirst, CostAware, CostModel, TableClock, TargetRunner, profile, replay
from certdraft.decoding.cost.cost_model import Phase
from certdraft.drafters import load_drafter
from certdraft.evaluation import benchmark, compare_ratios, greedy_documents, pooled_ratio, read_questions
from certdraft.evaluation.generate_answers import WrittenMeta, write_texts
from certdraft.evaluation.measure.trace_reading import Document
from certdraft.support import Progress, write_json
from certdraft.train.commands.real import held_out_prompts, target_of

BUDGETS = (1, 2, 4, 8, 12, 16, 32, 48)
LOADS = (1, 4, 8, 16, 32, 64, 128)  # requests side by side
DEPTH = 7
# H100 SXM5, data sheet: memory bytes/s, dense bf16 operations/s; parameters of Qwen3-8B and an EAGLE-3 head
BYTES_S, OPERATIONS_S, TARGET, HEAD = 3.35e12, 989e12, 8.2e9, 0.4e9


class Laps:
    """A clock that keeps what it is asked, so that rounds can be priced afterwards by any cost model."""

    def __init__(self) -> None:
        self.laps: list[tuple[Phase, int, int]] = []

    def lap(self, phase: Phase, nodes: int = 0, context: int = 0) -> float:
        self.laps.append((phase, nodes, context))
        return 0.0

    def seconds(self, cost: CostModel) -> float:
        clock = TableClock(cost)
        return sum(clock.lap(*lap) for lap in self.laps)


def simulated_cost(requests: int, nodes: int = 256) -> CostModel:
    """Seconds of one pass while `requests` requests, each with a tree of this size, are served together."""

    def seconds(parameters: float, tokens: int) -> float:
        return max(2 * parameters / BYTES_S, 2 * parameters * tokens * requests / OPERATIONS_S)

    one, two = seconds(HEAD, 1), seconds(HEAD, 65)
    return CostModel.table(
        [seconds(TARGET, 1 + n) for n in range(nodes + 1)], one, draft_node_s=(two - one) / 64
    )


def texts(target: Any, name: str, prompts: int, tokens: int, dtype: str) -> list[Document]:
    """The target's own greedy answers to the held-out prompts."""
    tokenizer, size = load_tokenizer(name), target.get_output_embeddings().weight.shape[0]
    meta = WrittenMeta(name, tokenizer_fingerprint(tokenizer), dtype, 2, size)
    questions = read_questions(str(held_out_prompts()), prompts)
    generation = Generation(tokens, 2048)
    return greedy_documents(write_texts(target, tokenizer, questions, Prompts(turns="all"), generation, meta))


def measured(drafter: Any, target: Any, documents: Sequence[Document], cost: CostModel) -> dict[str, Any]:
    """Speeds of every fixed budget and of the cost-aware tree, and the ratio of the latter to each."""
    fixed = {f"fixed {n}": BestFirst(n, max_depth=min(n, DEPTH)) for n in BUDGETS}
    builders = {**fixed, "cost-aware": CostAware(cost, budget=BUDGETS[-1], max_depth=DEPTH)}
    with Progress("decoding", len(documents) * (1 + len(builders)), "texts") as progress:
        found = benchmark(target, {"": drafter}, documents, builders, progress=lambda: progress.advance(1))
    rows = {row["builder"]: row for row in found.summary()["methods"]}
    timings = {builder: found.methods["", builder] for builder in builders}
    best = max(fixed, key=lambda b: sum(timings[b].tokens) / sum(timings[b].seconds))
    ours = timings["cost-aware"]
    faults = [d for row in rows.values() for d in row["differing"] if not d["tie"]]
    kept = ("tau", "nodes_per_pass", "tokens_per_s", "speedup", "share", "equal_texts")
    return {
        "device": found.device,
        "prompts": len(documents),
        "tokens": sum(len(d.text) for d in documents),
        "plain_tokens_per_s": vars(pooled_ratio(found.plain.tokens, found.plain.seconds)),
        "methods": {builder: {key: row[key] for key in kept} for builder, row in rows.items()},
        "texts_that_differ_without_a_tie": len(faults),
        "largest_lead_nats": max(
            (d["target_lead"] or 0.0 for row in rows.values() for d in row["differing"]), default=0.0
        ),
        "best_fixed": best,
        "cost_aware_over": {
            b: vars(
                compare_ratios((ours.tokens, ours.seconds), (timings[b].tokens, timings[b].seconds), "ratio")
            )
            for b in fixed
        },
    }


@torch.inference_mode()
def simulated(drafter: Any, target: Any, documents: Sequence[Document]) -> dict[str, dict[str, Any]]:
    """Speed against plain decoding at every load: each fixed budget, and the cost-aware tree."""
    runner = TargetRunner(target, drafter.taps)
    features = [
        runner.features(runner.start([*d.prompt, *d.text[:-1]])) if drafter.taps else None for d in documents
    ]

    def laps(builder: Any) -> Laps:
        clock = Laps()
        for document, given in zip(documents, features, strict=True):
            replay(drafter, document.prompt, document.text, builder, features=given, clock=clock)
        return clock

    tokens = sum(len(d.text) for d in documents)
    with Progress("replaying", len(BUDGETS) + len(LOADS), "trees") as progress:
        fixed = {}
        for budget in BUDGETS:
            fixed[budget] = laps(BestFirst(budget, max_depth=min(budget, DEPTH)))
            progress.advance(1)
        found = {}
        for load in LOADS:
            cost = simulated_cost(load)
            plain = tokens * cost.verify_s(0, 0)
            speeds = {budget: plain / clock.seconds(cost) for budget, clock in fixed.items()}
            ours = laps(CostAware(cost, budget=BUDGETS[-1], max_depth=DEPTH))
            verified = [nodes for phase, nodes, _ in ours.laps if phase == "verify"]
            best = max(speeds, key=lambda budget: speeds[budget])
            found[f"{load} requests"] = {
                "fixed": speeds,
                "cost_aware": plain / ours.seconds(cost),
                "cost_aware_nodes": sum(verified) / len(verified),
                "best_fixed": best,
                "cost_aware_over_best_fixed": plain / ours.seconds(cost) / speeds[best],
            }
            progress.advance(1)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/real"), help="folder of `certdraft real`")
    parser.add_argument("--target", help="where it has moved; else the target of the run's trace")
    parser.add_argument("--drafters", nargs="+", default=["eagle3", "dflash"])
    parser.add_argument("--dtypes", nargs="+", default=["float32", "bfloat16"])
    parser.add_argument("--prompts", type=int, default=24)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/budgets.json"))
    args = parser.parse_args()
    name = args.target or target_of(args.run)
    parts = args.run / "budgets"
    data: dict[str, Any] = {}
    for dtype in args.dtypes:
        target = load_target(name, dtype=getattr(torch, dtype))
        documents: list[Document] = []
        for kind in args.drafters:
            file = parts / f"{kind}-{dtype}.json"
            asked = {"prompts": args.prompts, "new_tokens": args.tokens, "threads": torch.get_num_threads()}
            stored = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
            if stored.get("asked") != asked:
                documents = documents or texts(target, name, args.prompts, args.tokens, dtype)
                drafter = load_drafter(args.run / "exports" / kind, target=target, dtype=dtype).eval()
                cost = profile(target, drafter, contexts=(32, 128, 256), nodes=(0, *BUDGETS), repeats=12)
                part = {"asked": asked, **measured(drafter, target, documents, cost)}
                part["verify_ms"] = [[1e3 * s for s in row] for row in cost.measured["verify_s"]]
                part["draft_ms"] = [1e3 * s for s, _ in cost.draft]
                if dtype == args.dtypes[0]:
                    part["simulated"] = simulated(drafter, target, documents)
                parts.mkdir(exist_ok=True)
                write_json(file, part)
                stored = json.loads(file.read_text(encoding="utf-8"))
            data[f"{kind}, {dtype}"] = stored
    data |= {
        "command": f"python benchmarks/budgets.py --drafters {' '.join(args.drafters)} "
        f"--prompts {args.prompts} --tokens {args.tokens}",
        "date": date.today().isoformat(),
        "target": Path(name).name,
        "nodes_profiled": [0, *BUDGETS],
    }
    write_json(args.out, data)
    print(
        f"{args.out}: "
        + "; ".join(
            f"{label}: {part['cost_aware_over'][part['best_fixed']]['value']:.2f} of {part['best_fixed']}"
            for label, part in data.items()
            if isinstance(part, dict)
        )
    )


if __name__ == "__main__":
    main()
