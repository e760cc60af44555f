"""How fast is decoding without a drafter? Every plain decoder of this machine, in turns.

    certdraft real
    python benchmarks/plain_decoding.py --run runs/real       # about 5 minutes on two idle cores

A speed-up is only worth something over the fastest of these: our own loop, transformers' `generate`, and
a loop over a static cache whose passes torch.compile has compiled (Inductor, weights as constants; a C++
compiler is needed), in bf16 and in fp32. Held-out prompts, batch 1; the first prompt warms up. Intervals are
95 % bootstrap over prompts; ratios are paired with certdraft's loop in bf16.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import StaticCache

from certdraft.data import load_target, load_tokenizer
from certdraft.decoding import TargetRunner, device_name, greedy
from certdraft.evaluation import compare_ratios, pooled_ratio, read_questions
from certdraft.support import write_json
from certdraft.train.commands.real import held_out_prompts, target_of

OURS = "certdraft, bfloat16"


def own_loop(ids: torch.Tensor, tokens: int, runner: TargetRunner) -> list[int]:
    """Plain decoding by certdraft."""
    return greedy(runner, ids[0], tokens)


def generated(ids: torch.Tensor, tokens: int, model: Any) -> list[int]:
    """transformers' `generate`; end-of-sequence tokens are ignored, as in the other loops."""
    mask = torch.ones_like(ids)
    text = model.generate(
        ids, attention_mask=mask, do_sample=False, min_new_tokens=tokens, max_new_tokens=tokens
    )
    return text[0, ids.shape[1] :].tolist()


class CompiledLoop:
    """A loop over a static cache with compiled passes."""

    def __init__(self, model: Any, room: int = 512) -> None:
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=room)
        self.step = torch.compile(model.forward, dynamic=False, options={"freezing": True})

    def __call__(self, ids: torch.Tensor, tokens: int) -> list[int]:
        self.cache.reset()
        positions = torch.arange(ids.shape[1])[None]
        out = self.model(ids, past_key_values=self.cache, position_ids=positions)
        text = [int(out.logits[0, -1].argmax())]
        while len(text) < tokens:
            at = torch.tensor([[ids.shape[1] + len(text) - 1]])
            out = self.step(torch.tensor([text[-1:]]), past_key_values=self.cache, position_ids=at)
            text.append(int(out.logits[0, -1].argmax()))
        return text


@torch.inference_mode()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", type=Path, default=Path("runs/real"), help="folder of `certdraft real`")
    parser.add_argument("--target", help="where it has moved; else the target of the run's trace")
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/plain_decoding.json"))
    args = parser.parse_args()
    name = args.target or target_of(args.run)
    tokenizer = load_tokenizer(name)
    ways: dict[str, Callable[[torch.Tensor, int], list[int]]] = {}
    for dtype in ("bfloat16", "float32"):
        models = [load_target(name, dtype=getattr(torch, dtype)).eval() for _ in range(3)]
        ways[f"certdraft, {dtype}"] = partial(own_loop, runner=TargetRunner(models[0]))
        ways[f"generate, {dtype}"] = partial(generated, model=models[1])
        ways[f"compiled, {dtype}"] = CompiledLoop(models[2])
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for number, question in enumerate(read_questions(str(held_out_prompts()), args.prompts + 1)):
        chat: Any = tokenizer.apply_chat_template(
            [{"role": "user", "content": question.turns[0]}], add_generation_prompt=True, return_dict=True
        )
        ids, labels = torch.tensor([chat["input_ids"]]), list(ways)
        turn = number % len(labels)
        for way in labels[turn:] + labels[:turn]:
            start = time.perf_counter()
            assert len(ways[way](ids, args.tokens)) == args.tokens
            if number:
                seconds[way].append(time.perf_counter() - start)
        print(f"{number} of {args.prompts} prompts", flush=True)
    tokens = [float(args.tokens)] * args.prompts
    data = {
        "command": f"python benchmarks/plain_decoding.py --prompts {args.prompts} --tokens {args.tokens}",
        "date": date.today().isoformat(),
        "device": device_name(),
        "target": Path(name).name,
        "ways": {
            way: {
                "tokens_per_s": vars(pooled_ratio(tokens, spent)),
                "over_certdraft_bfloat16": vars(
                    compare_ratios((tokens, spent), (tokens, seconds[OURS]), "ratio")
                ),
            }
            for way, spent in seconds.items()
        },
    }
    write_json(args.out, data)
    for way, found in data["ways"].items():
        print(f"{way:24} {found['tokens_per_s']['value']:6.1f} tokens/s")


if __name__ == "__main__":
    main()
