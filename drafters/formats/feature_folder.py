"""Drafters that read target features, as folders: written, loaded again and compared.

The layouts themselves are in `eagle3_format` and `dflash_format`; a layout takes a drafter and its tensors
and answers with config.json and the tensors under that layout's names.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from certdraft.drafters.dflash import export as dflash_format
from certdraft.drafters.dflash.config import BlockConfig
from certdraft.drafters.dflash.model import BlockDrafter
from certdraft.drafters.eagle3 import export as eagle3_format
from certdraft.drafters.eagle3.config import EagleConfig
from certdraft.drafters.eagle3.model import EagleDrafter
from certdraft.drafters.features.feature_drafter import FeatureDrafter, TargetEnds
from certdraft.drafters.features.feature_layers import checked, eagle_layers
from certdraft.drafters.formats.export_metadata import CardFacts
from certdraft.drafters.formats.format_files import Json, Weights, write_folder

Layout = Callable[..., tuple[Json, Weights]]

_PROBE_TOKENS = 12


def write_features(
    drafter: FeatureDrafter,
    directory: Path,
    layout: Layout,
    *,
    tokenizer: PreTrainedTokenizerBase,
    draft_length: int,
    dtype: torch.dtype | None,
    card: CardFacts | None,
) -> FeatureDrafter:
    """Write a folder's files and check them by loading them again.

    Args:
        drafter: built; not modified.
        directory: exists and is empty.
        layout: `eagle3`, `dflash`, `native` or `speculators`.
        tokenizer: the target's, written beside the drafter: OpenVINO wants it there, others do not mind.
        draft_length: tokens per round.
        dtype: of the weights in the file; None: the drafter's.
        card: names the target.

    Returns:
        The drafter as written.

    Raises:
        ValueError: logits that are not finite, or a folder that does not load as the drafter it was written
            from.
    """
    ends, built = drafter.ends, drafter
    assert isinstance(built, EagleDrafter | BlockDrafter)
    if ends is None:
        raise ValueError(f"this {type(drafter).__name__} was never built for a target; nothing to export.")
    weights = drafter.state_dict()
    own = weights["fc.weight"].dtype
    dtype = dtype or own
    weights = {name: w.detach().to(dtype) if w.is_floating_point() else w for name, w in weights.items()}
    config, named = layout(drafter, weights, dtype=dtype, draft_length=draft_length, card=card)
    write_folder(directory, config, named)
    tokenizer.save_pretrained(directory)
    written = restore(built.config, weights, ends, drafter.num_target_layers)
    loaded = load_features(directory, type(drafter), ends, drafter.num_target_layers)
    _check_same(written, loaded)
    if dtype == own:
        _check_same(drafter, loaded)
    return written


def load_features(
    folder: Path, kind: type[FeatureDrafter], target: TargetEnds, num_target_layers: int
) -> FeatureDrafter:
    """A drafter from a folder in any layout, in eval mode.

    Args:
        folder: whoever wrote it.
        kind: `EagleDrafter` or `BlockDrafter`.
        target: its embeddings and head.
        num_target_layers: of the target.

    Raises:
        FileNotFoundError: no such folder, or files missing.
        ValueError: another target, or a folder that certdraft would read as something else.
    """
    config: EagleConfig | BlockConfig
    vocab_size: int | None
    if kind is EagleDrafter:
        config, vocab_size, weights = eagle3_format.read_eagle3(folder)
    else:
        config, vocab_size, weights = dflash_format.read_dflash(folder)
    size, hidden = target.embeddings.shape
    if (vocab_size or size, config.hidden_size) != (size, hidden):
        raise ValueError(
            f"{folder} drafts for a target whose embeddings are {vocab_size or size} by "
            f"{config.hidden_size}, this one's are {size} by {hidden}. Use the target it was trained for."
        )
    embeddings = weights.pop("embed_tokens.weight", None)
    if embeddings is not None and not torch.equal(embeddings, target.embeddings.to("cpu", embeddings.dtype)):
        raise ValueError(
            f"{folder} brings embeddings that are not this target's: another target, or a drafter that "
            "trained its own, which certdraft does not do."
        )
    return restore(config, weights, target, num_target_layers)


def restore(
    config: EagleConfig | BlockConfig, weights: Weights, target: TargetEnds, num_target_layers: int
) -> FeatureDrafter:
    """A drafter with these weights, in eval mode and in their dtype.

    Raises:
        ValueError: tensors that do not fit the config, layers that the target lacks.
    """
    if "fc.weight" not in weights:
        raise ValueError("the drafter's tensors lack fc.weight, which joins the target's layers.")
    dtype: Any = str(weights["fc.weight"].dtype).removeprefix("torch.")
    made: EagleDrafter | BlockDrafter
    if isinstance(config, EagleConfig):
        layers = config.target_layer_ids or eagle_layers(num_target_layers)
        config = replace(config, target_layer_ids=checked(layers, num_target_layers))
        made = EagleDrafter(config, dtype=dtype)
    else:
        checked(config.target_layer_ids or (), num_target_layers)
        made = BlockDrafter(config, dtype=dtype)
    made.ends, made.num_target_layers = target, num_target_layers
    with torch.random.fork_rng(devices=[]):  # the random weights it starts with must not move training
        made.adopt(weights, "the drafter")
    return made.eval()


def eagle3(drafter: EagleDrafter, weights: Weights, *, dtype: torch.dtype, **_: Any) -> tuple[Json, Weights]:
    """The flat layout of EAGLE-3."""
    sizes = drafter.vocab_size, drafter.num_target_layers
    return eagle3_format.eagle3_config(drafter.config, *sizes, dtype), weights


def dflash(drafter: BlockDrafter, weights: Weights, *, dtype: torch.dtype, **_: Any) -> tuple[Json, Weights]:
    """z-lab's layout of DFlash."""
    sizes = drafter.vocab_size, drafter.num_target_layers
    return dflash_format.dflash_config(drafter.config, *sizes, dtype), weights


def native(drafter: BlockDrafter, weights: Weights, *, dtype: torch.dtype, **_: Any) -> tuple[Json, Weights]:
    """transformers' own layout of DFlash."""
    config = dflash_format.native_config(drafter.config, drafter.num_target_layers, dtype)
    return config, dflash_format.native_names(weights)


def speculators(
    drafter: FeatureDrafter,
    weights: Weights,
    *,
    dtype: torch.dtype,
    draft_length: int,
    card: CardFacts | None,
) -> tuple[Json, Weights]:
    """The layout of speculators, of either kind.

    Raises:
        ValueError: nobody says which target the drafter is for.
    """
    if card is None or card.target_architecture is None:
        raise ValueError(
            "format 'speculators' names the target and its class, so that vLLM serves the folder by its path "
            "alone; give card=CardFacts(target=…, target_architecture='Qwen3ForCausalLM', …)."
        )
    sizes = drafter.vocab_size, drafter.num_target_layers
    served: Any = {
        "num_tokens": draft_length,
        "target": card.target,
        "architecture": card.target_architecture,
    }
    if isinstance(drafter, EagleDrafter):
        config = eagle3_format.speculators_config(drafter.config, *sizes, dtype, **served)
        return config, eagle3_format.speculators_names(weights)
    assert isinstance(drafter, BlockDrafter)
    return dflash_format.speculators_config(drafter.config, *sizes, dtype, **served), weights


@torch.no_grad()
def probe(drafter: FeatureDrafter) -> Tensor:
    """fp32 logits [T, V] of the first draft step, on fixed tokens and features."""
    ends = drafter.ends
    assert ends is not None
    vocab, hidden = ends.embeddings.shape
    device = ends.embeddings.device
    ids = torch.arange(_PROBE_TOKENS, device=device)[None] * 7919 % vocab
    noise = torch.Generator().manual_seed(0)
    features = torch.randn(1, _PROBE_TOKENS, len(drafter.taps), hidden, generator=noise).to(device)
    logits = drafter.logits(ids, features=features)[0].float()
    if not logits.isfinite().all():
        raise ValueError("the drafter's logits are not finite; its weights hold NaN or infinity.")
    return logits


def _check_same(written: FeatureDrafter, loaded: FeatureDrafter) -> None:
    mine, theirs = probe(written), probe(loaded)
    if loaded.taps != written.taps:
        raise ValueError(f"written with target layers {written.taps}, the drafter loads with {loaded.taps}.")
    if not torch.equal(mine, theirs):
        raise ValueError(
            "the drafter loaded from the export is not the one written: logits differ by up to "
            f"{(mine - theirs).abs().max().item():.2g}. A weight or a config key does not survive saving."
        )
