"""How large a model is, from its config alone: no weights are read, no memory is used."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from certdraft.data import embedded_target_path

_SHIPPED = Path(__file__).parents[2] / "configs" / "models"


@dataclass(frozen=True)
class ModelSizes:
    """What memory and time depend on. L layers, H hidden, V vocabulary.

    Args:
        name: as given.
        parameters: all of them; a tied head counts once.
        embedding: of the input embeddings and of a head that is not tied to them.
        layers: L.
        hidden: H.
        query: heads × head size.
        key_value: key-value heads × head size.
        intermediate: of the MLP.
        vocabulary: V.
    """

    name: str
    parameters: int
    embedding: int
    layers: int
    hidden: int
    query: int
    key_value: int
    intermediate: int
    vocabulary: int

    @property
    def body(self) -> int:
        """Parameters that every token is multiplied with, the head aside."""
        return self.parameters - self.embedding

    def adapters(self, rank: int) -> int:
        """Parameters of LoRA adapters of a rank on all linear layers of the body."""
        widths = (
            2 * (self.hidden + self.query)  # q, o
            + 2 * (self.hidden + self.key_value)  # k, v
            + 3 * (self.hidden + self.intermediate)  # gate, up, down
        )
        return self.layers * rank * widths


def sizes_of(model: str | dict[str, Any]) -> ModelSizes:
    """Sizes of a model.

    Args:
        model: "embedded", a folder with config.json, a hub name, or the keys of a config. The sizes of some
            models ship with certdraft, so that they need no network.

    Raises:
        FileNotFoundError: no such folder, and no hub answers for that name.
        ValueError: not the config of a causal language model.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    if isinstance(model, dict):
        keys = dict(model)
        config: Any = AutoConfig.for_model(keys.pop("model_type", "qwen3"), **keys)
        name = "fresh network"
    else:
        name, config = model, _config(model)
    with torch.device("meta"):
        network = AutoModelForCausalLM.from_config(config)
    head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    ends = {
        id(end.weight): end.weight.numel()
        for end in (network.get_input_embeddings(), network.get_output_embeddings())
    }
    return ModelSizes(
        name=name,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        embedding=sum(ends.values()),
        layers=config.num_hidden_layers,
        hidden=config.hidden_size,
        query=config.num_attention_heads * head_size,
        key_value=getattr(config, "num_key_value_heads", config.num_attention_heads) * head_size,
        intermediate=config.intermediate_size,
        vocabulary=config.vocab_size,
    )


def _config(name: str) -> Any:
    from transformers import AutoConfig

    shipped = _SHIPPED / f"{name.rpartition('/')[2].lower()}.yaml"
    if not Path(name).expanduser().is_dir() and name.startswith("Qwen/") and shipped.is_file():
        keys = yaml.safe_load(shipped.read_text(encoding="utf-8"))
        return AutoConfig.for_model(keys.pop("model_type"), **keys)
    folder = str(embedded_target_path()) if name == "embedded" else str(Path(name).expanduser())
    try:
        return AutoConfig.from_pretrained(folder if Path(folder).is_dir() else name)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"plan: no config of {name!r} here, and no hub answers for it; give a folder that holds its "
            "config.json (a few hundred bytes, the weights are not needed)"
        ) from error
