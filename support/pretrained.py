"""Where a model lives: a folder of `save_pretrained`, a GGUF file or the folder around it, or a hub id.

transformers retries an unreachable hub for a minute per file; here the hub is asked once.
"""

from __future__ import annotations

import io
import os
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from certdraft.support.hub import hub_answers


@dataclass(frozen=True)
class ModelSource:
    """A model as `from_pretrained` names it.

    Attributes:
        name: a folder or a hub id.
        gguf: name of the GGUF file in that folder; None for safetensors and hub models.
        local: whether `name` is a folder.
    """

    name: str
    gguf: str | None
    local: bool

    @property
    def keywords(self) -> dict[str, Any]:
        """Arguments of `from_pretrained` beside the name."""
        return {} if self.gguf is None else {"gguf_file": self.gguf}


def model_source(name: str | Path) -> ModelSource:
    """Find a model.

    Args:
        name: a folder, a `.gguf` file, a folder with one such file and no config.json, or a hub id.

    Raises:
        FileNotFoundError: no such folder or file, or a folder without a model.
        ValueError: several GGUF files to choose from, a LoRA adapter, or the gguf package is missing.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        file = _gguf_in(path)
        return ModelSource(str(path), None if file is None else file.name, local=True)
    if path.suffix.lower() == ".gguf":
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file.")
        _require_gguf(path)
        return ModelSource(str(path.parent), path.name, local=True)
    source = str(path) if str(name).startswith("~") else str(name)
    if source.startswith((".", os.sep)) or source.count("/") > 1:
        raise FileNotFoundError(
            f"{source}: no such folder; give one with config.json, a .gguf file, or a hub id 'org/name'."
        )
    return ModelSource(source, None, local=False)


def load_pretrained(
    kind: Any, what: str, name: str | Path, *, revision: str | None = None, **keywords: Any
) -> Any:
    """`kind.from_pretrained` for every sort of source, without a word on the terminal.

    Args:
        kind: a class of transformers with `from_pretrained`.
        what: the thing loaded, for messages.
        name: see `model_source`.
        revision: of a hub model.
        keywords: further arguments of `from_pretrained`.

    Raises:
        FileNotFoundError: no such folder, no such model on the hub, or no hub.
        ValueError: transformers cannot load it.
    """
    source = model_source(name)
    offline = not source.local and not hub_answers()
    try:
        # a GGUF file is unpacked behind a tqdm bar that no setting of transformers turns off
        bars = redirect_stderr(io.StringIO()) if source.gguf else nullcontext()
        with quiet(), bars:
            return kind.from_pretrained(
                source.name,
                revision=revision or "main",
                local_files_only=offline,
                trust_remote_code=False,
                **source.keywords,
                **({"adapter_kwargs": {"local_files_only": offline}} if "dtype" in keywords else {}),
                **keywords,
            )
    except OSError as error:
        if source.local:
            raise FileNotFoundError(f"{source.name} cannot be loaded: {_first_line(error)}") from error
        raise FileNotFoundError(_not_on_hub(source.name, error, offline)) from error
    # remote code, unknown architecture, wrong shapes, a config of wrong types
    except (ValueError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{source.name} cannot be loaded as a {what}: {_first_line(error)}") from error


def load_pretrained_tokenizer(name: str | Path, *, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; raises as `load_pretrained` does."""
    return load_pretrained(AutoTokenizer, "tokenizer", name, revision=revision)


def load_pretrained_config(name: str | Path, *, revision: str | None = None) -> PreTrainedConfig:
    """The config of a model, without its weights; raises as `load_pretrained` does."""
    config: PreTrainedConfig = load_pretrained(AutoConfig, "model config", name, revision=revision)
    return config


def load_generation_config(name: str | Path, *, revision: str | None = None) -> GenerationConfig | None:
    """The generation config of a model; None where it has none, as in a GGUF file."""
    source = model_source(name)
    if source.gguf is not None:
        return None
    try:
        return GenerationConfig.from_pretrained(
            source.name,
            revision=revision or "main",
            local_files_only=not source.local and not hub_answers(),
        )
    except OSError:
        return None


def weights_origin(name: str | Path) -> str | None:
    """What the weights of a model were made from, such as "dequantised from Q4_1 GGUF".

    Args:
        name: see `model_source`.

    Returns:
        None where the weights are stored as they are used. The quantisation named is that of most weights.
    """
    source = model_source(name)
    if source.gguf is None:
        return None
    from gguf import GGUFReader

    sizes: Counter[str] = Counter()
    for tensor in GGUFReader(Path(source.name) / source.gguf).tensors:
        sizes[tensor.tensor_type.name] += int(tensor.n_elements)
    most = sizes.most_common(1)[0][0]
    return f"{'converted' if most in ('F32', 'F16', 'BF16') else 'dequantised'} from {most} GGUF"


@contextmanager
def quiet() -> Iterator[None]:
    """Silence the progress bars and loading reports of transformers."""
    enabled, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if enabled:
            transformers_logging.enable_progress_bar()


def _gguf_in(folder: Path) -> Path | None:
    """The GGUF file of a folder that is not a transformers folder."""
    if (folder / "config.json").is_file():
        return None
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds a LoRA adapter, not a model. Give its base model, or the merged folder that "
            "`export` writes."
        )
    files = sorted(folder.glob("*.gguf"))
    if not files:
        raise FileNotFoundError(
            f"{folder} has no config.json and no .gguf file; give a folder written by `save_pretrained`, or "
            "a GGUF checkpoint."
        )
    if len(files) > 1:
        raise ValueError(
            f"{folder} holds several GGUF files ({', '.join(file.name for file in files[:5])}); name one."
        )
    _require_gguf(files[0])
    return files[0]


def _require_gguf(file: Path) -> None:
    if find_spec("gguf") is None:
        raise ValueError(
            f"{file} is a GGUF file, and the package that reads them is not installed: run "
            "`pip install 'certdraft[gguf]'`, or give the model as a transformers folder."
        )


def _not_on_hub(name: str, error: Exception, offline: bool) -> str:
    reason = (
        "the hub is unreachable (or HF_HUB_OFFLINE is set) and its cache here has no config.json of it"
        if offline
        else _first_line(error)
    )
    return (
        f"{name!r} is not a folder here, and {reason}. Run `hf download {name} --local-dir DIR` where there "
        "is access and give DIR instead; a gated model needs the HF_TOKEN environment variable."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
