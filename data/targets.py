"""Targets and tokenizers by name: "embedded", a local folder, a GGUF file, or a hub name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from certdraft.support import (
    load_causal_lm,
    load_generation_config,
    load_model_ends,
    load_pretrained_config,
    load_pretrained_tokenizer,
    weights_origin,
)

if TYPE_CHECKING:
    from transformers import GenerationConfig, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

EMBEDDED = "embedded"


def embedded_target_path() -> Path:
    """Folder of the small Qwen3-architecture target that ships with certdraft."""
    return Path(__file__).parent / "embedded"


def load_target(
    name_or_path: str = EMBEDDED,
    *,
    revision: str | None = None,
    dtype: torch.dtype = torch.float32,
    device: str | torch.device = "cpu",
) -> PreTrainedModel:
    """Load a causal language model with every weight of its checkpoint, frozen and in eval mode.

    Args:
        name_or_path: "embedded", a local folder or GGUF file, or a hub name such as "Qwen/Qwen3-8B".
        revision: hub revision; ignored for local folders.
        dtype: dtype of the weights in memory; certificates always use fp32 logits whatever it is.
        device: where the weights go.

    Raises:
        FileNotFoundError: no such local folder, and no hub answers for that name.
        ValueError: the checkpoint lacks weights that the architecture needs, or brings unknown ones.
    """
    model = load_causal_lm(_source(name_or_path), revision=revision, dtype=dtype)
    cast(Any, model).to(device)  # transformers wraps `to` in a way that type checkers misread
    return model.eval().requires_grad_(False)


def load_target_ends(name_or_path: str = EMBEDDED, *, revision: str | None = None) -> PreTrainedModel:
    """A target of which only embeddings, final norm and lm_head are read; see `load_model_ends`.

    They are fp32 and frozen, on the CPU; names and errors as for `load_target`.
    """
    model = load_model_ends(_source(name_or_path), revision=revision)
    return model.eval().requires_grad_(False)


def target_config(name_or_path: str = EMBEDDED, *, revision: str | None = None) -> PretrainedConfig:
    """The config of a target, without its weights; names and errors as for `load_target`."""
    return load_pretrained_config(_source(name_or_path), revision=revision)


def generation_config(
    name_or_path: str = EMBEDDED, *, revision: str | None = None
) -> GenerationConfig | None:
    """The generation config of a target; None when it has none."""
    return load_generation_config(_source(name_or_path), revision=revision)


def target_weights_origin(name_or_path: str = EMBEDDED) -> str | None:
    """What a target's weights were made from; None where they are stored as they are used."""
    return weights_origin(_source(name_or_path))


def load_tokenizer(name_or_path: str = EMBEDDED, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a target, or of a folder without a model; names and errors as for `load_target`."""
    source = _source(name_or_path)
    if not (Path(source).expanduser() / "tokenizer_config.json").is_file():
        return load_pretrained_tokenizer(source, revision=revision)
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(Path(source).expanduser()), trust_remote_code=False)


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """SHA-256 (hex) of what turns text into ids: the vocabulary with its ids, merges and added tokens.

    Chat template, padding side and file layout do not count: two folders of one tokenizer agree.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:  # slow tokenizers: ids of every token decide
        content: Any = sorted(tokenizer.get_vocab().items())
    else:
        state = json.loads(backend.to_str())
        keys = ("normalizer", "pre_tokenizer", "model", "added_tokens")
        content = {key: state.get(key) for key in keys}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _source(name_or_path: str) -> str:
    if name_or_path == EMBEDDED:
        return str(embedded_target_path())
    if name_or_path.startswith((".", "/", "~")) and not Path(name_or_path).expanduser().exists():
        raise FileNotFoundError(
            f"{name_or_path} is not a folder; give a model folder, a hub name, or `{EMBEDDED}`"
        )
    return name_or_path
