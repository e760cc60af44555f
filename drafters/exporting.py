"""Export and reload of drafters: a checked folder appears whole, or nothing does."""

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from certdraft.drafters.card import write_card
from certdraft.drafters.causal import CausalDrafter
from certdraft.drafters.facts import CardFacts, check_hashes, read_facts, write_facts
from certdraft.drafters.protocol import Drafter
from certdraft.drafters.transformers_format import write_transformers

FORMATS: dict[str, Callable[..., PreTrainedModel]] = {"transformers": write_transformers}


class ExportError(OSError):
    """The export could not be written; nothing was left behind."""


def export(
    drafter: Drafter,
    path: str | Path,
    format: str = "transformers",
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
    for bit after rounding to `dtype`; a merged LoRA within 1e-4 of the largest logit), and only then renamed.

    Args:
        drafter: not modified.
        path: folder to create.
        format: "transformers".
        tokenizer: the target's, which is the drafter's too.
        draft_length: draft tokens per round, ≥ 1; stored where engines read it and in the card's commands.
        card: facts for the model card and `drafter.json`.
        dtype: of the weights in the file; None: the drafter's.
        adapter: also write the LoRA adapter alone.
        overwrite: replace an existing folder.

    Returns:
        The folder.

    Raises:
        ValueError: unknown format, a draft length below 1, a vocabulary that is not the target's or smaller
            than the tokenizer's, or an export that does not load as the same drafter.
        ExportError: the folder exists, or cannot be written (disk full, permissions).
    """
    path = Path(path).expanduser().absolute()
    if format not in FORMATS:
        raise ValueError(f"unknown export format {format!r}; there is {', '.join(sorted(FORMATS))}.")
    if draft_length < 1:
        raise ValueError(f"draft_length {draft_length} must be at least 1 token.")
    _check_vocabulary(drafter, tokenizer, card)
    base = getattr(drafter, "pretrained", None)
    with _appearing(path, overwrite) as directory:
        model = FORMATS[format](
            drafter,
            directory,
            tokenizer=tokenizer,
            draft_length=draft_length,
            dtype=getattr(torch, dtype) if dtype else None,
            adapter=adapter,
        )
        write_card(
            directory,
            name=(card.name if card else None) or path.name,
            draft_length=draft_length,
            num_parameters=sum(p.numel() for p in model.parameters()),
            dtype=str(model.dtype).removeprefix("torch."),
            vocab_size=drafter.vocab_size,
            base=base,
            facts=card,
        )
        write_facts(
            directory,
            family="causal",
            draft_length=draft_length,
            vocab_size=drafter.vocab_size,
            base=base,
            facts=card,
        )
    return path


def load_drafter(
    path: str | Path,
    *,
    dtype: Literal["float32", "bfloat16"] | None = None,
    attention: Literal["sdpa", "eager"] = "sdpa",
) -> CausalDrafter:
    """An exported drafter, checked against its `drafter.json`, in eval mode.

    Args:
        path: folder written by `export`.
        dtype: of the parameters; None: the file's.
        attention: implementation.

    Raises:
        FileNotFoundError: no such folder, or not an export.
        ValueError: weights or tokenizer are not those exported, or a family this version does not know.
    """
    facts = read_facts(path)
    if facts["family"] != "causal":
        raise ValueError(
            f"{path} holds a drafter of family {facts['family']!r}; this version loads 'causal'."
        )
    check_hashes(path)
    drafter = CausalDrafter(pretrained=str(path), dtype=dtype, attention=attention)
    drafter.build(facts["vocab_size"])
    drafter.eval()
    return drafter


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
        raise ExportError(f"{path} exists already; choose another, or pass overwrite to replace a folder.")
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
