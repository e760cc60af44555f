"""One drafter in four engines: tokens/s with and without it, same prompts, precision and draft length.

    certdraft real
    python tests/interop/environments.py vllm llamacpp openvino    # once: the engines, 5 GB
    python benchmarks/engines.py --run runs/real                   # about 8 minutes on two idle cores

certdraft's own loop, vLLM (CPU build, eager), llama.cpp and OpenVINO GenAI decode held-out prompts greedily,
one at a time, in fp32, by chains of `--draft_length` tokens. Every engine decodes every prompt plainly and
with each drafter; the first prompt warms up. Speed-ups are within an engine, paired by prompt, with 95 %
bootstrap intervals. End-of-text tokens are ignored, and prompts whose greedy text has a special token are
left out. The target in bf16, copies of the exports and what engines make of them lie in RUN/engines. An
engine that is not installed is left out.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import time
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from certdraft.data import load_target, load_tokenizer
from certdraft.data.record.recording import target_revision
from certdraft.decoding import Chain, TargetRunner, decode, device_name, greedy
from certdraft.drafters import load_drafter
from certdraft.evaluation import compare_ratios, pooled_ratio, read_questions
from certdraft.support import Progress, write_json
from certdraft.train.commands.real import held_out_prompts, target_of

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests"))
from interop.engines_run import run as run_engine
from interop.environments import ready

ENGINES = {"vllm": "vLLM", "llamacpp": "llama.cpp", "openvino": "OpenVINO GenAI"}
FAMILIES = ("eagle3", "causal")
PLAIN = "plain"
Run = dict[str, Any]  # tokens and seconds of every prompt, and an engine's counters


def read_prompts(
    target: Any, tokenizer: Any, count: int, tokens: int
) -> tuple[list[list[int]], list[list[int]]]:
    """Held-out prompts in the chat template whose greedy text has no special token, and these texts."""
    prompts, texts = [], []
    for question in read_questions(str(held_out_prompts())):
        chat = [{"role": "user", "content": question.turns[0]}]
        ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)["input_ids"]
        text = greedy(target, ids, tokens)
        if not {*tokenizer.all_special_ids} & {*text}:
            prompts.append(ids)
            texts.append(text)
        if len(prompts) == count:
            break
    return prompts, texts


def target_folder(run: Path, name: str) -> Path:
    """The target as a folder in bf16, which engines read; made once for its weights."""
    folder = run / "engines" / target_revision(name, None) / "target"
    if not folder.is_dir():
        partial = folder.with_name("target.partial")
        load_target(name, dtype=torch.bfloat16).save_pretrained(partial)
        load_tokenizer(name).save_pretrained(partial)
        partial.rename(folder)
    return folder


def copied(export: Path, work: Path) -> Path:
    """A copy of an export that engines may add their conversions to, named after its weights."""
    copy = work / f"{export.name}-{target_revision(str(export), None)}"
    if not copy.is_dir():
        shutil.copytree(export, copy)
    return copy


def own_loop(target: Any, drafter: Any | None, prompts: Sequence[list[int]], tokens: int, length: int) -> Run:
    """certdraft's loop."""
    runner = TargetRunner(target, drafter.taps if drafter else ())
    found: Run = {"tokens": [], "seconds": [], "passes": 0}
    for prompt in prompts:
        start = time.perf_counter()
        if drafter is None:
            found["tokens"].append(greedy(runner, prompt, tokens))
        else:
            result = decode(runner, drafter, prompt, Chain(length), max_new_tokens=tokens)
            found["tokens"].append(result.tokens)
            found["passes"] += len(result.rounds)
        found["seconds"].append(time.perf_counter() - start)
    return found


def tau(run: Run, prompts: int) -> float:
    """Tokens a target pass. Engines produce the first token of a text in the pass over its prompt."""
    if "drafts" in run:  # vLLM
        return 1 + run["accepted"] / run["drafts"]
    tokens = sum(map(len, run["tokens"]))
    if "drafted" in run:  # llama.cpp counts no passes; each adds one token to those accepted
        return (tokens - prompts) / (tokens - prompts - run["accepted"])
    return tokens / run["passes"] if "accepted" not in run else (tokens - prompts) / run["passes"]


def row(run: Run, plain: Run, texts: list[list[int]], length: int) -> dict[str, Any]:
    """One drafter in one engine."""
    if "error" in run or "error" in plain:
        return {"error": run.get("error") or plain["error"]}
    with_, without = (
        ([float(len(tokens)) for tokens in found["tokens"][1:]], found["seconds"][1:])
        for found in (run, plain)
    )
    return {
        "tokens_per_s_without": vars(pooled_ratio(*without)),
        "tokens_per_s_with": vars(pooled_ratio(*with_)),
        "speedup": vars(compare_ratios(with_, without, "ratio")),
        "tau": tau(run, len(texts)),
        "draft_length": length,
        "texts": len(texts),
        "equal_texts": sum(a == b for a, b in zip(run["tokens"], texts, strict=True)),
        "equal_texts_without": sum(a == b for a, b in zip(plain["tokens"], texts, strict=True)),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/real"), help="folder of `certdraft real`")
    parser.add_argument("--target", help="where it has moved; else the target of the run's trace")
    parser.add_argument("--engines", nargs="*", choices=list(ENGINES), default=list(ENGINES))
    parser.add_argument("--prompts", type=int, default=12)
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--draft_length", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/engines.json"))
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    os.environ["OMP_NUM_THREADS"] = str(args.threads)  # of vLLM
    name = args.target or target_of(args.run)
    folder = target_folder(args.run, name)
    work, tokenizer, target = folder.parent, load_tokenizer(name), load_target(str(folder))
    prompts, texts = read_prompts(target, tokenizer, args.prompts + 1, args.tokens)
    exports = {
        f: copied(args.run / "exports" / f, work) for f in FAMILIES if (args.run / "exports" / f).is_dir()
    }
    drafters = {family: load_drafter(path, target=target).eval() for family, path in exports.items()}
    common = {
        "target": str(folder.resolve()), "work": str(work.resolve()), "num_tokens": args.draft_length,
        "max_new_tokens": args.tokens, "prompts": prompts, "threads": args.threads,
    }  # fmt: skip
    jobs = [{"name": PLAIN, "family": "causal", **common}]
    for family, export in exports.items():
        taps = list(drafters[family].taps)
        jobs.append(
            {"name": family, "family": family, "drafter": str(export.resolve()), "taps": taps, **common}
        )
    runs: dict[str, dict[str, Run]] = {}
    versions = {"certdraft": f"certdraft {version('certdraft')}, torch {torch.__version__}"}
    with Progress("engines", 1 + len(args.engines), "engines") as progress:
        loops = {family: drafters.get(family) for family in (PLAIN, *drafters)}
        runs["certdraft"] = {
            family: own_loop(target, drafter, prompts, args.tokens, args.draft_length)
            for family, drafter in loops.items()
        }
        progress.advance(1)
        for engine in args.engines:
            if ready(engine):
                found = run_engine(engine, jobs)
                runs[engine], versions[engine] = found["runs"], found.get("version", engine)
            else:
                print(f"{ENGINES[engine]} is not installed: tests/interop/environments.py {engine}")
            progress.advance(1)
    data = {
        "command": f"python benchmarks/engines.py --prompts {args.prompts} --tokens {args.tokens} "
        f"--draft_length {args.draft_length} --threads {args.threads}",
        "date": date.today().isoformat(),
        "device": device_name(),
        "target": Path(name).name,
        "precision": "fp32",
        "versions": versions,
        "engines": {
            engine: {family: row(found[family], found[PLAIN], texts, args.draft_length) for family in exports}
            for engine, found in runs.items()
        },
    }
    write_json(args.out, data)
    for engine, rows in data["engines"].items():
        for family, found in rows.items():
            if "error" in found:
                print(f"{engine:10} {family:8} {found['error']}")
                continue
            without, with_ = (found[f"tokens_per_s_{arm}"]["value"] for arm in ("without", "with"))
            speedup = found["speedup"]
            print(
                f"{engine:10} {family:8} {without:6.1f} → {with_:6.1f} tokens/s, {speedup['value']:.2f} "
                f"[{speedup['low']:.2f}, {speedup['high']:.2f}], τ {found['tau']:.2f}, "
                f"{found['equal_texts']} of {found['texts']} texts equal"
            )


if __name__ == "__main__":
    main()
