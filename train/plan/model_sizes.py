"""Sizes of a target and a drafter from their configs, counted on the meta device: no weights are read."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
import yaml
from jsonargparse import ArgumentParser
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig

from certdraft.data import target_config
from certdraft.drafters import Drafter, TargetSource, drafter_kinds
from certdraft.support import facts_of, text_config

_SHIPPED = Path(__file__).parents[2] / "configs" / "models"


@dataclass(frozen=True)
class ModelSizes:
    """What memory and time depend on. L layers, H hidden, V vocabulary.

    Args:
        name: as given.
        parameters: all of them; a tied lm_head counts once, and a target's parts that a drafter uses do not.
        trained: of them, those with a gradient.
        embedding: of the input embeddings and of an lm_head that is not tied to them.
        layers: L.
        hidden: H.
        query: heads × head size.
        key_value: key-value heads × head size.
        intermediate: of the MLP.
        vocabulary: V, of the lm_head.
        active: parameters that one token is multiplied with: of a mixture of experts those it is routed to.
        passes: times a drafter's layers run over a token, on average over the training.
        most_passes: the same in the steps with the most.
    """

    name: str
    parameters: int
    trained: int
    embedding: int
    layers: int
    hidden: int
    query: int
    key_value: int
    intermediate: int
    vocabulary: int
    active: int
    passes: float = 1.0
    most_passes: float = 1.0

    @property
    def body(self) -> int:
        """Parameters that every token is multiplied with, the lm_head aside."""
        return self.parameters - self.embedding


def sizes_of(model: str | dict[str, Any]) -> ModelSizes:
    """Count a causal LM.

    Args:
        model: "embedded", a folder with config.json, a hub name, or the keys of a config. The sizes of some
            models ship with certdraft, so that they need no network.

    Raises:
        FileNotFoundError: no such folder, and no hub answers for that name.
        ValueError: not the config of a causal language model.
    """
    if isinstance(model, dict):
        keys = dict(model)
        config: Any = AutoConfig.for_model(keys.pop("model_type", "qwen3"), **keys)
        name = "fresh network"
    else:
        name, config = model, read_config(model)
    with torch.device("meta"):
        network: Any = AutoModelForCausalLM.from_config(config)
    return _measured(name, network, config, network.get_output_embeddings().weight)


def drafter_sizes(settings: dict[str, Any], target: str, seq_len: int = 4096) -> ModelSizes:
    """Count the network that `fit` builds from the `model.drafter` of a config, of any registered kind.

    Args:
        settings: `class_path` and `init_args`.
        target: as in `sizes_of`.
        seq_len: tokens of a row, which `passes` may depend on.

    Raises:
        FileNotFoundError: the config of the target, or of a `pretrained` drafter, is not here.
        ValueError: an unknown class, or arguments that do not fit it or the target.
    """
    drafter = meta_drafter(settings, target)
    head = getattr(drafter, "head_weight", None)
    sizes = _measured(settings["class_path"].rpartition(".")[2], drafter, drafter.network_config, head)
    passes, most = drafter.passes(seq_len)
    return replace(sizes, passes=passes, most_passes=most)


def meta_drafter(settings: dict[str, Any], target: str) -> Drafter:
    """Return the drafter that `fit` builds from the `model.drafter` of a config, on the meta device."""
    kind, parser = _class(settings["class_path"]), ArgumentParser(exit_on_error=False)
    parser.add_class_arguments(kind, "drafter", instantiate=False, fail_untyped=False)
    parsed = parser.instantiate(parser.parse_object({"drafter": settings.get("init_args") or {}}))
    config = read_config(target)
    vocab_size = facts_of(config).vocab_size
    source = TargetSource(
        target,
        vocab_size,
        load=lambda: _one_layer(target),
        num_ids=lambda: vocab_size - 1,  # some spare row; which one changes no size
        greedy_counts=lambda: torch.zeros(vocab_size, dtype=torch.long),  # nor do the tokens chosen
    )
    return kind.on_meta(source, read_config, **vars(parsed.drafter))


def read_config(name: str) -> PreTrainedConfig:
    """Return the config of a model: a shipped one, of a folder, or of the hub."""
    shipped = _SHIPPED / f"{name.rpartition('/')[2].lower()}.yaml"
    if not Path(name).expanduser().is_dir() and name.startswith("Qwen/") and shipped.is_file():
        keys = yaml.safe_load(shipped.read_text(encoding="utf-8"))
        return AutoConfig.for_model(keys.pop("model_type"), **keys)
    try:
        return target_config(name)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"no config of {name!r} here, and no hub answers for it; give a folder that holds its "
            "config.json (a few hundred bytes, the weights are not needed)"
        ) from error


@cache
def _one_layer(name: str) -> Any:
    """A target on the meta device; only its embeddings, lm_head and number of layers are looked at."""
    config = read_config(name)
    text: Any = text_config(config)
    num, text.num_hidden_layers = text.num_hidden_layers, 1
    with torch.device("meta"):
        target = AutoModelForCausalLM.from_config(config)
    text_config(target.config).num_hidden_layers = num
    return target


def _measured(name: str, network: nn.Module, config: Any, head: Tensor | None) -> ModelSizes:
    text = text_config(config)

    def size(key: str, default: int = 0) -> int:
        return int(getattr(text, key, None) or default)

    own = {id(parameter): parameter for parameter in network.parameters()}
    ends = [part.weight for part in network.modules() if isinstance(part, nn.Embedding)]
    ends += [] if head is None else [head]
    experts = sum(part.numel() for name, part in network.named_parameters() if ".experts." in name)
    idle = 1 - size("num_experts_per_tok") / max(size("num_experts"), 1)
    heads, hidden = size("num_attention_heads"), size("hidden_size")
    head_size = size("head_dim", hidden // max(heads, 1))
    parameters = sum(parameter.numel() for parameter in own.values())
    return ModelSizes(
        name=name,
        parameters=parameters,
        trained=sum(parameter.numel() for parameter in own.values() if parameter.requires_grad),
        embedding=sum(own[end].numel() for end in {id(end) for end in ends} & own.keys()),
        layers=size("num_hidden_layers", 1),
        hidden=hidden,
        query=heads * head_size,
        key_value=size("num_key_value_heads", heads) * head_size,
        intermediate=size("intermediate_size"),
        vocabulary=0 if head is None else len(head),
        active=parameters - round(experts * idle),
    )


def _class(path: str) -> type[Drafter]:
    module, _, name = path.rpartition(".")
    if module:
        found: Any = getattr(import_module(module), name, None)
    else:
        found = next((kind for kind in drafter_kinds().values() if kind.__name__ == name), None)
    if not (isinstance(found, type) and issubclass(found, Drafter)):
        raise ValueError(f"{path} is not a drafter class; give {_names()}, or a full import path")
    return found


def _names() -> str:
    return ", ".join(kind.__name__ for kind in drafter_kinds().values())
