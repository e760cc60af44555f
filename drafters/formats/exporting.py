"""Export and reload of drafters: a checked folder appears whole, or nothing does."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from certdraft.drafters.causal.export import write_transformers
from certdraft.drafters.causal.model import CausalDrafter
from certdraft.drafters.dflash.model import BlockDrafter
from certdraft.drafters.eagle3.model import EagleDrafter
from certdraft.drafters.features.feature_drafter import TargetEnds
from certdraft.drafters.formats import feature_folder
from certdraft.drafters.formats.export_metadata import CardFacts, check_hashes, read_facts, write_facts
from certdraft.drafters.formats.lint_export import lint_export
from certdraft.drafters.formats.model_card import write_card
from certdraft.drafters.protocol import Drafter

FAMILIES: dict[str, type[Drafter]] = {"causal": CausalDrafter, "eagle": EagleDrafter, "block": BlockDrafter}
# What a family can be written as, its default first: the layout, or None for a causal LM's folder.
FORMATS: dict[str, dict[str, feature_folder.Layout | None]] = {
    "causal": {"transformers": None},
    "eagle": {"eagle3": feature_folder.eagle3, "speculators": feature_folder.speculators},
    "block": {
        "dflash": feature_folder.dflash,
        "speculators": feature_folder.speculators,
        "transformers": feature_folder.native,
    },
}


class ExportError(OSError):
    """The export could not be written; nothing was left behind."""


def export(
    drafter: Drafter,
    path: str | Path,
    format: str | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase,
    draft_length: int,
    card: CardFacts | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    adapter: bool = False,
    overwrite: bool = False,
) -> Path:
    """Write a drafter as a folder that serving engines load.

    The folder is written under a temporary name beside `path`, loaded again, compared with the drafter (bit
    for bit after rounding to `dtype`; a merged LoRA within 1e-4 of the largest logit), checked by
    `lint_export`, and only then renamed.

    Args:
        drafter: not modified.
        path: folder to create.
        format: "transformers" (causal and block drafters), "eagle3" (EAGLE heads), "dflash" (block drafters),
            "speculators" (both); None: transformers, eagle3 or dflash, whichever most engines read.
        tokenizer: the target's, which is the drafter's too.
        draft_length: draft tokens per round, ≥ 1; stored where engines read it and in the card's commands.
        card: facts for the model card and `drafter.json`; "speculators" needs the target's name and class.
        dtype: of the weights in the file; None: the drafter's.
        adapter: also write the LoRA adapter alone.
        overwrite: replace an existing folder.

    Returns:
        The folder.

    Raises:
        ValueError: a format this family has not, a draft length below 1 or longer than a block, a vocabulary
            that is not the target's or smaller than the tokenizer's, or an export that does not load as the
            same drafter.
        ExportError: the folder exists, or cannot be written (disk full, permissions).
    """
    path = Path(path).expanduser().absolute()
    family = family_of(drafter)
    format = format or next(iter(FORMATS[family]))
    if format not in FORMATS[family]:
        raise ValueError(
            f"unknown export format {format!r} for {type(drafter).__name__}; there is "
            f"{', '.join(FORMATS[family])}."
        )
    _check_length(drafter, draft_length)
    _check_vocabulary(drafter, tokenizer, card)
    if adapter and family != "causal":
        raise ValueError("adapter=True is for causal drafters with LoRA; this one is trained whole.")
    base = getattr(drafter, "pretrained", None)
    with _appearing(path, overwrite) as directory:
        common: dict[str, Any] = {
            "tokenizer": tokenizer,
            "draft_length": draft_length,
            "dtype": getattr(torch, dtype) if dtype else None,
        }
        layout = FORMATS[family][format]
        target: dict[str, int | None] | None = None
        model: nn.Module
        if isinstance(drafter, EagleDrafter | BlockDrafter):
            assert layout is not None
            model = feature_folder.write_features(drafter, directory, layout, card=card, **common)
            target = {
                "vocab_size": drafter.vocab_size,
                "hidden_size": drafter.config.hidden_size,
                "num_hidden_layers": drafter.num_target_layers,
            }
        else:
            model = write_transformers(drafter, directory, adapter=adapter, **common)
        _check_rules(directory, target)
        write_card(
            directory,
            name=(card.name if card else None) or path.name,
            family=family,
            format=format,
            draft_length=draft_length,
            num_parameters=sum(p.numel() for p in model.parameters()),
            dtype=str(next(model.parameters()).dtype).removeprefix("torch."),
            vocab_size=drafter.vocab_size,
            taps=drafter.taps,
            base=base,
            facts=card,
        )
        write_facts(
            directory,
            family=family,
            format=format,
            draft_length=draft_length,
            vocab_size=drafter.vocab_size,
            base=base,
            facts=card,
        )
    return path


def load_drafter(
    path: str | Path,
    *,
    target: PreTrainedModel | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
    attention: Literal["sdpa", "eager"] = "sdpa",
) -> CausalDrafter | EagleDrafter | BlockDrafter:
    """An exported drafter of any family and format, checked against its `drafter.json`, in eval mode.

    Args:
        path: folder written by `export`.
        target: the model it drafts for, whose embeddings EAGLE heads and block drafters read; causal drafters
            need none.
        dtype: of the parameters; None: the file's.
        attention: implementation, of causal drafters.

    Raises:
        FileNotFoundError: no such folder, or not an export.
        ValueError: weights or tokenizer are not those exported, another target, none where one is needed, or
            a family this version does not know.
    """
    facts = read_facts(path)
    family = facts["family"]
    if family not in FAMILIES:
        raise ValueError(
            f"{path} holds a drafter of family {family!r}; this version loads {', '.join(FAMILIES)}."
        )
    check_hashes(path)
    if family == "causal":
        drafter = CausalDrafter(pretrained=str(path), dtype=dtype, attention=attention)
        drafter.build(facts["vocab_size"])
        drafter.eval()
        return drafter
    if target is None:
        raise ValueError(
            f"{path} holds a drafter that reads its target's embeddings and layers; give target= the model "
            f"{(facts['facts'] or {}).get('target', 'it was trained for')}."
        )
    kind: Any = FAMILIES[family]
    num = int(target.config.num_hidden_layers)
    loaded: Any = feature_folder.load_features(Path(path).expanduser(), kind, TargetEnds.of(target), num)
    if dtype is not None:
        loaded.to(getattr(torch, dtype))
    return loaded


def family_of(drafter: Drafter) -> str:
    """The key of a drafter's class in `FAMILIES`.

    Raises:
        ValueError: a class that no format is for.
    """
    for name, kind in FAMILIES.items():
        if isinstance(drafter, kind):
            return name
    raise ValueError(f"no export format is for {type(drafter).__name__}; there is {', '.join(FAMILIES)}.")


def _check_length(drafter: Drafter, draft_length: int) -> None:
    if draft_length < 1:
        raise ValueError(f"draft_length {draft_length} must be at least 1 token.")
    if isinstance(drafter, BlockDrafter) and draft_length > drafter.config.block_size - 1:
        raise ValueError(
            f"draft_length {draft_length} is more than a block of {drafter.config.block_size} holds: the "
            f"root and {drafter.config.block_size - 1} draft tokens."
        )


def _check_rules(directory: Path, target: dict[str, int | None] | None) -> None:
    """No export leaves that an engine would read wrongly."""
    errors = [f for f in lint_export(directory, target) if f.severity == "error"]
    if errors:
        said = "\n".join(f"  {finding.where}: {finding.message}" for finding in errors)
        raise ValueError(f"engines would read this export wrongly:\n{said}")


def _check_vocabulary(drafter: Drafter, tokenizer: PreTrainedTokenizerBase, card: CardFacts | None) -> None:
    size = drafter.vocab_size
    if card is not None and card.target_vocab_size != size:
        raise ValueError(
            f"the drafter's vocabulary has {size} entries, that of {card.target} {card.target_vocab_size}; "
            "engines refuse the pair. Train the drafter with the target's padded vocabulary."
        )
    largest = max(tokenizer.get_vocab().values())
    if largest >= size:
        raise ValueError(
            f"the tokenizer has token id {largest}, but the drafter's vocabulary ends at {size - 1}; this is "
            "not the tokenizer it was trained with."
        )


@contextmanager
def _appearing(path: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary folder that takes the name `path` when the block ends well, and vanishes otherwise."""
    if path.exists() and not (overwrite and path.is_dir()):
        raise ExportError(f"{path} exists already; choose another, or replace it with `--overwrite true`.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    replaced = path.with_name(f".{path.name}.{os.getpid()}.replaced")
    try:
        temporary.mkdir(parents=True)
        yield temporary
        _sync(temporary)
        if path.exists():
            path.rename(replaced)
        temporary.rename(path)
    except (OSError, SafetensorError) as error:
        if isinstance(error, FileNotFoundError | ExportError) and error.errno is None:
            raise  # said in our own words already
        raise ExportError(
            f"the export to {path} could not be written: {error}. Free some space or choose another folder; "
            "nothing was left behind."
        ) from error
    finally:
        if replaced.exists() and not path.exists():
            replaced.rename(path)
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.rmtree(replaced, ignore_errors=True)


def _sync(directory: Path) -> None:
    """Force a folder and everything below it to the disk, so that its rename cannot outrun its content."""
    for entry in [*directory.rglob("*"), directory]:
        handle = os.open(entry, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
