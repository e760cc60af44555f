"""Writes configs/recipes: one full config for each Qwen3 target and drafter family, with its estimated cost.

    python benchmarks/recipes.py            # rewrite all
    python benchmarks/recipes.py --check    # exit code 1 when a file is not what this script writes

The numbers in a header are those of `certdraft plan` for that file (docs/scaling.md): estimates all.
What a recipe says once for all targets is said here once.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

import certdraft
from certdraft.train.plan.plan_command import Plan, plan

FOLDER = Path(certdraft.__file__).parent / "configs" / "recipes"
TARGETS = ("0.6B", "1.7B", "4B", "8B", "14B", "32B", "30B-A3B")
FAMILIES = ("causal", "causal-lora", "eagle3", "dflash", "dspark")
PROMPTS, PROMPT_TOKENS, ANSWER_TOKENS = 50_000, 300, 400
DEVICES = ("h100", "h200")  # the first that holds recording and training
STEPS, SEQ_LEN, TOKENS = 4_000, 4096, 32_768  # a step, over all devices and accumulated batches
DRAFT_VOCABULARY, RANK = 32_000, 32

_LEADS = {
    "causal": "{drafter} as drafter of {target}, every weight trained",
    "causal-lora": "{drafter} with LoRA adapters as drafter of {target}",
    "eagle3": "an EAGLE-3 head on {target}",
    "dflash": "a DFlash block drafter on {target}",
    "dspark": "a DSpark drafter on {target}",
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
        return self.family in ("eagle3", "dflash", "dspark")

    @property
    def place(self) -> str:
        """Its path in the folder, without .yaml."""
        return f"qwen3-{self.target.lower()}/{self.family}"

    @property
    def path(self) -> Path:
        return FOLDER / f"{self.place}.yaml"


def recipes() -> list[Recipe]:
    """All of them. No published Qwen3 is smaller than 0.6B, so adapters have nothing to start from there."""
    every = [Recipe(target, family) for target in TARGETS for family in FAMILIES]
    return [recipe for recipe in every if recipe != Recipe("0.6B", "causal-lora")]


def hub_name(size: str) -> str:
    return f"Qwen/Qwen3-{size}"


def shipped_config(size: str) -> dict[str, Any]:
    """Keys of a target's config.json."""
    file = FOLDER.parent / "models" / f"qwen3-{size.lower()}.yaml"
    return yaml.safe_load(file.read_text(encoding="utf-8"))


def fresh_config() -> dict[str, object]:
    """The causal drafter of the smallest target: four of its layers, with its embeddings."""
    keys = shipped_config("0.6B")
    return {**keys, "num_hidden_layers": 4}


def planned(body: str) -> tuple[str, Plan]:
    """The device a config needs, and what `certdraft plan` says of it there.

    Args:
        body: the config as YAML.
    """
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
        file = Path(folder) / "recipe.yaml"
        file.write_text(body, encoding="utf-8")
        for device in DEVICES:
            found = plan(
                str(file),
                device=device,
                prompts=PROMPTS,
                prompt_tokens=PROMPT_TOKENS,
                answer_tokens=ANSWER_TOKENS,
            )
            if found.fits and found.record_memory_gb < 0.9 * found.device_memory_gb:
                return device, found
    raise ValueError(f"no device of {DEVICES} holds this recipe:\n{body}")


def micro_rows(recipe: Recipe) -> int:
    """Rows of `SEQ_LEN` a device takes at once."""
    return 1 if recipe.target in ("32B", "30B-A3B", "14B") else 2


def text(recipe: Recipe) -> str:
    """The file."""
    content = body(recipe)
    return header(recipe, *planned(content)) + content


def header(recipe: Recipe, device: str, found: Plan) -> str:
    """What the file says first: its purpose, and the numbers of its plan."""
    target = hub_name(recipe.target).partition("/")[2]
    drafter = "a fresh network of four layers" if recipe.target == "0.6B" else "Qwen3-0.6B"
    lead = _LEADS[recipe.family].format(target=target, drafter=drafter)
    beside = ", the target included" if recipe.reads_target else ""
    memory = sum(found.train_memory_gb.values())
    option = "" if device == DEVICES[0] else f" --device {device}"
    lines = [
        f"# {lead[0].upper()}{lead[1:]}.",
        f"# Hardware: one {device.upper()}. Time, memory and disk as estimated by",
        f"#       certdraft plan --run recipes/{recipe.place}{option}",
        f"#   recording {PROMPTS:,} answers of {ANSWER_TOKENS} tokens: {found.record_memory_gb:.0f} GB, "
        f"{found.record_hours:.1f} hours, {found.trace_gb:.0f} GB of trace;",
        f"#   training {STEPS:,} steps of {TOKENS:,} tokens: {memory:.0f} GB{beside}, "
        f"{found.train_hours:.1f} hours, {found.drafter.trained / 1e6:,.0f} M trained parameters.",
        f"#   certdraft fit --config recipes/{recipe.place} --data.record.corpus.source prompts.jsonl",
        "# Written by benchmarks/recipes.py; nobody has run it to the end.",
    ]
    return "\n".join(lines) + "\n"


def body(recipe: Recipe) -> str:
    """The settings."""
    target, rows = hub_name(recipe.target), micro_rows(recipe)
    lines = [
        f"name: {recipe.name}",
        "seed_everything: 0",
        "model:",
        *drafter_lines(recipe),
        "  decoder: chain  # or best-first, m-ary, sampling: it chooses the loss (docs/losses.md)",
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
    rates = {"causal": "2.0e-5", "causal-lora": "2.0e-4", "eagle3": "1.0e-4"}
    return rates.get(recipe.family, "6.0e-4")


def drafter_lines(recipe: Recipe) -> list[str]:
    """The `drafter:` of a config."""
    if recipe.family == "causal-lora":
        return ["  drafter: ../../drafter/qwen3-0.6b-lora.yaml"]
    if recipe.family == "causal" and recipe.target != "0.6B":
        return ["  drafter: ../../drafter/qwen3-0.6b.yaml"]
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
    recompute = ["      gradient_checkpointing: true"] if micro_rows(recipe) == 1 else []  # the large targets
    kind, block = ("DSparkDrafter", 7) if recipe.family == "dspark" else ("BlockDrafter", 16)
    return [
        "  drafter:", f"    class_path: {kind}", "    init_args:", "      num_anchors: 512", *recompute,
        f"      config: {{num_hidden_layers: 5, block_size: {block}, mask_token_id: 151669}}",
    ]  # fmt: skip


def main() -> None:
    """Writes or checks every file."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="change nothing")
    check = parser.parse_args().check
    stale = []
    for recipe in recipes():
        wanted = text(recipe)
        if check and (not recipe.path.is_file() or recipe.path.read_text(encoding="utf-8") != wanted):
            stale.append(recipe.place)
        elif not check:
            recipe.path.parent.mkdir(parents=True, exist_ok=True)
            recipe.path.write_text(wanted, encoding="utf-8")
    if stale:
        sys.exit(f"not what benchmarks/recipes.py writes: {', '.join(stale)}")


if __name__ == "__main__":
    main()
