"""What the engines are given: the embedded target, prompts, trained drafters, and their exports.

Everything lies in one folder, so that a second run of the suite starts where the first one ended.
"""

import copy
import dataclasses
import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from interop.counting import Counts, counts
from interop.training import fresh, train
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from certdraft.data import load_target, load_tokenizer, standard_library, tokenizer_fingerprint
from certdraft.decoding import greedy
from certdraft.drafters import BlockDrafter, CardFacts, Drafter, export, load_drafter

NEW, NUM_PROMPTS = 40, 4
STEPS = {"causal": 120, "eagle": 150, "block": 150, "dspark": 150, "dspark from masks": 150}
FAMILIES = {
    "eagle": "eagle3",
    "block": "dflash",
    "dspark from masks": "dspark",
}  # where engines say otherwise
# Targets by depth: the embedded one and two made of its layers; engines count layers in their own ways.
STACKS = {8: tuple(range(8)), 4: (0, 1, 6, 7), 12: (0, 1, 2, 2, 3, 3, 4, 4, 5, 5, 6, 7)}
SPECIAL = set(range(5))  # llama.cpp never says an end of text that it was told to ignore


@dataclass(frozen=True)
class Case:
    """One drafter as one engine may meet it.

    Attributes:
        family: "causal", "eagle", "block", "dspark", or "dspark from masks": without `sample_from_anchor`.
        format: of the export.
        num_tokens: draft tokens per round.
        layers: of the target.
    """

    family: str
    format: str
    num_tokens: int
    layers: int = 8

    @property
    def name(self) -> str:
        target = "" if self.layers == 8 else f", target of {self.layers} layers"
        return f"{self.family}-{self.format}-{self.num_tokens}{target}"


CASES = (
    Case("causal", "transformers", 4),
    Case("eagle", "eagle3", 4),
    Case("eagle", "speculators", 4),
    Case("block", "dflash", 5),
    Case("block", "dflash", 3),  # shorter than the block it was trained for
    Case("block", "speculators", 5),
    Case("dspark", "dspark", 5),
    Case("dspark", "dspark", 3),
    Case("dspark", "speculators", 5),
    Case("dspark from masks", "dspark", 4),
    Case("dspark from masks", "speculators", 4),
    *(
        Case(*case, layers)
        for layers in (4, 12)
        for case in (("causal", "transformers", 4), ("eagle", "eagle3", 4), ("block", "dflash", 5))
    ),
)


def stacked(target: PreTrainedModel, layers: Sequence[int]) -> PreTrainedModel:
    """A target of some of another one's layers."""
    config = copy.deepcopy(target.config)
    config.num_hidden_layers = config.max_window_layers = len(layers)
    config.layer_types = [target.config.layer_types[layer] for layer in layers]
    made = type(target)(config).eval()
    made.load_state_dict(
        {
            f"model.layers.{new}.{name}": weight
            for new, old in enumerate(layers)
            for name, weight in target.model.layers[old].state_dict().items()
        }
        | {name: weight for name, weight in target.state_dict().items() if ".layers." not in name}
    )
    return made


class Workspace:
    """The folder with everything, made where it is missing.

    Args:
        folder: for target, drafters, exports and whatever engines make of them.
        layers: of the target, a key of `STACKS`.
    """

    def __init__(self, folder: Path, layers: int = 8) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self.target: PreTrainedModel = stacked(load_target(), STACKS[layers])
        self.tokenizer = load_tokenizer()
        self.target_folder = folder / "target"
        if not self.target_folder.is_dir():
            self.target.save_pretrained(folder / "target.partial")
            self.tokenizer.save_pretrained(folder / "target.partial")
            (folder / "target.partial").rename(self.target_folder)
        self.prompts, self.texts = self._prompts()

    def _prompts(self) -> tuple[list[list[int]], list[list[int]]]:
        """Prompts whose greedy text neither ends nor loops at once, and these texts."""
        file = self.folder / "prompts.json"
        if not file.exists():
            found = []
            for number, document in enumerate(standard_library("test")):
                prompt = self.tokenizer.encode(document.text[3000:4000])[: 24 + number % 40]
                text = greedy(self.target, prompt, NEW) if len(prompt) >= 24 else []
                if len(set(text)) > 13 and not SPECIAL & set(text):
                    found.append((prompt, text))
                if len(found) == NUM_PROMPTS:
                    break
            file.write_text(json.dumps(found))
        prompts, texts = zip(*json.loads(file.read_text()), strict=True)
        return list(prompts), list(texts)

    def export(self, family: str, format: str, num_tokens: int) -> Path:
        """A drafter's folder in a format."""
        folder = self.folder / f"{family}-{format}"
        if not folder.is_dir():
            card = CardFacts(
                target=str(self.target_folder),
                target_vocab_size=self.target.config.vocab_size,
                tokenizer_fingerprint=tokenizer_fingerprint(self.tokenizer),
                target_architecture="Qwen3ForCausalLM",
            )
            drafter = self._trained(family)
            export(drafter, folder, format, tokenizer=self.tokenizer, draft_length=num_tokens, card=card)
        return folder

    def drafter(self, case: Case) -> Drafter:
        """The drafter as the export says it is, with a block as long as the draft."""
        drafter = load_drafter(self.export(case.family, case.format, case.num_tokens), target=self.target)
        if isinstance(drafter, BlockDrafter):
            drafter.config = dataclasses.replace(drafter.config, block_size=case.num_tokens + drafter.lead)
        return drafter

    def counts(self, case: Case, engine: str) -> Counts:
        """Ours, as an engine counts them."""
        file = self.folder / f"{case.family}-{case.num_tokens}.counts.json"  # whatever the format
        if not file.exists():
            found = counts(self.target, self.drafter(case), self.prompts, case.num_tokens, NEW)
            file.write_text(json.dumps({name: dataclasses.asdict(entry) for name, entry in found.items()}))
        return Counts(**json.loads(file.read_text())[engine])

    def job(self, case: Case, name: str | None = None, folder: Path | None = None) -> dict[str, Any]:
        """What an engine is told."""
        return {
            "name": name or case.name,
            "family": FAMILIES.get(case.family, case.family),
            "target": str(self.target_folder),
            "drafter": str(folder or self.export(case.family, case.format, case.num_tokens)),
            "num_tokens": case.num_tokens,
            "max_new_tokens": NEW,
            "prompts": self.prompts,
            "taps": list(self.drafter(case).taps),
            "work": str(self.folder),
        }

    def altered(self, case: Case, name: str) -> Path:
        """An export with one defect that files do not show."""
        source, folder = (
            self.export(case.family, case.format, case.num_tokens),
            self.folder / f"broken-{name}",
        )
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(source, folder)
        weights = load_file(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        DEFECTS[name](config, weights)
        (folder / "config.json").write_text(json.dumps(config))
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return folder

    def _trained(self, family: str) -> Drafter:
        file = self.folder / f"{family}.pt"
        if not file.exists():
            torch.save(train(family, STEPS[family], self.target).state_dict(), file)
        state = torch.load(file, weights_only=True)
        members = state.get("t2d")
        drafter = fresh(family, self.target, None if members is None else members.long())
        drafter.load_state_dict(state)
        return drafter.eval()


def _permute(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    weights["fc.weight"] = torch.cat([*weights["fc.weight"].chunk(3, 1)[::-1]], 1).contiguous()


def _swap_norms(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    at = "midlayer."
    first, second = weights[f"{at}input_layernorm.weight"], weights[f"{at}hidden_norm.weight"]
    weights[f"{at}input_layernorm.weight"], weights[f"{at}hidden_norm.weight"] = second, first


def _rope(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    config["rope_theta"] = config["rope_parameters"]["rope_theta"] = 100.0


def _mask(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    config["dflash_config"]["mask_token_id"] = 40


def _layers(config: dict[str, Any], weights: dict[str, torch.Tensor]) -> None:
    section = config["dflash_config"]
    section["target_layer_ids"] = [layer + 1 for layer in section["target_layer_ids"]]


DEFECTS = {
    "columns of fc permuted": _permute,
    "norms swapped": _swap_norms,
    "rotary base": _rope,
    "mask token": _mask,
    "layers off by one": _layers,
}
