"""How fast is decoding without a drafter? Every plain decoder of this machine, in turns.

    certdraft real
    python benchmarks/plain_decoding.py --run runs/real       # about 9 minutes on two idle cores

A speed-up is only worth something over the fastest of these: our own loop, transformers' `generate`, and
a loop over a static cache whose passes torch.compile has compiled (Inductor, weights as constants; a C++
compiler is needed), in bf16 and in fp32. Where the run has a causal drafter, its chain of 4 is held against
`generate(assistant_model=...)` with the same drafter and schedule. Held-out prompts, batch 1; the first
prompt warms up. Intervals are 95 % bootstrap over prompts; ratios are paired with certdraft's loop in bf16.
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
from certdraft.decoding import Chain, TargetRunner, decode, device_name, greedy
from certdraft.drafters import CausalDrafter, load_drafter
from certdraft.evaluation import compare_ratios, pooled_ratio, read_questions
from certdraft.support import write_json
from certdraft.train.commands.real import held_out_prompts, target_of

OURS = "certdraft, bfloat16"
CHAIN, ASSISTED = "certdraft, chain of 4, bfloat16", "generate, assistant model, bfloat16"


def own_loop(ids: torch.Tensor, tokens: int, runner: TargetRunner) -> list[int]:
    """Plain decoding by certdraft."""
    return greedy(runner, ids[0], tokens)


def chain(ids: torch.Tensor, tokens: int, runner: TargetRunner, drafter: CausalDrafter) -> list[int]:
    """certdraft's decoding with a chain of 4 draft tokens."""
    return decode(runner, drafter, ids[0], Chain(4), max_new_tokens=tokens).tokens


def generated(ids: torch.Tensor, tokens: int, model: Any, assistant: Any = None) -> list[int]:
    """transformers' `generate`; end-of-sequence tokens are ignored, as in the other loops."""
    text = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens, pad_token_id=0,
        assistant_model=assistant,
    )  # fmt: skip
    return text[0, ids.shape[1] :].tolist()


def with_drafter(name: str, folder: Path) -> dict[str, Callable[[torch.Tensor, int], list[int]]]:
    """Chains of 4 draft tokens by certdraft and by `generate`, each with models of its own."""
    targets: list[Any] = [load_target(name, dtype=torch.bfloat16).eval() for _ in range(2)]
    ours, theirs = (load_drafter(folder, target=t, dtype="bfloat16").eval() for t in targets)
    assert isinstance(ours, CausalDrafter)
    assert isinstance(theirs, CausalDrafter)
    schedule = theirs.model.generation_config
    schedule.num_assistant_tokens, schedule.num_assistant_tokens_schedule = 4, "constant"
    schedule.assistant_confidence_threshold, schedule.eos_token_id = 0.0, None
    targets[1].generation_config.eos_token_id = None
    return {
        CHAIN: partial(chain, runner=TargetRunner(targets[0]), drafter=ours),
        ASSISTED: partial(generated, model=targets[1], assistant=theirs.model),
    }


class CompiledLoop:
    """A loop over a static cache with compiled passes."""

    def __init__(self, model: Any, room: int = 512) -> None:
        self.model = model
        self.cache = StaticCache(config=model.config, max_cache_len=room)
        self.step = torch.compile(model.forward, dynamic=False, options={"freezing": True})

    @torch.inference_mode()
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
        models[1].generation_config.eos_token_id = None
        ways[f"certdraft, {dtype}"] = partial(own_loop, runner=TargetRunner(models[0]))
        ways[f"generate, {dtype}"] = partial(generated, model=models[1])
        ways[f"compiled, {dtype}"] = CompiledLoop(models[2])
    if (args.run / "exports" / "causal").is_dir():
        ways |= with_drafter(name, args.run / "exports" / "causal")
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
    if CHAIN in seconds:
        ratio = compare_ratios((tokens, seconds[CHAIN]), (tokens, seconds[ASSISTED]), "ratio")
        data["chain_over_assisted"] = vars(ratio)
        print(f"chain over assisted generation: {ratio.value:.2f} [{ratio.low:.2f}, {ratio.high:.2f}]")
    write_json(args.out, data)
    for way, found in data["ways"].items():
        print(f"{way:24} {found['tokens_per_s']['value']:6.1f} tokens/s")


if __name__ == "__main__":
    main()
