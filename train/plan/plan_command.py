"""`certdraft plan`: memory, disk and time of a recording and a training, before anything is started."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import yaml

from certdraft.data import bytes_per_token
from certdraft.losses import auto_chunk_tokens
from certdraft.train.optim import check_precision
from certdraft.train.plan import formulas
from certdraft.train.plan.formulas import DEVICES, GB, measured_cpu
from certdraft.train.plan.model_sizes import ModelSizes, drafter_sizes, sizes_of
from certdraft.train.runs.config_files import fill_in_groups

_SHIPPED = Path(__file__).parents[2] / "configs"


@dataclass(frozen=True)
class Plan:
    """Estimates, none of them measured; sizes in GB (10⁹ bytes), times in hours."""

    target: ModelSizes
    drafter: ModelSizes
    world: int
    record_memory_gb: float
    record_hours: float
    trace_gb: float
    train_memory_gb: dict[str, float]
    train_hours: float
    tokens_per_second: float
    step_seconds: float
    all_reduce_seconds: float
    device_memory_gb: float
    assumptions: dict[str, float]

    @property
    def fits(self) -> bool:
        """Whether a device holds the training, with a tenth to spare."""
        return sum(self.train_memory_gb.values()) <= 0.9 * self.device_memory_gb


def plan(
    run: str | None = None,
    target: str | None = None,
    drafter: str | None = None,
    device: Literal["a100-80gb", "h100", "h200", "b200", "cpu"] | None = None,
    nodes: int | None = None,
    devices: int | None = None,
    prompts: int | None = None,
    prompt_tokens: int | None = None,
    answer_tokens: int | None = None,
    batch_size: int | None = None,
    checkpointing: bool | None = None,
    fsdp2: bool | None = None,
    mfu: float = 0.4,
    step_overhead_ms: float = 25.0,
    link_gb_s: float | None = None,
    out: str | None = None,
) -> Plan:
    """Estimate memory, disk and time of a run from its config; no weights are loaded.

    Args:
        run: config of `certdraft fit`; configs/qwen3-8b-0.6b.yaml when not given.
        target: model that is recorded; the config's when not given. A folder with config.json is enough.
        drafter: causal LM that is trained; the config's drafter, of any kind, when not given.
        device: data sheet of the accelerator; "cpu" measures this machine's processor. When not given, the
            CPU for a config with `trainer.accelerator: cpu`, else an H100.
        nodes: machines; the config's when not given.
        devices: accelerators a machine; the config's when not given.
        prompts: prompts recorded; when not given, those of the config's `corpus.max_rows`, else 50,000. Text
            that is cut into pieces (`max_new_tokens: 0`) counts by pieces.
        prompt_tokens: of each, on average; when not given 300, or the config's `max_prompt_tokens` if lower.
        answer_tokens: of each answer, on average; when not given 400, or the config's `max_new_tokens` if
            lower.
        batch_size: rows a batch on each device; the config's when not given.
        checkpointing: recompute activations; the config's when not given.
        fsdp2: share weights and optimiser state among all devices; the config's strategy when not given.
        mfu: share of the device's peak that matrix products reach. An assumption: measure yours.
        step_overhead_ms: of one greedy step of the target in transformers, besides reading weights. An
            assumption.
        link_gb_s: of the slowest link that gradients cross, one way; when not given 25 between machines
            (200 Gb/s), 300 within one.
        out: JSON file for all numbers.

    Raises:
        FileNotFoundError: no such config.
        ValueError: a config that names no target or drafter, or that `fit` would refuse for its precision.
    """
    settings = load_config(Path(run) if run else _SHIPPED / "qwen3-8b-0.6b.yaml")
    trainer, data, model = (settings.get(key) or {} for key in ("trainer", "data", "model"))
    record, chosen = data.get("record") or {}, model.get("drafter")
    beside = (model.get("target") or {}).get("name")
    target = target or record.get("target") or beside
    if drafter:
        chosen = {"class_path": "CausalDrafter", "init_args": {"pretrained": drafter}}
    if not target or not chosen:
        raise ValueError(
            f"plan: {run} names no {'drafter' if target else 'target'}; give --target and --drafter"
        )
    precision = str(trainer.get("precision", "32-true"))
    check_precision(precision)
    init = chosen.get("init_args") or {}
    device = device or ("cpu" if trainer.get("accelerator") == "cpu" else "h100")
    sheet = measured_cpu(precision) if device == "cpu" else DEVICES[device]
    rows, seq_len = batch_size or int(data.get("batch_size", 8)), int(data.get("seq_len", 512))
    of_target, sizes = sizes_of(target), drafter_sizes(chosen, target, seq_len)
    nodes, devices = nodes or int(trainer.get("num_nodes", 1)), devices or _count(trainer.get("devices", 1))
    world, link = nodes * devices, link_gb_s or (25.0 if nodes > 1 else 300.0)
    recompute = bool(init.get("gradient_checkpointing")) if checkpointing is None else checkpointing
    shards = world if (("ModelParallel" in str(trainer.get("strategy"))) if fsdp2 is None else fsdp2) else 1
    texts = _texts(record, prompts, prompt_tokens, answer_tokens)
    kept = int(record.get("num_kept", 32))
    features = len(record.get("feature_layers", ())) * of_target.hidden

    tokens = rows * seq_len
    learned = tokens * texts.learned
    memory = {
        "weights, gradients, AdamW": formulas.state_bytes(
            sizes.trained,
            sizes.parameters - sizes.trained,
            precision,
            2 if init.get("dtype") == "bfloat16" else 4,
        )
        / shards
        + (2 * 4 * (sizes.embedding + sizes.body / sizes.layers) if shards > 1 else 0.0),
        "activations": formulas.activation_bytes(sizes, int(sizes.most_passes * tokens), recompute),
        "loss": formulas.loss_bytes(
            sizes,
            int(model.get("chunk_tokens") or auto_chunk_tokens(sizes.vocabulary, sheet.kind)),
            int(sizes.most_passes * learned),
        ),
        "batch and masks": formulas.batch_bytes(tokens, kept, features) + formulas.mask_bytes(rows, seq_len),
        sheet.overhead: sheet.overhead_gb * GB,
    }
    flop = formulas.step_flop(sizes, tokens, learned, seq_len, sizes.trained, recompute) * sizes.passes
    if beside:
        memory["target beside the drafter"] = 2.0 * of_target.parameters + 12 * tokens * of_target.hidden
        flop += 2 * of_target.active * tokens
    compute = flop / (sheet.bf16_tflops * 1e12 * mfu)
    reduce = formulas.all_reduce_s(sizes.trained, world, link) if world > 1 else 0.0
    accumulate = int(trainer.get("accumulate_grad_batches", 1))
    # gradients travel while the backward pass of the last batch runs: two thirds of its time hide them
    step = accumulate * compute + max(0.0, reduce - compute * 2 / 3)
    total = texts.number * texts.length
    steps = int(trainer.get("max_steps", 0)) or round(2 * total / (tokens * accumulate * world))
    recorded = int(record.get("batch_size", 32))
    recording = formulas.record_bytes(of_target, recorded, texts.length, features, sheet)
    each_batch = formulas.record_batch_s(
        of_target, recorded, texts.prompt_tokens, texts.answer_tokens, sheet, mfu, step_overhead_ms / 1000
    )
    result = Plan(
        target=of_target,
        drafter=sizes,
        world=world,
        record_memory_gb=recording / GB,
        record_hours=texts.number / world / recorded * each_batch / 3600,
        trace_gb=total * bytes_per_token(kept, features) / GB,
        train_memory_gb={name: value / GB for name, value in memory.items()},
        train_hours=steps * step / 3600,
        tokens_per_second=tokens * accumulate * world / step,
        step_seconds=step,
        all_reduce_seconds=reduce,
        device_memory_gb=sheet.memory_gb,
        assumptions={"mfu": mfu, "step_overhead_ms": step_overhead_ms, "link_gb_s": link},
    )
    name = f"this CPU ({1000 * sheet.bf16_tflops:.0f} GFLOP/s measured)" if device == "cpu" else device
    where = f"{nodes} node(s) × {devices} × {name}"
    print("\n".join(_report(result, where, steps, accumulate * rows * world, shards, texts)))
    if out:
        content = asdict(result) | {"fits": result.fits}
        Path(out).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    return result


def _count(devices: object) -> int:
    """Devices of a machine as the Trainer's argument gives them; "auto" stands for one."""
    if isinstance(devices, (list, tuple)):
        return len(devices)
    return int(str(devices)) if str(devices).isdecimal() else 1


def load_config(file: Path) -> dict[str, Any]:
    """Read a fit config and the group files it names, relative to the file that names them.

    Raises:
        FileNotFoundError: names the file.
    """
    if not file.is_file():
        raise FileNotFoundError(f"plan: no config {file}")

    def fill(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: fill(item) for key, item in value.items()}
        if isinstance(value, str) and value.endswith(".yaml"):
            return load_config(file.parent / value)
        return value

    settings = yaml.safe_load(file.read_text("utf-8")) or {}
    return fill(fill_in_groups(settings, lambda name: (file.parent / name).is_file()))


@dataclass(frozen=True)
class _Texts:
    """What is recorded: prompts with the target's answers or, with answers of no token, given text.

    Attributes:
        number: of prompts, or of pieces of text.
        prompt_tokens: of each.
        answer_tokens: of each; 0 for given text.
        assumed: whether neither an option nor the config says how many.
    """

    number: int
    prompt_tokens: int
    answer_tokens: int
    assumed: bool

    @property
    def length(self) -> int:
        return self.prompt_tokens + self.answer_tokens

    @property
    def learned(self) -> float:
        """Share of the tokens that a drafter learns; of given text all are counted."""
        return self.answer_tokens / self.length if self.answer_tokens else 1.0

    def told(self) -> str:
        what = f"prompts of {self.prompt_tokens:,} tokens with answers of {self.answer_tokens:,}"
        if not self.answer_tokens:
            what = f"pieces of text of {self.prompt_tokens:,} tokens"
        return f"{self.number:,} {what}" + (" (assumed: give --prompts)" if self.assumed else "")


def _texts(record: dict[str, Any], prompts: int | None, question: int | None, answer: int | None) -> _Texts:
    """The options where they are given; else what `data.record` says; else an assumption."""
    limits, generation = record.get("prompts") or {}, record.get("generation") or {}
    if question is None:
        question = min(300, int(limits.get("max_prompt_tokens") or 300))
    if answer is None:
        answer = min(400, int(generation.get("max_new_tokens", 400)))
    rows = (record.get("corpus") or {}).get("max_rows") if answer else None  # rows of text are many pieces
    if prompts is None and rows:
        prompts = int(rows) * int(limits.get("prompts_per_document", 1))
    return _Texts(prompts or 50_000, question, answer, assumed=not prompts)


def _count_of(parameters: int) -> str:
    """8190000000 → "8.19 B", 398000 → "0.40 M"."""
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e8 else f"{parameters / 1e6:.2f} M"


def _time(hours: float) -> str:
    return f"{hours:6.1f} h" if hours >= 1 else f"{60 * hours:6.0f} minutes"


def _report(found: Plan, where: str, steps: int, rows: int, shards: int, texts: _Texts) -> Iterator[str]:
    yield f"{where} of {found.device_memory_gb:.0f} GB; all of it is estimated"
    for what, sizes in (("target ", found.target), ("drafter", found.drafter)):
        yield (
            f"{what} {sizes.name}: {_count_of(sizes.parameters)} parameters ({_count_of(sizes.body)} without "
            f"embeddings), {sizes.layers} layers of {sizes.hidden}, vocabulary {sizes.vocabulary:,}"
        )
    yield f"\nrecording {texts.told()}"
    yield f"  memory   {found.record_memory_gb:6.1f} GB a device (bf16 weights, cache, logits of 128 MiB)"
    yield f"  trace    {found.trace_gb:6.1f} GB on disk"
    yield f"  time     {_time(found.record_hours)} on {found.world} device(s)"
    yield f"\ntraining {steps:,} steps of {rows:,} rows"
    for name, value in found.train_memory_gb.items():
        share = f", 1/{shards}" if name.startswith("weights") and shards > 1 else ""
        yield f"  {value:8.1f} GB  {name}{share}"
    used = sum(found.train_memory_gb.values())
    verdict = "fits" if found.fits else "DOES NOT FIT"
    yield f"  {used:8.1f} GB  a device: {verdict} into 90 % of {found.device_memory_gb:.0f} GB"
    if not found.fits:
        yield (
            "  less: gradient_checkpointing of the drafter, a smaller data.batch_size with more "
            "accumulate_grad_batches, LoRA, or FSDP2 (configs/trainer/fsdp2.yaml)"
        )
    yield f"  step     {found.step_seconds:6.2f} s, {found.tokens_per_second:,.0f} tokens/s"
    if found.world > 1:
        yield f"  network  {found.all_reduce_seconds:6.2f} s a step for gradients, beside the backward pass"
    yield f"  time     {_time(found.train_hours)}"
    assumed = ", ".join(f"{name} {value:g}" for name, value in found.assumptions.items())
    yield f"\nassumed: {assumed}; formulas and their sources: docs/scaling.md"
