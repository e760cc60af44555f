"""Hidden states from a vLLM server against those computed here: the same trace, and a head as good?

    certdraft real
    python tests/interop/environments.py vllm                   # once: vLLM's CPU build, 3.4 GB
    python benchmarks/served_features.py --run runs/real        # about 15 minutes on two cores

The target in fp32 records prompts here and from a vLLM server that is started by the line which `certdraft
trace` prints; tokens, top-k logits and hidden states are compared row by row. Then an EAGLE-3 head is trained
twice from one seed by `certdraft fit`, from the hidden states of the stored trace and from those that the
server computes for each batch, and both are judged on held-out prompts by exact replay, paired by prompt.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engines import target_folder
from real_losses import fit_and_export

from certdraft.data import (
    Corpus,
    Generation,
    Prompts,
    Recording,
    Server,
    load_target,
    open_trace,
    record_trace,
)
from certdraft.data.record.server.serve_command import layers_folder, serve_command
from certdraft.decoding import Chain, device_name
from certdraft.drafters import load_drafter
from certdraft.evaluation import compare_ratios, greedy_documents, pooled_ratio, replay_lengths
from certdraft.evaluation.measure.trace_reading import features_for
from certdraft.support import write_json
from certdraft.train.commands.real import held_out_prompts, target_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from interop.environments import ready
from interop.serving import served

# its CPU build lacks the pinned memory that its connector copies to
CPU_CONNECTOR = '"CpuHiddenStatesConnector", "kv_connector_module_path": "cpu_hidden_states"'


def compared(here: Path, there: Path) -> dict[str, Any]:
    """Two traces of the same prompts, row by row."""
    ours, theirs = open_trace(here), open_trace(there)
    equal_rows, equal, kept, differences, sizes = 0, 0, 0, [], []
    for index in range(len(ours)):
        one, other = ours.columns(index), theirs.columns(index)
        if not np.array_equal(one.input_ids, other.input_ids):
            continue
        equal_rows += 1
        steps = one.loss_mask
        equal += int((one.top_ids[steps, 0] == other.top_ids[steps, 0]).sum())
        kept += int(steps.sum())
        a, b = (
            trace.row(index).features[:-1].float() for trace in (ours, theirs)
        )  # a last one is never read
        differences.append((a - b).norm(dim=-1).flatten())
        sizes.append(a.norm(dim=-1).flatten())
    relative = torch.cat(differences) / torch.cat(sizes)
    return {
        "texts": len(ours),
        "texts_with_equal_tokens": equal_rows,
        "positions": kept,
        "positions_with_equal_greedy_token": equal,
        "hidden_states_relative_difference": {
            "median": float(relative.median()), "largest": float(relative.max()),
        },
    }  # fmt: skip


def trained(out: Path, name: str, layers: list[int], steps: int, options: list[str]) -> Path:
    """An exported EAGLE-3 head, trained where it is missing."""
    export = out / "exports" / name
    if not export.exists():
        taps = ["--model.drafter.init_args.config.target_layer_ids", str(layers)]
        fit_and_export("eagle3", name, out / "runs", steps, [*taps, *options], export)
    return export


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/real"), help="folder of `certdraft real`")
    parser.add_argument("--target", help="where it has moved; else the target of the run's trace")
    parser.add_argument("--prompts", type=int, default=128, help="to train on")
    parser.add_argument("--held_out", type=int, default=32)
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/served_features.json"))
    args = parser.parse_args()
    if not ready("vllm"):
        raise SystemExit("vLLM is not installed: python tests/interop/environments.py vllm")
    os.environ["no_proxy"] = "127.0.0.1"
    name, out = args.target or target_of(args.run), args.run / "served"
    folder = target_folder(args.run, name)
    layers = list(open_trace(args.run / "traces" / "train").meta.feature_layers)
    corpora = {
        "train": Corpus(str(args.run / "prompts.jsonl"), split="all", max_rows=args.prompts),
        "validation": Corpus(str(held_out_prompts()), split="all", max_rows=args.held_out),
    }
    settings: dict[str, Any] = {
        "target": str(folder.resolve()), "prompts": Prompts(max_prompt_tokens=160),
        "generation": Generation(96, max_length=256), "accelerator": "cpu",
    }  # fmt: skip
    shared = (out / "features").resolve()
    (shared / layers_folder(layers)).mkdir(parents=True, exist_ok=True)
    recording = Recording(settings["target"], generation=settings["generation"], feature_layers=tuple(layers))
    line = serve_command(recording, str(shared)).split(" && ")[1]
    words = shlex.split(line.replace('"ExampleHiddenStatesConnector"', CPU_CONNECTOR))[4:]
    seconds: dict[str, float] = {}

    def recorded(place: str, part: str, **more: Any) -> Path:
        start, path = time.perf_counter(), out / place / part
        record_trace(str(path), corpus=corpora[part], **settings, **more)
        seconds[f"{place}, {part}"] = time.perf_counter() - start
        return path

    engines = str(Path(__file__).resolve().parents[1] / "tests" / "interop" / "engines")
    with served(words, out / "server.log", PYTHONPATH=engines) as url:
        server = Server(url, concurrency=8, features_dir=str(shared))
        for part in corpora:
            recorded("here", part, feature_layers=tuple(layers))
            recorded("there", part, feature_layers=tuple(layers), server=server)
            recorded("without", part)
        found = {part: compared(out / "here" / part, out / "there" / part) for part in corpora}
        traces = {
            place: [f"--data.{part}={out / place / part}" for part in corpora]
            for place in ("here", "without")
        }
        stream = [
            "--data.feature_layers", str(layers), "--data.server.url", url,
            "--data.server.features_dir", str(shared), "--data.server.concurrency", "8",
        ]  # fmt: skip
        exports = {
            "stored": trained(out, "stored", layers, args.steps, traces["here"]),
            "streamed": trained(out, "streamed", layers, args.steps, [*traces["without"], *stream]),
        }
    target, trace = load_target(str(folder)), open_trace(out / "here" / "validation")
    drafters = {k: load_drafter(path, target=target, dtype="float32").eval() for k, path in exports.items()}
    lengths = {}
    for kind, drafter in drafters.items():
        features = features_for({"": drafter}, None, trace=trace)[""]
        chain = {"": Chain(4)}
        lengths[kind] = replay_lengths(drafter, greedy_documents(trace), chain, features=features)[""]
    counts = {kind: (one.tokens, one.passes) for kind, one in lengths.items()}
    data = {
        "command": "python benchmarks/served_features.py "
        f"--prompts {args.prompts} --held_out {args.held_out} --steps {args.steps}",
        "date": date.today().isoformat(),
        "device": device_name(),
        "target": Path(name).name,
        "traces": found,
        "seconds": seconds,
        "tau": {kind: vars(pooled_ratio(*pair)) for kind, pair in counts.items()},
        "streamed_over_stored": vars(compare_ratios(counts["streamed"], counts["stored"], "ratio")),
    }
    write_json(args.out, data)
    for part, row in found.items():
        print(f"{part}: {row}")
    print({kind: round(row["value"], 3) for kind, row in data["tau"].items()}, data["streamed_over_stored"])


if __name__ == "__main__":
    main()
