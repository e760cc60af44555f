"""Writes configs/recipes: one full config for each Qwen3 target and drafter family, with its estimated cost.

    python benchmarks/recipes.py            # rewrite all
    python benchmarks/recipes.py --check    # exit code 1 when a file is not what this script writes

Costs are estimates by the formulas of `certdraft plan` (docs/scaling.md); none was measured. Parameters are
counted on the meta device from the real sizes. What a recipe says once for all targets is said here once.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import yaml

import certdraft
from certdraft.train.plan import model_sizes
from certdraft.train.plan.formulas import (
    DEVICES,
    GB,
    Device,
    activation_bytes,
    decode_step_s,
    loss_bytes,
    state_bytes,
    step_flop,
)
from certdraft.train.plan.model_sizes import ModelSizes

FOLDER = Path(certdraft.__file__).parent / "configs" / "recipes"
TARGETS = ("0.6B", "1.7B", "4B", "8B", "14B", "32B", "30B-A3B")
FAMILIES = ("causal", "causal-lora", "eagle3", "dflash")
PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 50_000, 300, 400
STEPS, SEQ_LEN, TOKENS = 4_000, 4096, 32_768  # a step, over all devices and accumulated batches
MFU, OVERHEAD_S = 0.4, 0.025
DRAFT_VOCABULARY, RANK = 32_000, 32

_LEADS = {
    "causal": "{drafter} as drafter of {target}, every weight trained",
    "causal-lora": "{drafter} with LoRA adapters as drafter of {target}",
    "eagle3": "an EAGLE-3 head on {target}",
    "dflash": "a DFlash block drafter on {target}",
}


@dataclass(frozen=True)
class Recipe:
    """One config.

    Attributes:
        target: size in the target's name, "8B".
        family: one of `FAMILIES`.
    """

    target: str
    family: str

    @property
    def name(self) -> str:
        return f"qwen3-{self.target.lower()}-{self.family}"

    @property
    def reads_target(self) -> bool:
        """Whether the target is run beside the drafter."""
        return self.family in ("eagle3", "dflash")

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.name}.yaml"


def recipes() -> list[Recipe]:
    """All of them. No published Qwen3 is smaller than 0.6B, so adapters have nothing to start from there."""
    every = [Recipe(target, family) for target in TARGETS for family in FAMILIES]
    return [recipe for recipe in every if recipe != Recipe("0.6B", "causal-lora")]


def hub_name(size: str) -> str:
    return f"Qwen/Qwen3-{size}"


@cache
def sizes_of(name: str) -> ModelSizes:
    """Sizes of a model whose config ships with certdraft."""
    return model_sizes.sizes_of(name)


def shipped_config(size: str) -> dict[str, Any]:
    """Keys of a target's config.json."""
    file = FOLDER.parent / "models" / f"qwen3-{size.lower()}.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def drafter_sizes(recipe: Recipe) -> tuple[ModelSizes, int]:
    """Sizes of the drafter that the config describes, and how many of its parameters are trained."""
    settings = yaml.safe_load("\n".join(drafter_lines(recipe)))["drafter"]
    if isinstance(settings, str):
        settings = yaml.safe_load((FOLDER / settings).read_text(encoding="utf-8"))
    sizes = model_sizes.drafter_sizes(settings, hub_name(recipe.target))
    return sizes, sizes.trained


def fresh_config() -> dict[str, object]:
    """The causal drafter of the smallest target: four of its layers, with its embeddings."""
    keys = shipped_config("0.6B")
    return {**keys, "num_hidden_layers": 4}


@dataclass(frozen=True)
class Cost:
    """Estimates: GB on one device, hours on one device."""

    device: str
    parameters: int
    recording_gb: float
    recording_h: float
    trace_gb: float
    training_gb: float
    training_h: float


def cost(recipe: Recipe) -> Cost:
    """What a recipe takes on one accelerator, the smallest that holds it."""
    target, (drafter, trained) = sizes_of(hub_name(recipe.target)), drafter_sizes(recipe)
    active = active_parameters(recipe.target, target)
    rows = micro_rows(recipe)
    tokens = rows * SEQ_LEN
    learned = tokens * ANSWER_TOKENS / (PROMPT_TOKENS + ANSWER_TOKENS)
    frozen = drafter.parameters - trained
    memory = state_bytes(trained, frozen, "bf16-mixed", 2) + activation_bytes(
        drafter, tokens, checkpointing=True
    )
    memory += loss_bytes(drafter, 1024, int(learned)) + 2.5 * GB
    flop = step_flop(drafter, TOKENS, TOKENS * learned / tokens, SEQ_LEN, trained, checkpointing=True)
    if recipe.reads_target:
        memory += 2 * target.parameters + tokens * 12 * target.hidden
        flop += 2 * active * TOKENS
        flop *= 1 if recipe.family == "dflash" else 1.5  # five unrolled steps read one layer again and again
    recording = (
        2 * target.parameters + 64 * (PROMPT_TOKENS + ANSWER_TOKENS) * 4 * target.layers * target.key_value
    )
    needed = max(memory, recording + 3 * GB)
    device = "h100" if needed < 0.9 * 80 * GB else "h200"
    sheet = DEVICES[device]
    return Cost(
        device=device,
        parameters=trained,
        recording_gb=(recording + 3 * GB) / GB,
        recording_h=recording_hours(target, active, sheet),
        trace_gb=PROMPTS * (PROMPT_TOKENS + ANSWER_TOKENS) * 204 / GB,
        training_gb=memory / GB,
        training_h=STEPS * flop / (sheet.bf16_tflops * 1e12 * MFU) / 3600,
    )


def recording_hours(target: ModelSizes, active: int, sheet: Device) -> float:
    """Greedy answers in batches of 64 through transformers."""
    each = decode_step_s(
        replace(target, parameters=active), 64, PROMPT_TOKENS + ANSWER_TOKENS / 2, sheet, MFU
    )
    if active != target.parameters:  # 64 rows touch nearly every expert
        each = decode_step_s(target, 1, PROMPT_TOKENS, sheet, MFU)
    return PROMPTS / 64 * ANSWER_TOKENS * (each + OVERHEAD_S) / 3600


def active_parameters(size: str, target: ModelSizes) -> int:
    """Parameters a token is multiplied with; a mixture of experts uses few of those it stores."""
    return 3_300_000_000 if size == "30B-A3B" else target.parameters


def micro_rows(recipe: Recipe) -> int:
    """Rows of `SEQ_LEN` a device takes at once."""
    return 1 if recipe.target in ("32B", "30B-A3B", "14B") else 2


def text(recipe: Recipe) -> str:
    """The file."""
    target, found = hub_name(recipe.target), cost(recipe)
    drafter = "a fresh network of four layers" if recipe.target == "0.6B" else "Qwen3-0.6B"
    lead = _LEADS[recipe.family].format(target=target.partition("/")[2], drafter=drafter)
    beside = ", the target included" if recipe.reads_target else ""
    rows = micro_rows(recipe)
    lines = [
        f"# {lead[0].upper()}{lead[1:]}.",
        f"# Hardware: one {found.device.upper()}. Time and memory are estimates at {MFU:.0%} of its peak:",
        f"#   recording {PROMPTS:,} answers of {ANSWER_TOKENS} tokens: {found.recording_gb:.0f} GB, "
        f"{found.recording_h:.0f} hours, {found.trace_gb:.0f} GB of trace;",
        f"#   training {STEPS:,} steps of {TOKENS:,} tokens: {found.training_gb:.0f} GB{beside}, "
        f"{found.training_h:.1f} hours, {found.parameters / 1e6:,.0f} M trained parameters.",
        f"#   certdraft fit --config configs/recipes/{recipe.path.name} \\",
        "#       --data.record.corpus.source prompts.jsonl",
        "# Written by benchmarks/recipes.py; nobody has run it to the end.",
        f"name: {recipe.name}",
        "seed_everything: 0",
        "model:",
        *drafter_lines(recipe),
        "  loss: ../loss/ce-kl.yaml  # for chains; best-first trees: runner-up-4-sharp-1.5.yaml",
        "  optimizer:",
        f"    lr: {learning_rate(recipe)}",
        "    warmup_steps: 160",
        "    final_lr: 0.1",
        "    betas: [0.9, 0.95]",
        *([f"  target: {{name: {target}, dtype: bfloat16, full: false}}"] if recipe.reads_target else []),
        "data:",
        f"  train: runs/{recipe.target.lower()}/traces/train",
        f"  validation: runs/{recipe.target.lower()}/traces/validation",
        f"  seq_len: {SEQ_LEN}",
        f"  batch_size: {rows}",
        "  validation_rows: 512",
        "  record:",
        f"    target: {target}",
        "    dtype: bfloat16",
        "    corpus: {source: prompts.jsonl}",
        "    generation: {max_new_tokens: 1024, max_length: 4096}",
        "    batch_size: 64",
        "trainer:",
        "  accelerator: gpu",
        "  devices: 1",
        "  precision: bf16-mixed",
        f"  max_steps: {STEPS}",
        f"  accumulate_grad_batches: {TOKENS // (rows * SEQ_LEN)}",
        "  gradient_clip_val: 1.0",
        "  val_check_interval: 2000",
        "  check_val_every_n_epoch: null",
        "  log_every_n_steps: 20",
        "checkpoint:",
        "  every_n_train_steps: 250",
    ]
    return "\n".join(lines) + "\n"


def learning_rate(recipe: Recipe) -> str:
    """Where peers' recipes of each family are; tune it (configs/sweeps/learning-rate.yaml)."""
    if recipe == Recipe("0.6B", "causal"):
        return "3.0e-4"
    return {"causal": "2.0e-5", "causal-lora": "2.0e-4", "eagle3": "1.0e-4", "dflash": "6.0e-4"}[
        recipe.family
    ]


def drafter_lines(recipe: Recipe) -> list[str]:
    """The `drafter:` of a config."""
    if recipe.family == "causal-lora":
        return ["  drafter: ../drafter/qwen3-0.6b-lora.yaml"]
    if recipe.family == "causal" and recipe.target != "0.6B":
        return ["  drafter: ../drafter/qwen3-0.6b.yaml"]
    if recipe.family == "causal":
        given = {
            key: value for key, value in fresh_config().items() if key not in ("model_type", "vocab_size")
        }
        return [
            "  drafter:", "    class_path: CausalDrafter", "    init_args:", "      init_from_target: true",
            "      config:", *(f"        {key}: {json.dumps(value)}" for key, value in given.items()),
        ]  # fmt: skip
    if recipe.family == "eagle3":
        return [
            "  drafter:", "    class_path: EagleDrafter", "    init_args:", "      unroll: 5",
            f"      config: {{draft_vocab_size: {DRAFT_VOCABULARY}}}",
        ]  # fmt: skip
    return [
        "  drafter:", "    class_path: BlockDrafter", "    init_args:", "      num_anchors: 512",
        "      config: {num_hidden_layers: 5, block_size: 16, mask_token_id: 151669}",
    ]  # fmt: skip


def main() -> None:
    """Writes or checks every file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    FOLDER.mkdir(exist_ok=True)
    stale = []
    for recipe in recipes():
        wanted = text(recipe)
        if check and (not recipe.path.is_file() or recipe.path.read_text(encoding="utf-8") != wanted):
            stale.append(recipe.path.name)
        elif not check:
            recipe.path.write_text(wanted, encoding="utf-8")
    if stale:
        sys.exit(f"not what benchmarks/recipes.py writes: {', '.join(stale)}")


if __name__ == "__main__":
    main()
