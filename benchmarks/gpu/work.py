"""The models, the text and the clock that every part of `run.py` works with."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from certdraft import record_trace
from certdraft.data import Corpus, Generation, Prompt, Prompts, load_tokenizer, train_tokenizer

NUM_KEPT = 16
GIB = 2**30


@dataclass(frozen=True)
class Size:
    """Sizes of the models and of the work.

    Attributes:
        target: config of the target.
        causal: what a small causal drafter changes in it.
        prompts: recorded prompts.
        new_tokens: of each answer.
        batch: prompts of a recording batch.
        seq_len: tokens of a training row.
        rows: rows of a training step.
        steps: timed training steps.
        loss_steps: token positions of the loss benchmark.
        repeats: timed repetitions.
    """

    target: dict[str, int]
    causal: dict[str, int]
    prompts: int
    new_tokens: int
    batch: int
    seq_len: int
    rows: int
    steps: int
    loss_steps: int
    repeats: int


FULL = Size(
    target={
        "vocab_size": 151_936, "hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
        "num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128,
    },
    causal={"num_hidden_layers": 4},
    prompts=256, new_tokens=128, batch=64, seq_len=4096, rows=2, steps=10, loss_steps=4096, repeats=10,
)  # fmt: skip
TOY = Size(
    target={
        "vocab_size": 320, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 5,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16,
    },
    causal={"num_hidden_layers": 1},
    prompts=12, new_tokens=12, batch=4, seq_len=64, rows=2, steps=2, loss_steps=40, repeats=2,
)  # fmt: skip


class Meter:
    """Seconds and peak memory of calls on a device.

    Args:
        device: where the work runs.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.cuda = device, device.type == "cuda"

    def seconds(self, work: Callable[[], Any], repeats: int) -> float:
        """Median seconds of a call, after one that does not count."""
        found = []
        for repeat in range(repeats + 1):
            self.wait()
            begin = time.perf_counter()
            work()
            self.wait()
            if repeat:
                found.append(time.perf_counter() - begin)
        return sorted(found)[len(found) // 2]

    def peak_gib(self, work: Callable[[], Any]) -> float | None:
        """Peak device memory of a call, GiB; None on a CPU."""
        if not self.cuda:
            work()
            return None
        torch.cuda.reset_peak_memory_stats(self.device)
        work()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) / GIB

    def wait(self) -> None:
        """Wait for the device."""
        if self.cuda:
            torch.cuda.synchronize(self.device)


def make_target(folder: Path, size: Size) -> Path:
    """Save a target with random, sharp weights and a small tokenizer; returns its folder."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {**size.target}
    config = Qwen3Config(
        **sizes, max_position_embeddings=8192, tie_word_embeddings=True, initializer_range=0.05,
        eos_token_id=0, bos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model: Any = Qwen3ForCausalLM(config)
    model.to(torch.bfloat16).save_pretrained(folder / "target")
    text = " ".join(Path(json.__file__).read_text(encoding="utf-8").split())
    train_tokenizer([text], 300).save_pretrained(folder / "target")
    starts = [37 * number % (len(text) - 60) for number in range(size.prompts)]
    rows = [
        json.dumps({"prompt": f"{number}: {text[start : start + 60]}"}) for number, start in enumerate(starts)
    ]
    (folder / "prompts.jsonl").write_text("\n".join(rows), encoding="utf-8")
    return folder / "target"


def prompts(size: Size, folder: Path) -> list[Prompt]:
    """The prompts of the file, at most 128 tokens each."""
    tokenizer = load_tokenizer(str(folder / "target"))
    lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    ids = [np.array(tokenizer(json.loads(line)["prompt"])["input_ids"][:128], np.int32) for line in lines]
    return [Prompt(part, len(part), f"prompts.jsonl:{number + 1}") for number, part in enumerate(ids)]


def tapped(size: Size) -> tuple[int, int, int]:
    """Layers of the target that drafters read."""
    layers = size.target["num_hidden_layers"]
    return 1, layers // 2, layers - 2


def traced(size: Size, folder: Path, meter: Meter) -> Path:
    """Record the trace that `texts` and `train` share, once; returns its folder."""
    trace = folder / "trace"
    if not (trace / "trace.json").exists():
        record_trace(
            str(trace), str(folder / "target"), Corpus(source=str(folder / "prompts.jsonl"), split="all"),
            prompts=Prompts(template="none", max_prompt_tokens=128),
            generation=Generation(max_new_tokens=size.new_tokens, loops="keep"),
            dtype="bfloat16", batch_size=size.batch, num_kept=NUM_KEPT, feature_layers=tapped(size),
            accelerator="gpu" if meter.cuda else "cpu",
        )  # fmt: skip
    return trace


def drafters(size: Size) -> dict[str, dict[str, Any]]:
    """One drafter of each kind, for the target of this size: `class_path` and `init_args` of a config."""
    large = size.target["num_hidden_layers"] > 8
    small = {key: value for key, value in size.target.items() if key != "vocab_size"} | size.causal
    reads = {"target_layer_ids": tapped(size)}
    block = reads | {"num_hidden_layers": 2 if large else 1, "block_size": 8}
    anchors = {"num_anchors": 64 if large else 4}
    made: dict[str, tuple[str, dict[str, Any]]] = {
        "causal": ("CausalDrafter", {"config": small}),
        "eagle3": ("EagleDrafter", {"config": reads, "unroll": 3}),
        "dflash": ("BlockDrafter", {"config": block} | anchors),
        "dspark": ("DSparkDrafter", {"config": block | {"markov_rank": 256 if large else 8}} | anchors),
    }
    return {name: {"class_path": path, "init_args": init} for name, (path, init) in made.items()}
