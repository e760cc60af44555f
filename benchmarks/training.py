"""What the framework costs beside the arithmetic: writing traces, loading batches, Lightning.

    python benchmarks/training.py            # about 5 minutes on one core
    python benchmarks/training.py --answers MODEL --repeats 1    # real answers only, about 10 minutes

Ratios, each from one process and CPU seconds, best of `--repeats` interleaved runs:

- tokens/s of recording teacher-forced text, over bare batched forwards of the same target on the same tokens;
- tokens/s of recording continuations, over a bare loop of batched passes with transformers' own cache, and
  over its `generate`, same batch and lengths: a target of the sizes of SmolLM2-135M, in fp32 and in bf16;
- tokens/s of recording the answers of a real model to held-out prompts, each up to its end, over `generate`
  in batches of the same size (--answers; kept in the results beside the rest);
- tokens/s of training from a trace, over the same steps on batches that lie ready in memory;
- Lightning's time a step, as a share of a step of 100 ms: Trainer.fit minus a bare loop of the same module.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Iterator
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from transformers import (
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from certdraft.data import (
    Corpus,
    Generation,
    LogitHead,
    Prompt,
    Prompts,
    TraceDataModule,
    eos_ids_of,
    load_target,
    load_tokenizer,
    record_prompts,
    record_trace,
)
from certdraft.decoding import device_name
from certdraft.drafters import CausalDrafter
from certdraft.evaluation import read_questions
from certdraft.support import write_json
from certdraft.train.commands.real import held_out_prompts
from certdraft.train.drafter_module import DrafterModule
from certdraft.train.optim import OptimizerSettings
from certdraft.train.runs.run_callbacks import StepRNG

SIZES = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 32, "max_position_embeddings": 2048, "tie_word_embeddings": True,
}  # fmt: skip


def cpu_seconds(*acts: Callable[[], object], repeats: int) -> list[float]:
    """Least CPU seconds of each, run in turns."""
    best = [float("inf")] * len(acts)
    for _ in range(repeats):
        for number, act in enumerate(acts):
            start = time.process_time()
            act()
            best[number] = min(best[number], time.process_time() - start)
    return best


def qwen3_small() -> PreTrainedModel:
    """Qwen3-0.6B in its true sizes, with random weights."""
    torch.manual_seed(0)
    return Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=151_936, hidden_size=1024, intermediate_size=3072, num_hidden_layers=28,
            num_attention_heads=16, num_key_value_heads=8, head_dim=128, tie_word_embeddings=True,
        )
    ).eval()  # fmt: skip


def writing(target: PreTrainedModel, repeats: int, rows: int, length: int) -> dict[str, float]:
    """Prefill only: every token of the text is given."""
    head, vocabulary = LogitHead(target), target.config.vocab_size
    draw = np.random.default_rng(0)
    prompts = [Prompt(draw.integers(0, vocabulary, length).astype(np.int32), 1, "x") for _ in range(rows)]
    ids = torch.from_numpy(np.stack([prompt.ids for prompt in prompts]).astype(np.int64))
    settings = Generation(max_new_tokens=0, max_length=length)

    def bare() -> None:
        with torch.inference_mode():
            target(input_ids=ids, use_cache=False)

    def ours() -> None:
        list(
            record_prompts(target, head, prompts, settings, batch_size=rows, num_kept=32, eos_ids=frozenset())
        )

    bare_s, ours_s = cpu_seconds(bare, ours, repeats=repeats)
    tokens = rows * length
    return {
        "bare_tokens_per_cpu_second": round(tokens / bare_s),
        "recorded_tokens_per_cpu_second": round(tokens / ours_s),
        "ratio": round(bare_s / ours_s, 3),
    }


def smollm2_sized(dtype: torch.dtype) -> PreTrainedModel:
    """SmolLM2-135M in its true sizes, with random weights."""
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=49_152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30,
            num_attention_heads=9, num_key_value_heads=3, max_position_embeddings=2048,
            tie_word_embeddings=True,
        )
    ).to(dtype).eval()  # fmt: skip


def continuing(dtype: torch.dtype, repeats: int, rows: int, given: int, new: int) -> dict[str, float]:
    """Greedy continuations, recorded with three hidden states, beside two ways that record nothing."""
    target, recorded = smollm2_sized(dtype), smollm2_sized(dtype)
    head = LogitHead(recorded)
    ids = torch.randint(0, 49_152, (rows, given), generator=torch.Generator().manual_seed(0))
    prompts = [Prompt(row.numpy().astype(np.int32), given, "x") for row in ids]
    settings = Generation(max_new_tokens=new, max_length=given + new, loops="keep")

    @torch.inference_mode()
    def bare() -> None:
        cache, tokens = DynamicCache(config=target.config), ids
        for _ in range(new):
            logits = target(input_ids=tokens, past_key_values=cache, logits_to_keep=1).logits
            tokens = logits[:, -1].argmax(-1, keepdim=True)

    def generate() -> None:
        target.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, min_new_tokens=new, max_new_tokens=new,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip

    def ours() -> None:
        made = record_prompts(
            recorded, head, prompts, settings, batch_size=rows, num_kept=32, eos_ids=frozenset(),
            feature_layers=(1, 14, 26),
        )  # fmt: skip
        assert sum(len(row.input_ids) for _, row in made) == rows * (given + new)

    bare_s, generate_s, ours_s = cpu_seconds(bare, generate, ours, repeats=repeats)
    return {
        "recorded_tokens_per_cpu_second": round(rows * new / ours_s),
        "over a bare loop of passes": round(bare_s / ours_s, 3),
        "over generate": round(generate_s / ours_s, 3),
    }


def answering(name: str, repeats: int, rows: int, count: int, new: int) -> dict[str, Any]:
    """Greedy answers of unequal lengths, recorded with three hidden states, beside `generate`.

    Args:
        name: of the target, as `load_target` takes it.
        repeats: of both, in turns.
        rows: texts side by side.
        count: held-out prompts.
        new: longest answer.
    """
    target, recorded, tokenizer = load_target(name), load_target(name), load_tokenizer(name)
    head, eos = LogitHead(recorded), eos_ids_of(recorded, tokenizer)
    chats = [
        tokenizer.apply_chat_template(
            [{"role": "user", "content": question.turns[0]}], add_generation_prompt=True, return_dict=True
        )["input_ids"]
        for question in read_questions(str(held_out_prompts()), count)
    ]
    prompts = [Prompt(np.array(ids, dtype=np.int32), len(ids), "x") for ids in chats]
    longest = max(map(len, chats))
    settings = Generation(max_new_tokens=new, max_length=longest + new, loops="keep")
    made: dict[str, list[int]] = {}

    def generate() -> None:
        lengths = []
        for start in range(0, count, rows):
            batch = tokenizer.pad(
                {"input_ids": chats[start : start + rows]}, padding_side="left", return_tensors="pt"
            )
            texts = target.generate(**batch, do_sample=False, max_new_tokens=new, eos_token_id=list(eos))
            for text in texts[:, batch["input_ids"].shape[1] :].tolist():
                ends = [place + 1 for place, token in enumerate(text) if token in eos]
                lengths.append(ends[0] if ends else len(text))
        made["generate"] = lengths

    def ours() -> None:
        lengths = {}
        for number, row in record_prompts(
            recorded, head, prompts, settings, batch_size=rows, num_kept=32, eos_ids=eos,
            feature_layers=(1, 14, 26),
        ):  # fmt: skip
            lengths[number] = len(row.input_ids) - len(chats[number])
        made["recorded"] = [lengths[number] for number in range(count)]

    generate_s, ours_s = cpu_seconds(generate, ours, repeats=repeats)
    tokens = {way: sum(lengths) for way, lengths in made.items()}
    same = sum(a == b for a, b in zip(made["generate"], made["recorded"], strict=True))
    return {
        "target": Path(name).name, "prompts": count, "longest answer": new, "batch": rows,
        "mean answer": round(tokens["recorded"] / count, 1),
        "answers of the same length": same,
        "recorded_tokens_per_cpu_second": round(tokens["recorded"] / ours_s, 1),
        "over generate": round((tokens["recorded"] / ours_s) / (tokens["generate"] / generate_s), 3),
    }  # fmt: skip


class Batches:
    """A list that Lightning takes for one loader."""

    def __init__(self, batches: list[Any]) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.batches)


class Ready(pl.LightningDataModule):
    """Batches that lie ready; the facts of the trace they come from."""

    def __init__(self, source: TraceDataModule, batches: list[Any]) -> None:
        super().__init__()
        self.meta, self.batches = source.meta, Batches(batches)

    def train_dataloader(self) -> Batches:
        return self.batches


def trainer(steps: int) -> pl.Trainer:
    return pl.Trainer(
        accelerator="cpu", max_steps=steps, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, limit_val_batches=0, num_sanity_val_steps=0,
        callbacks=[StepRNG(0)],
    )  # fmt: skip


def module(vocab_size: int) -> DrafterModule:
    torch.manual_seed(0)
    drafter = CausalDrafter(config=SIZES, vocab_size=vocab_size)
    return DrafterModule(drafter, optimizer=OptimizerSettings(warmup_steps=2))


def training(folder: Path, steps: int, repeats: int) -> dict[str, Any]:
    def data() -> TraceDataModule:
        return TraceDataModule(str(folder), validation_fraction=0.2, seq_len=256, batch_size=8)

    source = data()
    source.setup()
    vocab_size = source.meta.vocab_size
    batches: list[Any] = []
    loader = source.train_dataloader()
    while len(batches) < steps:
        batches.extend(loader)
    batches = batches[:steps]

    def from_trace() -> None:
        loaded = data()
        loaded.setup()
        trainer(steps).fit(module(vocab_size), datamodule=loaded)

    def from_memory() -> None:
        trainer(steps).fit(module(vocab_size), datamodule=Ready(source, batches))

    def setting_up() -> None:
        data().setup()

    def bare(ready: list[Any]) -> None:
        own = module(vocab_size)
        facts = {"max_steps": 1000, "world_size": 1, "accumulate_grad_batches": 1, "global_step": 0}
        own.trainer = type("T", (), {**facts, "log_every_n_steps": 50, "optimizers": None})()
        own.log_dict = lambda *args, **kwargs: None
        made = own.optimizer_settings.build(own, 1000)
        optimizer, schedule = made["optimizer"], made["lr_scheduler"]["scheduler"]
        own.trainer.optimizers = [optimizer]
        own.train()
        for index, batch in enumerate(ready):
            torch.manual_seed(index)
            own.training_step(batch, index).backward()
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()

    def fit(ready: list[Any]) -> None:
        trainer(len(ready)).fit(module(vocab_size), datamodule=Ready(source, ready))

    loaded_s, memory_s, setup_s = cpu_seconds(from_trace, from_memory, setting_up, repeats=repeats)
    tokens = sum(batch.num_tokens for batch in batches)
    # Lightning: short steps, few and many of them, so that the Trainer's set-up drops out
    source.batch_size, source.seq_len = 1, 256
    small = next(iter(source.train_dataloader()))
    few, many = [small] * 10, [small] * 70
    times = cpu_seconds(
        lambda: fit(few), lambda: fit(many), lambda: bare(few), lambda: bare(many), repeats=repeats
    )
    fit_ms, bare_ms = (1000 * (times[i + 1] - times[i]) / 60 for i in (0, 2))
    return {
        "steps": steps,
        "tokens_per_cpu_second": {
            "from the trace": round(tokens / (loaded_s - setup_s)),
            "batches ready in memory": round(tokens / memory_s),
        },
        "loading ratio": round(memory_s / (loaded_s - setup_s), 3),
        "one-row step, bare loop, ms": round(bare_ms, 2),
        "one-row step, Trainer, ms": round(fit_ms, 2),
        "Lightning ms a step": round(fit_ms - bare_ms, 2),
        "share of a step of 100 ms": round((fit_ms - bare_ms) / 100, 4),
    }


def write(out: Path, result: dict[str, Any]) -> None:
    """Store the result and print it."""
    write_json(out, result)
    print(json.dumps(result, indent=1))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--answers", metavar="MODEL", help="only this: record the answers of a real model")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/training.json"))
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    steps, repeats = arguments.steps, arguments.repeats
    known = json.loads(arguments.out.read_text(encoding="utf-8")) if arguments.out.is_file() else {}
    if arguments.answers:
        known["recording answers of a real model, fp32"] = {
            "command": f"python benchmarks/training.py --answers MODEL --repeats {repeats}",
            **answering(arguments.answers, repeats, rows=16, count=48, new=256),
            "date": date.today().isoformat(), "machine": f"{device_name()}, other work running beside it",
        }  # fmt: skip
        write(arguments.out, known)
        return
    result: dict[str, Any] = {"command": f"python benchmarks/training.py --steps {steps} --repeats {repeats}"}
    with tempfile.TemporaryDirectory() as temporary:
        record_trace(
            temporary + "/trace", corpus=Corpus(max_rows=6), prompts=Prompts(max_prompt_tokens=256),
            generation=Generation(max_new_tokens=0, max_length=256),
        )  # fmt: skip
        result["trace writing, prefill"] = {
            "embedded target": writing(load_target(), repeats, rows=8, length=512),
            "Qwen3-0.6B sizes, random weights": writing(qwen3_small(), min(repeats, 2), rows=2, length=256),
        }
        result["recording continuations of 64 tokens, batch 32, SmolLM2-135M sizes"] = {
            name: continuing(getattr(torch, name), min(repeats, 2), rows=32, given=64, new=64)
            for name in ("float32", "bfloat16")
        }
        result["training"] = training(Path(temporary, "trace"), steps, repeats)
    result |= {
        "target": "embedded, fp32", "drafter": f"one layer of {SIZES['hidden_size']}, 8 rows of 256 tokens",
        "seed": 0, "date": date.today().isoformat(),
        "machine": f"{device_name()}, other work running beside it",
        "versions": {name: version(name) for name in ("torch", "pytorch-lightning", "transformers")},
    }  # fmt: skip
    write(arguments.out, known | result)


if __name__ == "__main__":
    main()
