"""What limits a head: one EAGLE-3 head on its training text, on validation text and on held-out prompts.

    certdraft real
    python benchmarks/generalisation.py --run runs/real     # about 3 minutes on two cores

Coverage of the target's greedy token by the head's one and four best tokens, and τ of a chain and of a tree
by exact replay, on as many greedy answers of the target each: some of the training trace, the validation
trace (other prompts that the target wrote), and answers to the prompts that ship for measuring. The fall from
the first to the second is what more text of the same kind would mend; that to the third, other kinds of text.
Intervals are 95 % bootstrap over prompts.
"""

from __future__ import annotations

import argparse
from datetime import date
from pathlib import Path
from typing import Any

from certdraft.data import Corpus, Generation, Prompts, load_target, open_trace, record_trace
from certdraft.decoding import BestFirst, Chain
from certdraft.drafters import load_drafter
from certdraft.evaluation import greedy_documents, measure_acceptance, pooled_ratio, replay_lengths
from certdraft.evaluation.measure.trace_reading import features_for
from certdraft.support import write_json
from certdraft.train.commands.real import held_out_prompts, target_of

BUILDERS = {"chain 4": Chain(4), "best-first 32": BestFirst(32, max_depth=7)}


def measured(drafter: Any, path: Path, texts: int) -> dict[str, Any]:
    """Coverage and τ on the first answers of a trace."""
    trace = open_trace(path)
    features = features_for({"": drafter}, None, trace=trace)[""]
    lengths = replay_lengths(drafter, greedy_documents(trace)[:texts], BUILDERS, features=features)
    acceptance = measure_acceptance(drafter, trace, features=features, max_documents=texts)
    found = {f"coverage@{m}": vars(pooled_ratio(*acceptance.coverage_counts(m, False))) for m in (1, 4)} | {
        f"tau, {name}": vars(pooled_ratio(one.tokens, one.passes)) for name, one in lengths.items()
    }
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/real"), help="folder of `certdraft real`")
    parser.add_argument("--target", help="where it has moved; else the target of the run's trace")
    parser.add_argument("--texts", type=int, default=64)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/generalisation.json"))
    args = parser.parse_args()
    name, traces = args.target or target_of(args.run), args.run / "traces"
    test = args.run / "losses" / "test-trace"  # that of real_losses.py
    if not (test / "trace.json").exists():
        record_trace(
            str(test), target=name, corpus=Corpus(str(held_out_prompts()), split="all", max_rows=args.texts),
            prompts=Prompts(max_prompt_tokens=160), generation=Generation(128, max_length=512),
            dtype="bfloat16", feature_layers=open_trace(traces / "train").meta.feature_layers,
            accelerator="cpu",
        )  # fmt: skip
    drafter = load_drafter(args.run / "exports" / "eagle3", target=load_target(name), dtype="float32").eval()
    parts = {"training": traces / "train", "validation": traces / "validation", "held-out prompts": test}
    found = {part: measured(drafter, path, args.texts) for part, path in parts.items()}
    learned = open_trace(traces / "train").meta.num_counted
    data = {
        "command": f"python benchmarks/generalisation.py --texts {args.texts}",
        "date": date.today().isoformat(),
        "target": Path(name).name,
        "learned_tokens": learned,
        "texts": found,
    }
    write_json(args.out, data)
    for part, row in found.items():
        print(part, {label: round(value["value"], 3) for label, value in row.items()})


if __name__ == "__main__":
    main()
