"""One command for a CUDA machine: is the GPU path right, how fast is it, and how much memory does it take?

    make gpu                                               # every part, some 8 minutes on one H100
    python benchmarks/gpu/run.py --parts texts train       # chosen parts
    python benchmarks/gpu/run.py --toy true --device cpu   # the same code at toy size; its test runs it

Models have random weights in the sizes of Qwen3-0.6B and of small drafters: nothing is downloaded.
Parts:

    tests    the suite's tests marked `gpu`
    kernels  forward and backward of chunked losses of an online target at V = 151,936, with the kernels that
             "auto" chooses and by the readable path, beside four bare matrix products; Liger's forward KL if
             liger-kernel is installed
    record   tokens/s of recording from the first prompt to the last row, without loading and without a disk,
             beside the target's bare passes (no output layer, nothing recorded, no host that waits) and
             transformers' `generate`; peak memory beside `certdraft plan`
    texts    recorded against live greedy text in bf16: where they differ, and by which lead
    train    tokens/s, synchronisations and peak memory of a step of every drafter kind, beside `certdraft
             plan`; a synchronisation counts from the fetching of the batch on, time from when it is there

Peaks are of memory that torch gives out, so the plan's share for the CUDA context is left out of it; on a CPU
there are none, and no synchronisations. Results go to benchmarks/results/gpu-NAME.json, one entry per part,
with the name of the card.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import json
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

from certdraft import DrafterModule, TraceDataModule, load_target, open_trace, record_trace
from certdraft.data import (
    Corpus,
    Generation,
    LogitHead,
    Prompt,
    Prompts,
    load_tokenizer,
    record_prompts,
    train_tokenizer,
)
from certdraft.decoding import TargetRunner, device_name, greedy
from certdraft.drafters import BlockConfig, Drafter, DSparkConfig, EagleConfig, drafter_kinds
from certdraft.losses import Chunked, ForwardKL, HardCE, Mixture, OnlineTarget
from certdraft.support import write_json
from certdraft.train import TargetSettings
from certdraft.train.plan.formulas import DEVICES, GB
from certdraft.train.plan.plan_command import plan

ROOT = Path(__file__).parents[2]
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


def run_tests(size: Size, folder: Path, meter: Meter) -> dict[str, Any]:
    """Run the suite's gpu tests."""
    command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    return {"exit_code": done.returncode, "said": (done.stdout.strip().splitlines() or [""])[-1]}


def run_kernels(size: Size, folder: Path, meter: Meter) -> dict[str, Any]:
    """Time chunked losses of an online target beside the bare matrix products and other implementations."""
    vocab, width = size.target["vocab_size"], size.target["hidden_size"]
    dtype = torch.bfloat16 if meter.cuda else torch.float32
    make: dict[str, Any] = {"device": meter.device, "dtype": dtype}
    weight = torch.randn(vocab, width, **make).mul_(width**-0.5).requires_grad_()
    target_weight = torch.randn(vocab, width, **make).mul_(width**-0.5)
    hidden, target_hidden = (torch.randn(size.loss_steps, width, **make) for _ in range(2))
    hidden.requires_grad_()
    target = OnlineTarget(target_hidden, target_weight, k=8)

    def bare() -> None:
        """Logits of both models, and both gradients of the drafter's: four products."""
        with torch.no_grad():
            for start in range(0, size.loss_steps, 512):
                part = hidden[start : start + 512]
                logits = part @ weight.t()
                target_hidden[start : start + 512] @ target_weight.t()
                logits.t() @ part
                logits @ weight

    def run(loss: Chunked) -> Callable[[], None]:
        def step() -> None:
            loss(hidden, weight, target).backward()
            hidden.grad = weight.grad = None

        return step

    losses = {
        "hard-ce": HardCE(),
        "forward-kl": ForwardKL(),
        "ce+kl": Mixture([HardCE(), ForwardKL()], [0.5, 0.5]),
    }
    base = meter.seconds(bare, size.repeats)
    found: dict[str, Any] = {"bare_products_ms": 1e3 * base}

    def timed(step: Callable[[], None]) -> dict[str, Any]:
        seconds = meter.seconds(step, size.repeats)
        return {"ms": 1e3 * seconds, "of_bare": seconds / base, "peak_gib": meter.peak_gib(step)}

    for name, loss in losses.items():
        found[name] = timed(run(Chunked(loss))) | {"readable": timed(run(Chunked(loss, backend="torch")))}
    if importlib.util.find_spec("liger_kernel") is None:
        return found | {"liger forward-kl": "skipped: liger-kernel is not installed"}
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    liger = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=meter.cuda, chunk_size=1024
    )
    labels = torch.zeros(size.loss_steps, dtype=torch.long, device=meter.device)

    def theirs() -> None:
        liger(hidden, weight, target_hidden, target_weight, labels).backward()
        hidden.grad = weight.grad = None

    return found | {"liger forward-kl": timed(theirs)}


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


@dataclass(frozen=True)
class Expected:
    """Peak memory by `certdraft plan`, GiB, without its share for the CUDA context."""

    record: float
    train: float


def expected(size: Size, folder: Path, drafter: dict[str, Any], *, beside: bool) -> Expected:
    """Ask `certdraft plan` for a run like those of `record` and `train`.

    Args:
        size: of the models and of the work.
        folder: with the target.
        drafter: `class_path` and `init_args`.
        beside: whether the target runs in training.
    """
    target = str(folder / "target")
    config = {
        "trainer": {"precision": "bf16-mixed", "max_steps": size.steps},
        "data": {
            "seq_len": size.seq_len, "batch_size": size.rows,
            "record": {
                "target": target, "batch_size": size.batch, "num_kept": NUM_KEPT,
                "feature_layers": tapped(size),
            },
        },
        "model": {"drafter": drafter} | ({"target": {"name": target}} if beside else {}),
    }  # fmt: skip
    file = folder / "plan.yaml"
    file.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML
    given = sum(len(prompt.ids) for prompt in prompts(size, folder)) // size.prompts
    with contextlib.redirect_stdout(io.StringIO()):
        found = plan(str(file), device="h100", prompt_tokens=given, answer_tokens=size.new_tokens)
    sheet = DEVICES["h100"]
    train = sum(value for name, value in found.train_memory_gb.items() if name != sheet.overhead)
    return Expected((found.record_memory_gb - sheet.overhead_gb) * GB / GIB, train * GB / GIB)


def beside_plan(peak: float | None, planned: float) -> dict[str, float | None]:
    """Peak memory beside the plan's, for a result."""
    return {"peak_gib": peak, "plan_gib": planned, "of_plan": None if peak is None else peak / planned}


def prompts(size: Size, folder: Path) -> list[Prompt]:
    """The prompts of the file, at most 128 tokens each."""
    tokenizer = load_tokenizer(str(folder / "target"))
    lines = (folder / "prompts.jsonl").read_text(encoding="utf-8").splitlines()
    ids = [np.array(tokenizer(json.loads(line)["prompt"])["input_ids"][:128], np.int32) for line in lines]
    return [Prompt(part, len(part), f"prompts.jsonl:{number + 1}") for number, part in enumerate(ids)]


@torch.inference_mode()
def run_record(size: Size, folder: Path, meter: Meter) -> dict[str, Any]:
    """Tokens/s of recording, beside bare passes of the target and transformers' `generate`."""
    model: Any = load_target(str(folder / "target"), dtype=torch.bfloat16, device=meter.device)
    head, given = LogitHead(model), prompts(size, folder)

    def record(some: list[Prompt]) -> None:
        settings = Generation(max_new_tokens=size.new_tokens, loops="keep")
        rows = record_prompts(
            model, head, some, settings,
            batch_size=size.batch, num_kept=NUM_KEPT, eos_ids=frozenset(), feature_layers=tapped(size),
        )  # fmt: skip
        for _ in rows:
            pass

    record(given[: size.batch])  # the first passes choose kernels
    meter.wait()
    begin = time.perf_counter()
    peak = meter.peak_gib(lambda: record(given))
    speed = len(given) * size.new_tokens / (time.perf_counter() - begin)

    width = max(len(prompt.ids) for prompt in given)
    ids = torch.randint(1, 300, (size.batch, width), device=meter.device)

    def bare() -> None:
        """Read the prompts, then one token each at a time, as a recording does; nothing is made of it."""
        cache = DynamicCache(config=model.config)
        model.model(input_ids=ids, past_key_values=cache, use_cache=True)
        for _ in range(size.new_tokens - 1):
            model.model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)

    options = {"do_sample": False, "max_new_tokens": size.new_tokens, "min_new_tokens": size.new_tokens}
    tokens = size.batch * size.new_tokens
    passes = tokens / meter.seconds(bare, 1)
    made = tokens / meter.seconds(
        lambda: model.generate(ids, attention_mask=torch.ones_like(ids), **options), 1
    )
    planned = expected(size, folder, drafters(size)["causal"], beside=False).record
    return {
        "tokens_per_s": speed, "bare_tokens_per_s": passes, "of_bare": speed / passes,
        "generate_tokens_per_s": made, "of_generate": speed / made,
    } | beside_plan(peak, planned)  # fmt: skip


def run_texts(size: Size, folder: Path, meter: Meter) -> dict[str, Any]:
    """Compare recorded texts with live greedy decoding, both in bf16, and give the lead where they part."""
    trace = open_trace(traced(size, folder, meter))
    model = load_target(str(folder / "target"), dtype=torch.bfloat16, device=meter.device)
    runner = TargetRunner(model)
    equal, leads = 0, []
    texts = min(len(trace), 24)
    for number in range(texts):
        row = trace.row(number)
        start = int(row.loss_mask.int().argmax()) + 1
        recorded = row.input_ids.tolist()
        live = greedy(runner, recorded[:start], len(recorded) - start)
        written = recorded[start:]
        first = next((i for i, (a, b) in enumerate(zip(written, live, strict=False)) if a != b), None)
        equal += first is None
        if first is not None:
            leads.append(float(row.head.gap[start - 1 + first, 1]))
    return {"texts": texts, "equal": equal, "largest_lead_nats": max(leads, default=0.0), "leads_nats": leads}


class Steps(pl.Callback):
    """Seconds of training steps once their batch is there; synchronisations since the step before.

    Args:
        meter: of the device.
    """

    def __init__(self, meter: Meter) -> None:
        self.meter = meter
        self.seconds: list[float] = []
        self.syncs: list[int] = []

    def on_train_start(self, *_: Any) -> None:
        self._listen()

    def on_train_batch_start(self, *_: Any) -> None:
        self._warn(False)  # of this wait
        self.meter.wait()
        self._warn(True)
        self.begin = time.perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        self._hush()
        self.syncs.append(sum("synchroniz" in str(entry.message) for entry in self.log))
        self.meter.wait()
        self.seconds.append(time.perf_counter() - self.begin)
        self._listen()  # to the fetching of the next batch too

    def on_train_end(self, *_: Any) -> None:
        self._hush()

    def _listen(self) -> None:
        self.caught = warnings.catch_warnings(record=True)
        self.log = self.caught.__enter__()
        warnings.simplefilter("always")
        self._warn(True)

    def _hush(self) -> None:
        self._warn(False)
        self.caught.__exit__(None, None, None)

    def _warn(self, on: bool) -> None:
        if self.meter.cuda:
            torch.cuda.set_sync_debug_mode("warn" if on else "default")


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


def make_drafter(settings: dict[str, Any]) -> Drafter:
    """Make a drafter from `class_path` and `init_args`."""
    kinds: dict[str, Any] = {kind.__name__: kind for kind in drafter_kinds().values()}
    configs: dict[str, Any] = {
        "EagleDrafter": EagleConfig, "BlockDrafter": BlockConfig, "DSparkDrafter": DSparkConfig
    }  # fmt: skip
    name, init = settings["class_path"], dict(settings["init_args"])
    if name in configs:
        init["config"] = configs[name](**init["config"])
    drafter: Drafter = kinds[name](**init)
    return drafter


def run_train(size: Size, folder: Path, meter: Meter) -> dict[str, Any]:
    """Train every drafter kind for a few steps under bf16-mixed."""
    trace = traced(size, folder, meter)
    found: dict[str, Any] = {}
    for name, chosen in drafters(size).items():
        drafter = make_drafter(chosen)
        data = TraceDataModule(
            str(trace), validation_fraction=0.2, seq_len=size.seq_len, batch_size=size.rows
        )
        settings = (
            TargetSettings(str(folder / "target"), dtype="bfloat16", logits=False) if drafter.taps else None
        )
        module = DrafterModule(drafter, Mixture([HardCE(), ForwardKL()], [0.5, 0.5]), target=settings)
        steps = Steps(meter)
        trainer = pl.Trainer(
            accelerator="gpu" if meter.cuda else "cpu", devices=1, precision="bf16-mixed",
            max_steps=size.steps + 2, limit_val_batches=0, num_sanity_val_steps=0, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            callbacks=[steps],
        )  # fmt: skip
        peak = meter.peak_gib(lambda t=trainer, m=module, d=data: t.fit(m, datamodule=d))
        timed, syncs = sorted(steps.seconds[2:]), sorted(steps.syncs[2:])  # the first two do not count
        planned = expected(size, folder, chosen, beside=settings is not None).train
        found[name] = {
            "trainable": sum(p.numel() for p in drafter.parameters() if p.requires_grad),
            "tokens_per_s": size.rows * size.seq_len / timed[len(timed) // 2],
            "syncs_a_step": syncs[len(syncs) // 2] if meter.cuda else None,
        } | beside_plan(peak, planned)
    return found


PARTS: dict[str, Callable[[Size, Path, Meter], dict[str, Any]]] = {
    "tests": run_tests, "kernels": run_kernels, "record": run_record, "texts": run_texts, "train": run_train,
}  # fmt: skip


def run(parts: list[str], size: Size, device: torch.device) -> dict[str, Any]:
    """Run the chosen parts; a part that fails is recorded with its error, and the others still run."""
    meter = Meter(device)
    results: dict[str, Any] = {
        "device": device_name(device), "torch": torch.__version__, "date": date.today().isoformat(),
        "command": " ".join(["python benchmarks/gpu/run.py", *sys.argv[1:]]),
    }  # fmt: skip
    with TemporaryDirectory() as temporary:
        folder = Path(temporary)
        make_target(folder, size)
        for name in parts:
            begin = time.perf_counter()
            try:
                results[name] = PARTS[name](size, folder, meter)
            except Exception as error:
                results[name] = {"error": f"{type(error).__name__}: {error}"}
            results[name]["took_s"] = round(time.perf_counter() - begin, 1)
            print(f"{name}: {json.dumps(results[name])}", flush=True)
    return results


def table(results: dict[str, Any]) -> str:
    """The results, one line per number."""
    lines = [f"{results['device']}, PyTorch {results['torch']}"]

    def walk(prefix: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, inner in value.items():
                walk(f"{prefix} {key}".strip(), inner)
        elif not isinstance(value, list):
            shown = f"{value:,.3f}" if isinstance(value, float) else str(value)
            lines.append(f"  {prefix:<42} {shown}")

    for name in PARTS:
        if name in results:
            walk(name, results[name])
    return "\n".join(lines)


def main() -> None:
    """Parse the command line, run, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--toy", type=lambda text: text.lower() == "true", default=False)
    parser.add_argument("--out", type=Path)
    chosen = parser.parse_args()
    if chosen.device == "cpu" and not chosen.toy:
        raise SystemExit("no CUDA device here; --toy true --device cpu runs the same code at toy size")
    results = run(chosen.parts, TOY if chosen.toy else FULL, torch.device(chosen.device))
    print(table(results))
    name = "-".join(results["device"].lower().split())
    out = chosen.out or ROOT / "benchmarks" / "results" / f"gpu-{name}.json"
    if not chosen.toy or chosen.out:
        write_json(out, results)
        print(f"written to {out}")
    if any("error" in results[part] or results[part].get("exit_code") for part in chosen.parts):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
