"""Export and reload of drafters: a checked folder appears whole, or nothing does."""

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from certdraft.drafters.formats.export_metadata import (
    CardFacts,
    ExportRequest,
    check_hashes,
    read_facts,
    write_facts,
)
from certdraft.drafters.formats.lint_export import lint_export
from certdraft.drafters.formats.model_card import write_card
from certdraft.drafters.protocol import Drafter
from certdraft.drafters.registry import kind_named
from certdraft.support import appearing_folder


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
    copies: Mapping[str, Path] | None = None,
) -> Path:
    """Write a drafter as a folder that serving engines load.

    The folder is written under a temporary name beside `path`, loaded again, compared with the drafter (bit
    for bit after rounding to `dtype`; a merged LoRA within 1e-4 of the largest logit), checked by
    `lint_export`, and only then renamed.

    Args:
        drafter: not modified.
        path: folder to create.
        format: "transformers" (causal and block drafters), "eagle3" (EAGLE heads), "dflash" (block drafters),
            "dspark" (DSpark drafters), "speculators" (the last three); None: the first of these that the kind
            has, which most engines read.
        tokenizer: the target's, which is the drafter's too.
        draft_length: draft tokens per round, ≥ 1; stored where engines read it and in the card's commands.
        card: facts for the model card and `drafter.json`; "speculators" needs the target's name and class.
        dtype: of the weights in the file; None: the drafter's.
        adapter: also write the LoRA adapter by itself.
        overwrite: replace an existing folder.
        copies: further files of the folder: name → file to copy.

    Returns:
        The folder.

    Raises:
        ValueError: a format this kind of drafter does not have, a draft length below 1 or longer than a
            block, a vocabulary that is not the target's or smaller than the tokenizer's, or an export that
            does not load as the same drafter.
        ExportError: the folder exists, or cannot be written (disk full, permissions).
    """
    path = Path(path).expanduser().absolute()
    formats = drafter.export_formats
    if not drafter.family or not formats:
        raise ValueError(
            f"{type(drafter).__name__} cannot be exported: it needs @register_drafter and export_formats."
        )
    format = format or next(iter(formats))
    if format not in formats:
        raise ValueError(
            f"unknown export format {format!r} for {type(drafter).__name__}; there is {', '.join(formats)}."
        )
    _check_length(drafter, draft_length)
    _check_vocabulary(drafter, tokenizer, card)
    request = ExportRequest(
        format, tokenizer, draft_length, card, getattr(torch, dtype) if dtype else None, adapter
    )
    try:
        with appearing_folder(path, overwrite=overwrite) as folder:
            model = drafter.write(folder, request)
            write_card(folder, drafter, model, request, path.name)
            write_facts(
                folder, request, family=drafter.family, vocab_size=drafter.vocab_size, base=drafter.pretrained
            )
            _check_rules(folder, drafter.target_config)
            for name, source in (copies or {}).items():
                shutil.copyfile(source, folder / name)
    except FileExistsError as error:
        raise ExportError(
            f"{path} exists already; choose another, or replace it with `--overwrite true`."
        ) from error
    except (OSError, SafetensorError) as error:
        if isinstance(error, FileNotFoundError) and error.errno is None:
            raise  # with a message of our own
        raise ExportError(
            f"the export to {path} could not be written: {error}. Free some space or choose another folder; "
            "nothing was left behind."
        ) from error
    return path


@torch.inference_mode(False)  # as `load_causal_lm`
def load_drafter(
    path: str | Path,
    *,
    target: PreTrainedModel | None = None,
    dtype: Literal["float32", "bfloat16"] | None = None,
) -> Any:
    """Load an exported drafter of any kind and format, checked against its `drafter.json`, in eval mode.

    Args:
        path: folder written by `export`.
        target: the model it drafts for, whose embeddings EAGLE heads and block drafters read; causal drafters
            need none.
        dtype: of the parameters; None: the file's.

    Returns:
        The drafter, of the class that is registered for its kind.

    Raises:
        FileNotFoundError: no such folder, or not an export.
        ValueError: weights or tokenizer are not those exported, another target, none where one is needed, or
            a kind that is not registered.
    """
    facts, folder = read_facts(path), Path(path).expanduser()
    kind = kind_named(facts["family"], path)
    check_hashes(folder)
    return kind.from_folder(folder, vocab_size=facts["vocab_size"], target=target, dtype=dtype)


def _check_length(drafter: Drafter, draft_length: int) -> None:
    limit = drafter.max_draft_length
    if draft_length < 1:
        raise ValueError(f"draft_length {draft_length} must be at least 1 token.")
    if limit is not None and draft_length > limit:
        raise ValueError(
            f"draft_length {draft_length} is more than this drafter's block holds: {limit} draft tokens."
        )


def _check_rules(folder: Path, target: dict[str, int | None] | None) -> None:
    """Refuse an export that an engine would read wrongly."""
    errors = [f for f in lint_export(folder, target) if f.severity == "error"]
    if errors:
        listed = "\n".join(f"  {finding.where}: {finding.message}" for finding in errors)
        raise ValueError(f"engines would read this export wrongly:\n{listed}")


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
