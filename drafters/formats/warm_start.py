"""Published EAGLE-3 heads and DFlash drafters as the start of training, read by the rules of their formats.

What is read is checked against the target it is to draft for: sizes, vocabulary, layers. A drafter of another
target would load, draft, and never be accepted.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from certdraft.drafters.features.feature_drafter import FeatureDrafter
from certdraft.support import hub_answers

_FILES = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model.bin",
    "mask_embedding.pt",
)


def folder_of(name: str) -> Path:
    """The local folder of a checkpoint, downloaded once if it is a hub id.

    Raises:
        FileNotFoundError: no such folder, no such repository, or no hub.
    """
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    if name.startswith((".", "~", os.sep)) or name.count("/") != 1:
        raise FileNotFoundError(f"{name}: no such folder; give one with config.json, or a hub id 'org/name'.")
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(name, allow_patterns=[*_FILES], local_files_only=not hub_answers()))
    except Exception as error:  # the hub's client has a dozen kinds
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise FileNotFoundError(
            f"{name!r} is no folder here, and the hub does not give it: {first} Run `hf download {name} "
            "--local-dir DIR` where there is access and give DIR."
        ) from error


def check_belongs(
    folder: Path, drafter: FeatureDrafter, vocab_size: int | None, weights: dict[str, Tensor]
) -> None:
    """Refuses a checkpoint of another target, and takes its copy of the embeddings out of `weights`.

    Raises:
        ValueError: another vocabulary, number of layers or embeddings.
    """
    mine, layers = drafter.vocab_size, drafter.num_target_layers
    if vocab_size not in (None, mine):
        raise ValueError(
            f"{folder} drafts for a vocabulary of {vocab_size}, this target has {mine}: it is a drafter of "
            "another target."
        )
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    theirs = config.get("num_target_layers")
    if theirs not in (None, layers):
        raise ValueError(
            f"{folder} was trained for a target of {theirs} layers, this one has {layers}: it is a "
            "drafter of another target."
        )
    fused = weights["fc.weight"].shape[1] if "fc.weight" in weights else 0
    width = drafter._ends.embeddings.shape[1]
    if fused != len(drafter.taps) * width:
        raise ValueError(
            f"{folder} fuses {fused} feature values a token; {len(drafter.taps)} layers of this target give "
            f"{len(drafter.taps) * width}: it is a drafter of another target, or names other layers than it "
            "reads."
        )
    for name in ("embed_tokens.weight", "model.embed_tokens.weight"):
        if (stored := weights.pop(name, None)) is None:
            continue
        here = drafter._ends.embeddings.detach()
        if stored.shape != here.shape or not torch.allclose(stored.to(here), here, rtol=0.02, atol=1e-3):
            raise ValueError(
                f"{folder} brings embeddings that are not this target's; certdraft's drafters read the "
                "target's own. Is it a drafter of another target?"
            )
