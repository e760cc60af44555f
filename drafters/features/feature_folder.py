"""Folders of drafters that read the target's hidden states: found, checked against a target, written.

What is read is checked against the target it is to draft for: sizes, vocabulary, layers. A drafter of another
target would load, draft, and never be accepted.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from certdraft.drafters.features.layer_files import Weights, write_folder
from certdraft.drafters.formats.export_metadata import FILE, read_facts
from certdraft.drafters.formats.logit_checks import check_same_logits, checked_logits
from certdraft.support import hub_answers

if TYPE_CHECKING:
    from certdraft.drafters.features.feature_drafter import FeatureDrafter
    from certdraft.drafters.formats.export_metadata import ExportRequest

_FILES = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model.bin",
    "mask_embedding.pt",
)
_PROBE_TOKENS = 12


def folder_of(name: str) -> Path:
    """Return the local folder of a checkpoint, downloaded once if it is a hub id.

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
            f"{name!r} is not a folder here, and the hub does not have it: {first} Run `hf download {name} "
            "--local-dir DIR` where there is access and give DIR."
        ) from error


def target_name(folder: Path) -> str:
    """Name of the target that an export was trained for."""
    facts = read_facts(folder)["facts"] if (folder / FILE).is_file() else None
    return (facts or {}).get("target", "it was trained for")


def check_target(
    drafter: FeatureDrafter, folder: Path, sizes: tuple[int | None, int, int], weights: Weights
) -> None:
    """Refuse a checkpoint of another target, and take its copies of the target's weights out of `weights`.

    Args:
        drafter: attached to its target.
        folder: with config.json.
        sizes: the target's vocabulary where the folder names it, hidden size, number of layers read.
        weights: as read; modified.

    Raises:
        ValueError: another vocabulary, hidden size, number of layers, embeddings or lm_head.
    """
    here, num_target_layers = drafter.target_ends.embeddings.detach(), drafter.num_target_layers
    vocab_size, hidden, num_read = sizes[0] or len(here), sizes[1], sizes[2]
    if (vocab_size, hidden) != tuple(here.shape):
        raise ValueError(
            f"{folder} drafts for a target whose embeddings are {vocab_size} by {hidden}, this one's are "
            f"{here.shape[0]} by {here.shape[1]}. Use the target it was trained for."
        )
    config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    if (layers := config.get("num_target_layers")) not in (None, num_target_layers):
        raise ValueError(
            f"{folder} was trained for a target of {layers} layers, this one has {num_target_layers}: it is "
            "a drafter of another target."
        )
    fused = weights["fc.weight"].shape[1] if "fc.weight" in weights else 0
    if fused != num_read * hidden:
        raise ValueError(
            f"{folder} fuses {fused} feature values a token; {num_read} layers of this target give "
            f"{num_read * hidden}: it is a drafter of another target, or names other layers than it reads."
        )
    ends = {"embed_tokens.weight": here, "model.embed_tokens.weight": here}
    if drafter.target_head:
        ends["lm_head.weight"] = drafter.target_ends.head.detach()
    for name, own in ends.items():
        stored = weights.pop(name, None)
        if stored is None or own.is_meta:
            continue
        if stored.shape != own.shape or not torch.allclose(stored.to(own), own, rtol=0.02, atol=1e-3):
            raise ValueError(
                f"{folder} brings {name}, which is not this target's: another target, or a drafter that "
                "trained its own, which certdraft does not support."
            )


def write(drafter: FeatureDrafter, folder: Path, request: ExportRequest) -> FeatureDrafter:
    """Write a folder's files and check them by loading them again; see `Drafter.write`.

    The target's tokenizer is written beside the drafter: OpenVINO needs it there, other engines ignore it.

    Raises:
        ValueError: logits that are not finite, or a folder that does not load as the drafter it was written
            from.
    """
    drafter.target_ends  # noqa: B018, refuses a drafter that was never built
    if request.adapter:
        raise ValueError("adapter=True is for causal drafters with LoRA; this one is trained whole.")
    weights = drafter.state_dict()
    own = weights["fc.weight"].dtype
    dtype = request.dtype or own
    weights = {name: w.detach().to(dtype) if w.is_floating_point() else w for name, w in weights.items()}
    config, named = drafter.layout(weights, request)
    write_folder(folder, config, named)
    request.tokenizer.save_pretrained(folder)
    written, loaded = drafter.twin(weights), drafter.twin(folder=folder)
    _check_same(written, loaded)
    if dtype == own:
        _check_same(drafter, loaded)
    return written


@torch.no_grad()
def probe(drafter: FeatureDrafter) -> Tensor:
    """fp32 logits [T, V] of the first draft token, on fixed tokens and features."""
    vocab, hidden = drafter.target_ends.embeddings.shape
    device = drafter.target_ends.embeddings.device
    ids = torch.arange(_PROBE_TOKENS, device=device)[None] * 7919 % vocab
    noise = torch.Generator().manual_seed(0)
    features = torch.randn(1, _PROBE_TOKENS, len(drafter.taps), hidden, generator=noise).to(device)
    logits = drafter.logits(ids, features=features)[0].float()
    return checked_logits(logits)


def _check_same(written: FeatureDrafter, loaded: FeatureDrafter) -> None:
    if loaded.taps != written.taps:
        raise ValueError(f"written with target layers {written.taps}, the drafter loads with {loaded.taps}.")
    check_same_logits(probe(written), probe(loaded))
