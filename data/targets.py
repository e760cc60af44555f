"""Targets and tokenizers by name: the embedded default, a local folder, or a hub name."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from certdraft.support import load_causal_lm, load_pretrained, model_source

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
    """A causal language model, frozen and in eval mode.

    Args:
        name_or_path: "embedded", a local folder, or a hub name such as "Qwen/Qwen3-8B".
        revision: hub revision; ignored for local folders.
        dtype: dtype of the weights in memory; certificates always use fp32 logits whatever it is.
        device: where the weights go.

    Raises:
        FileNotFoundError: no such local folder, and no hub answers for that name.
        ValueError: the checkpoint lacks weights that the architecture needs, or brings unknown ones.
    """
    from transformers import AutoModelForCausalLM

    source = _source(name_or_path)
    if _is_gguf(source):
        return load_causal_lm(source, dtype=dtype).to(device).requires_grad_(False)
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source, revision=revision, dtype=dtype, output_loading_info=True
        )
    except OSError as error:
        raise FileNotFoundError(_unreachable("target", name_or_path, error)) from error
    model, info = loaded
    _refuse_partial(source, info)
    return model.to(device).eval().requires_grad_(False)


def target_config(name_or_path: str = EMBEDDED, *, revision: str | None = None) -> PretrainedConfig:
    """The config of a target, without its weights; same names as `load_target`.

    Raises:
        FileNotFoundError: no such local folder, and no hub answers for that name.
    """
    from transformers import AutoConfig

    return _pretrained(AutoConfig, "config", name_or_path, revision)


def generation_config(
    name_or_path: str = EMBEDDED, *, revision: str | None = None
) -> GenerationConfig | None:
    """The generation config of a target; None when it has none."""
    from transformers import GenerationConfig

    if _is_gguf(_source(name_or_path)):
        return None
    try:
        return GenerationConfig.from_pretrained(_source(name_or_path), revision=revision or "main")
    except OSError:
        return None


def load_tokenizer(name_or_path: str = EMBEDDED, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a target; same names as `load_target`.

    Raises:
        FileNotFoundError: no such local folder, and no hub answers for that name.
    """
    from transformers import AutoTokenizer

    return _pretrained(AutoTokenizer, "tokenizer", name_or_path, revision)


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


def _pretrained(kind: Any, what: str, name_or_path: str, revision: str | None) -> Any:
    if _is_gguf(_source(name_or_path)):
        return load_pretrained(kind, what, _source(name_or_path))
    try:
        return kind.from_pretrained(_source(name_or_path), revision=revision)
    except (OSError, ValueError) as error:
        raise FileNotFoundError(_unreachable(what, name_or_path, error)) from error


def _source(name_or_path: str) -> str:
    if name_or_path == EMBEDDED:
        return str(embedded_target_path())
    if name_or_path.startswith((".", "/", "~")) and not Path(name_or_path).expanduser().exists():
        raise FileNotFoundError(
            f"{name_or_path} is not a folder; give a model folder, a hub name, or `{EMBEDDED}`"
        )
    return str(Path(name_or_path).expanduser()) if name_or_path.startswith("~") else name_or_path


def _is_gguf(source: str) -> bool:
    path = Path(source)
    if path.is_dir():  # a folder may also hold a tokenizer alone
        return any(path.glob("*.gguf")) and model_source(path).gguf is not None
    return path.suffix == ".gguf"


def _unreachable(what: str, name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"cannot load the {what} {name!r}: {reason} If this machine has no access to the hub, download the "
        f"repository elsewhere (`hf download {name}`) and give the local folder instead; a gated repository "
        "needs the HF_TOKEN environment variable."
    )


def _refuse_partial(source: str, info: dict[str, Any]) -> None:
    """transformers only logs missing keys and leaves the layers random: never acceptable for a target."""
    problems = {
        kind: sorted(map(str, info.get(kind) or ()))
        for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")
    }
    problems = {kind: keys for kind, keys in problems.items() if keys}
    if problems:
        listed = "; ".join(
            f"{kind.replace('_', ' ')}: {', '.join(keys[:3])}" for kind, keys in problems.items()
        )
        raise ValueError(
            f"{source} does not hold a whole model ({listed}); re-download it or fix its config.json"
        )
