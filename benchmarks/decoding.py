"""Speed of decoding, as ratios measured in one run.

    python benchmarks/decoding.py                  # about 5 minutes, one thread
    python benchmarks/decoding.py --device cuda

Four questions. *Loop*: the chain against `generate(assistant_model=…)` of transformers, same models, same
schedule of 4 draft tokens, same texts. *Replay*: the same rounds from the recorded text, against decoding
them. *Trees*: selecting 256 nodes and making their mask. *Budgets*: a cost-aware tree against the best of the
fixed ones on mixed prompts (contexts of 8 to 384 tokens, half of the prompts repetitive), with a cost model
measured in the same run.

Loop and replay use the embedded target on Python text with two drafters: the target with 15 % noise, and its
first two layers. They cost as much as they save: loops are compared there, not speed-up. Budgets need a
drafter that is cheap: a random target of 16 layers whose deeper layers add little, drafted for by its first
layer.

On a CPU the times are process times of one thread, because the machine may be shared; on CUDA they are wall
times. Methods take turns prompt by prompt; ratios are of sums, intervals are 95 % bootstrap over prompts.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from datetime import date
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from certdraft.data import load_target, load_tokenizer, standard_library
from certdraft.decoding import (
    BestFirst,
    Chain,
    CostAware,
    DecodeResult,
    NodeStream,
    TargetRunner,
    TreeBuilder,
    decode,
    device_name,
    greedy,
    profile,
    replay,
)
from certdraft.decoding.trees.ranking import top_rows
from certdraft.decoding.trees.tree import tree_from_nodes
from certdraft.drafters import CausalDrafter, TreeCache
from certdraft.evaluation import compare_ratios, pooled_ratio

_SHARPNESS = 2.5  # of the layered pair's head
SIZES = ("hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")


class Work:
    """Seconds of work: process time on a CPU, wall time on CUDA; also a clock for `profile`."""

    def __init__(self, device: str) -> None:
        self.cuda = device.startswith("cuda")
        self.last = self.now()

    def now(self) -> float:
        if not self.cuda:
            return time.process_time()
        torch.cuda.synchronize()
        return time.perf_counter()

    def lap(self, phase: str, nodes: int = 0, context: int = 0) -> float:
        last, self.last = self.last, self.now()
        return self.last - last

    def __call__(self, run: Callable[[], Any]) -> tuple[float, Any]:
        start = self.now()
        found = run()
        return self.now() - start, found


def drafter_of(model: PreTrainedModel, layers: int) -> CausalDrafter:
    """A causal drafter with the first layers of a model."""
    config = {key: getattr(model.config, key) for key in SIZES} | {
        "num_hidden_layers": layers,
        "tie_word_embeddings": model.config.tie_word_embeddings,
        "rope_theta": model.config.rope_parameters["rope_theta"],
        "max_position_embeddings": model.config.max_position_embeddings,
    }
    drafter = CausalDrafter(config=config, vocab_size=model.config.vocab_size).to(model.device).eval()
    drafter.model.load_state_dict(model.state_dict(), strict=False)
    return drafter


def noisy(drafter: CausalDrafter, scale: float) -> CausalDrafter:
    """The drafter with noise of that relative size in every matrix."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for weight in drafter.parameters():
            if weight.ndim == 2:
                draw = torch.randn(weight.shape, generator=generator).to(weight.device)
                weight += scale * weight.std() * draw
    return drafter


def python_prompts(count: int, tokens: int = 48) -> list[list[int]]:
    """The beginnings of standard-library files."""
    words = load_tokenizer()
    texts = (document.text for document in standard_library("test"))
    return [
        ids
        for text in islice(texts, count)
        if len(ids := words(text[: 20 * tokens])["input_ids"][:tokens]) == tokens
    ]


def ratio(first: Sequence[tuple[float, float]], second: Sequence[tuple[float, float]]) -> list[float]:
    """Tokens per second of one method over another's, with its interval; pairs are (tokens, seconds)."""
    columns = [tuple(zip(*pairs, strict=True)) for pairs in (first, second)]
    found = compare_ratios(columns[0], columns[1], "ratio")
    return [round(x, 3) for x in (found.value, found.low, found.high)]


def rate(pairs: Sequence[tuple[float, float]]) -> float:
    """Tokens per second."""
    return round(pooled_ratio(*zip(*pairs, strict=True)).value, 1)


def measure_loop(device: str, prompts: int, tokens: int, repeats: int) -> dict[str, Any]:
    """Chain and its replay against assisted generation, per drafter."""
    model = load_target(device=device)
    target, work = TargetRunner(model), Work(device)
    model.generation_config.eos_token_id = None
    drafters = {
        "target with 15 % noise": noisy(drafter_of(model, model.config.num_hidden_layers), 0.15),
        "first 2 of 8 layers": drafter_of(model, 2),
    }
    texts = python_prompts(prompts)
    found: dict[str, Any] = {"prompts": len(texts), "new_tokens": tokens, "repeats": repeats}
    for name, drafter in drafters.items():
        assistant = assistant_of(drafter)
        took: dict[str, list[tuple[float, float]]] = {}
        rounds: list[DecodeResult] = []
        shares: list[float] = []
        for prompt in texts * repeats:
            expected = greedy(target, prompt, tokens)
            methods: dict[str, Callable[[], Any]] = {
                "generate(assistant_model)": lambda p=prompt, a=assistant: assisted(model, a, p, tokens),
                "decode(Chain(4))": lambda p=prompt, d=drafter: decode(
                    target, d, p, Chain(4), max_new_tokens=tokens
                ),
                "replay(Chain(4))": lambda p=prompt, d=drafter, e=expected: replay(d, p, e, Chain(4)),
                "decode(BestFirst(16))": lambda p=prompt, d=drafter: decode(
                    target, d, p, BestFirst(16), max_new_tokens=tokens
                ),
                "replay(BestFirst(16))": lambda p=prompt, d=drafter, e=expected: replay(
                    d, p, e, BestFirst(16)
                ),
                "plain": lambda p=prompt: greedy(target, p, tokens),
            }
            results: dict[str, Any] = {}
            for label, run in methods.items():
                seconds, results[label] = work(run)
                took.setdefault(label, []).append((tokens, seconds))
            for label, result in results.items():
                text = result.tokens if isinstance(result, DecodeResult) else result
                assert text == expected, f"{name}: {label} is not the target's greedy text"
            for tree in ("Chain(4)", "BestFirst(16)"):
                live, again = results[f"decode({tree})"], results[f"replay({tree})"]
                assert [r.accepted for r in live.rounds] == [r.accepted for r in again.rounds], (
                    f"{name}: {tree}"
                )
            rounds.append(results["decode(Chain(4))"])
            shares.append(sum(r.host_s for r in rounds[-1].rounds) / rounds[-1].seconds)
        found[name] = {
            "tokens_per_second": {label: rate(pairs) for label, pairs in took.items()},
            "tau_chain": round(sum(len(r.tokens) for r in rounds) / sum(len(r.rounds) for r in rounds), 3),
            "outside_both_models": round(statistics.mean(shares), 3),
            "chain_over_assisted": ratio(took["decode(Chain(4))"], took["generate(assistant_model)"]),
            "replay_over_live": {
                tree: ratio(took[f"replay({tree})"], took[f"decode({tree})"])
                for tree in ("Chain(4)", "BestFirst(16)")
            },
        }
    return found


def assistant_of(drafter: CausalDrafter) -> PreTrainedModel:
    """The drafter's model with a constant schedule of 4 tokens, as our chain has."""
    assistant = copy.deepcopy(drafter.model)
    settings = assistant.generation_config
    settings.num_assistant_tokens, settings.num_assistant_tokens_schedule = 4, "constant"
    settings.assistant_confidence_threshold, settings.eos_token_id = 0.0, None
    return assistant


def assisted(model: Any, assistant: PreTrainedModel, prompt: list[int], tokens: int) -> list[int]:
    """The new tokens of assisted generation."""
    ids = torch.tensor([prompt], device=model.device)
    mask = torch.ones_like(ids)
    plain = {"do_sample": False, "max_new_tokens": tokens, "pad_token_id": 0}
    with torch.inference_mode():
        out: Tensor = model.generate(ids, attention_mask=mask, assistant_model=assistant, **plain)
    return out[0, len(prompt) :].tolist()


def measure_trees(nodes: int = 256, depth: int = 8, repeats: int = 31) -> dict[str, Any]:
    """Milliseconds to select the best nodes, and to make their mask behind 512 tokens."""
    rows = top_rows(2 * torch.randn(depth, 32_000, generator=torch.Generator().manual_seed(0)), nodes)
    work = Work("cpu")
    select, mask = [], []
    for _ in range(repeats):
        seconds, tree = work(
            lambda: tree_from_nodes(
                0,
                list(
                    islice(NodeStream(lambda ranks: rows[len(ranks)] if len(ranks) < depth else None), nodes)
                ),
                lambda ranks: -1,
            )
        )
        select.append(seconds)
        cache = TreeCache(1, 1024)
        cache.length = 512

        def make(tree: Any = tree, cache: TreeCache = cache) -> Tensor | None:
            cache.append(tree.parents)
            return cache.mask(nodes + 1, torch.float32, torch.device("cpu"))

        mask.append(work(make)[0])
    return {
        "nodes": nodes,
        "select_ms": round(1000 * statistics.median(select[1:]), 2),
        "mask_ms": round(1000 * statistics.median(mask[1:]), 2),
    }


def layered_pair(device: str) -> tuple[PreTrainedModel, CausalDrafter]:
    """A random target whose deeper layers add little, and its first layer as the drafter."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 256, "intermediate_size": 768, "num_attention_heads": 4, "num_key_value_heads": 2,
        "head_dim": 64, "vocab_size": 1024, "num_hidden_layers": 16, "max_position_embeddings": 1024,
        "initializer_range": 0.1, "tie_word_embeddings": False,
    }  # fmt: skip
    model: Any = Qwen3ForCausalLM(Qwen3Config(**sizes)).eval().requires_grad_(False)
    with torch.no_grad():
        model.lm_head.weight *= _SHARPNESS
        for layer in model.model.layers[1:]:
            layer.self_attn.o_proj.weight *= 0.04
            layer.mlp.down_proj.weight *= 0.04
    model.to(device)
    return model, drafter_of(model, 1)


def mixed_prompts(count: int, vocab_size: int) -> list[list[int]]:
    """Random texts of 8 to 384 tokens, every other one the repetition of a few."""
    generator = torch.Generator().manual_seed(3)
    prompts = []
    for index, length in enumerate(torch.linspace(8, 384, count).int().tolist()):
        ids = torch.randint(vocab_size, (length,), generator=generator)
        prompts.append((ids if index % 2 else ids[:6].repeat(length // 6 + 1)[:length]).tolist())
    return prompts


def measure_budgets(device: str, prompts: int, tokens: int) -> dict[str, Any]:
    """Cost-aware trees against fixed ones, tokens per second over mixed prompts."""
    model, drafter = layered_pair(device)
    target, work = TargetRunner(model), Work(device)
    cost = profile(target, drafter, (16, 128, 512), (0, 1, 2, 4, 8, 16, 32, 64), clock=work)
    fixed: dict[str, TreeBuilder] = {
        f"BestFirst({n}{', temperature=0.5' if t != 1 else ''})": BestFirst(n, max_depth=6, temperature=t)
        for n in (4, 8, 16, 32)
        for t in (1.0, 0.5)
    } | {f"Chain({n})": Chain(n) for n in (2, 4, 6)}
    aware: dict[str, TreeBuilder] = {
        f"CostAware({stop})": CostAware(cost, stop, max_depth=6) for stop in ("lambda", "ratio", "safe")
    }
    took: dict[str, list[tuple[float, float]]] = {}
    results: dict[str, list[DecodeResult]] = {}
    for prompt in mixed_prompts(prompts, model.config.vocab_size):
        seconds, expected = work(lambda p=prompt: greedy(target, p, tokens))
        took.setdefault("plain", []).append((tokens, seconds))
        for label, builder in (fixed | aware).items():
            seconds, result = work(
                lambda p=prompt, b=builder: decode(target, drafter, p, b, max_new_tokens=tokens)
            )
            assert result.tokens == expected, f"{label} is not the target's greedy text"
            took.setdefault(label, []).append((tokens, seconds))
            results.setdefault(label, []).append(result)
    best = max(fixed, key=lambda label: rate(took[label]))
    return {
        "prompts": prompts,
        "new_tokens": tokens,
        "cost_model_ms": {
            "draft": [round(1000 * first, 2) for first, _ in cost.draft],
            "verify": [[round(1000 * s, 2) for s in row] for row in cost.verify],
            "contexts": cost.contexts,
            "nodes": cost.nodes,
        },
        "decoders": {
            label: {"tokens_per_second": rate(pairs)} | (_shape(results[label]) if label in results else {})
            for label, pairs in took.items()
        },
        "best_fixed": best,
        "cost_aware_over_best_fixed": {label: ratio(took[label], took[best]) for label in aware},
        "best_over_plain": ratio(took[best], took["plain"]),
    }


def _shape(results: Sequence[DecodeResult]) -> dict[str, float]:
    rounds = [r for result in results for r in result.rounds]
    return {
        "tau": round(sum(r.committed for r in rounds) / len(rounds), 2),
        "draft_tokens": round(statistics.mean(r.nodes for r in rounds), 1),
        "expected": round(statistics.mean(r.expected or 0.0 for r in rounds), 2),
        "accepted": round(statistics.mean(r.accepted for r in rounds), 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--prompts", type=int, default=6, help="of the loop and the replay")
    parser.add_argument("--mixed", type=int, default=12, help="prompts of the budgets")
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "decoding.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    load = os.getloadavg()
    result = {
        "command": "python benchmarks/decoding.py " + " ".join(sys.argv[1:]),
        "date": date.today().isoformat(),
        "machine": f"{device_name(args.device)}, {os.cpu_count()} cores, load {load[0]:.1f} at the start",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "clock": "wall time" if args.device.startswith("cuda") else "process time",
        "intervals": "[value, low, high], 95 % bootstrap over prompts",
        "trees": measure_trees(),
        "loop": measure_loop(args.device, args.prompts, args.tokens, args.repeats),
        "budgets": measure_budgets(args.device, args.mixed, args.tokens),
    }
    text = json.dumps(result, indent=1, ensure_ascii=False)
    args.out.parent.mkdir(exist_ok=True)
    args.out.write_text(text + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
