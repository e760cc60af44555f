"""Causal LMs from a folder or the hub, loaded completely or not at all.

transformers fills a missing weight with random numbers and logs a table; here that is an error. It also
retries an unreachable hub for a minute; here the hub is asked once.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel
from transformers.utils import logging as transformers_logging

from certdraft.support.hub import hub_answers


def load_causal_lm(
    name: str | Path,
    *,
    dtype: torch.dtype | None = None,
    attention: Literal["sdpa", "eager"] = "sdpa",
) -> PreTrainedModel:
    """A causal LM with every weight of its checkpoint, in eval mode. Code shipped with it is never run.

    Args:
        name: a folder written by `save_pretrained` or `export`, or a hub id ("org/name").
        dtype: of the parameters; None keeps the checkpoint's.
        attention: implementation; both follow masks and trees.

    Raises:
        FileNotFoundError: no such folder, no config.json in it, no such model on the hub, or no hub.
        ValueError: a LoRA adapter, an architecture that needs its own code, or weights that do not fit.
    """
    local = Path(name).expanduser().is_dir()
    source = str(Path(name).expanduser()) if local else str(name)
    if local:
        _check_folder(Path(source))
    elif source.startswith((".", "~", os.sep)) or source.count("/") > 1:
        raise FileNotFoundError(
            f"{source}: no such folder; give one with config.json, or a hub id 'org/name'."
        )
    offline = not local and not hub_answers()
    try:
        with quiet():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                source,
                dtype=dtype or "auto",
                attn_implementation=attention,
                local_files_only=offline,
                adapter_kwargs={"local_files_only": offline},  # else it asks, and retries, for an adapter
                trust_remote_code=False,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # listed in info, and refused below in words
            )
    except OSError as error:
        if local:
            raise FileNotFoundError(f"{source} cannot be loaded: {_first_line(error)}") from error
        raise FileNotFoundError(_not_on_hub(source, error, offline)) from error
    except (ValueError, RuntimeError) as error:  # needs remote code, unknown architecture, wrong shapes
        raise ValueError(f"{source} cannot be loaded as a causal LM: {_first_line(error)}") from error
    model: PreTrainedModel = loaded[0]
    _check_complete(source, loaded[1])
    return model


@contextmanager
def quiet() -> Iterator[None]:
    """No progress bars and loading reports of transformers: ours say what matters, in one place."""
    enabled, verbosity = transformers_logging.is_progress_bar_enabled(), transformers_logging.get_verbosity()
    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if enabled:
            transformers_logging.enable_progress_bar()


def _check_folder(folder: Path) -> None:
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{folder} holds a LoRA adapter, not a model. Give its base model, or the merged folder that "
            "`export` writes."
        )
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(f"{folder} has no config.json; give a folder written by `save_pretrained`.")


def _check_complete(source: str, info: dict) -> None:
    wrong = {key: sorted(map(str, info.get(key) or ())) for key in info}
    wrong = {key: names for key, names in wrong.items() if names}
    if wrong:
        listed = "; ".join(
            f"{key.replace('_', ' ')}: {', '.join(names[:5])}"
            + (f" and {len(names) - 5} more" * (len(names) > 5))
            for key, names in wrong.items()
        )
        raise ValueError(
            f"the weights of {source} do not fit its config.json: {listed}. Random numbers would stand in "
            "for them; write the checkpoint again from the model it was trained as."
        )


def _not_on_hub(name: str, error: Exception, offline: bool) -> str:
    reason = (
        "the hub is unreachable (or HF_HUB_OFFLINE is set) and its cache here has no config.json of it"
        if offline
        else _first_line(error)
    )
    return (
        f"{name!r} is no folder here, and {reason}. Run `hf download {name} --local-dir DIR` where there is "
        "access and give DIR instead; a gated model needs the HF_TOKEN environment variable."
    )


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
