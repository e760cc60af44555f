"""Metadata of an export: what is asked for, which engines read it, and certdraft's own `drafter.json`.

`drafter.json` is written beside the files that engines read. It names the target and tokenizer the drafter
was made for, how it was trained, what was measured, and the hashes of what was written.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from certdraft.support import sha256_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SCHEMA = 1
FILE = "drafter.json"


@dataclass(frozen=True)
class CardFacts:
    """Facts about a drafter that its weights do not hold; all end up in the model card and `drafter.json`.

    Attributes:
        target: hub id or plain name of the target.
        target_vocab_size: entries of its vocabulary, padding included.
        tokenizer_fingerprint: of the tokenizer both share, as the trace records it.
        target_revision: commit or tag of the target.
        target_weights: what its weights were made from, such as "dequantised from Q4_K GGUF"; None where they
            were used as stored.
        target_architecture: its class, such as "Qwen3ForCausalLM".
        name: what to call the drafter; the folder's name when empty.
        loss: what was minimised, such as "MarginDiscountedCE(a=1.0)".
        datasets: names or hub ids of the training corpora.
        evaluated_on: what `metrics` were measured on.
        metrics: name → value, such as {"tau": 3.1, "coverage@4": 0.97}.
        training: further facts, such as steps, tokens, learning rate, seed, config hash.
        license: SPDX identifier of the drafter's weights.
    """

    target: str
    target_vocab_size: int
    tokenizer_fingerprint: str
    target_revision: str | None = None
    target_weights: str | None = None
    target_architecture: str | None = None
    name: str | None = None
    loss: str | None = None
    datasets: tuple[str, ...] = ()
    evaluated_on: str = "held-out prompts"
    metrics: Mapping[str, float] = field(default_factory=dict)
    training: Mapping[str, str | int | float | bool] = field(default_factory=dict)
    license: str | None = None


@dataclass(frozen=True)
class Engines:
    """Which engines read a format, and their names for the drafter; None: the engine cannot.

    Attributes:
        transformers: class that loads the folder for `generate(assistant_model=…)`.
        speculation_type: argument of `generate`, where the class needs one.
        vllm: its `method`.
        sglang: its `--speculative-algorithm`.
        llama_cpp: its `--spec-type`, after conversion to GGUF.
        by_path: vLLM serves the folder by its path.
    """

    transformers: str | None = None
    speculation_type: str | None = None
    vllm: str | None = None
    sglang: str | None = None
    llama_cpp: str | None = None
    by_path: bool = False


@dataclass(frozen=True)
class ExportRequest:
    """What `export` was asked for; attributes as its arguments, and checked."""

    format: str
    tokenizer: PreTrainedTokenizerBase
    draft_length: int
    card: CardFacts | None = None
    dtype: torch.dtype | None = None
    adapter: bool = False


def write_facts(
    directory: Path, request: ExportRequest, *, family: str, vocab_size: int, base: str | None
) -> None:
    """Write `drafter.json` into a finished export, with the hashes of its weights and tokenizer."""
    from certdraft import __version__

    content = {
        "schema": SCHEMA,
        "certdraft": __version__,
        "family": family,
        "format": request.format,
        "vocab_size": vocab_size,
        "draft_length": request.draft_length,
        "base": Path(base).name if base and Path(base).is_dir() else base,
        "facts": asdict(request.card) if request.card else None,
        "sha256": _hashes(directory),
    }
    (directory / FILE).write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def read_facts(path: str | Path) -> dict[str, Any]:
    """Return the content of an export's `drafter.json`.

    Returns:
        Keys: schema, certdraft (version), family, format, vocab_size, draft_length (tokens), base (what
        training started from, or None), facts (of `CardFacts`, or None), sha256 (file name → hash).

    Raises:
        FileNotFoundError: no such folder, or not an export.
        ValueError: unreadable, or of a schema this version does not know.
    """
    file = Path(path).expanduser() / FILE
    if not file.parent.is_dir():
        raise FileNotFoundError(f"{path}: no such folder.")
    if not file.is_file():
        raise FileNotFoundError(
            f"{path} has no {FILE}, so it is not an export of certdraft. Any causal LM folder can be used "
            "with CausalDrafter(pretrained=...) instead."
        )
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{file} is not valid JSON ({error}); export the drafter again.") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} holds a {type(content).__name__}, not an object; export the drafter again.")
    if content.get("schema") != SCHEMA:
        raise ValueError(f"{file} has schema {content.get('schema')!r}; this version reads schema {SCHEMA}.")
    kinds = {"family": str, "format": str, "vocab_size": int, "sha256": dict, "facts": dict | None}
    wrong = [key for key, kind in kinds.items() if not isinstance(content.get(key), kind)]
    if wrong:
        raise ValueError(f"{file}: {wrong[0]} is {content.get(wrong[0])!r}; export the drafter again.")
    return content


def check_hashes(path: str | Path) -> None:
    """Compare weights and tokenizer with the hashes in `drafter.json`.

    Raises:
        ValueError: a file is missing, changed, or new.
    """
    directory = Path(path).expanduser()
    written: dict[str, str] = read_facts(directory)["sha256"]
    found = _hashes(directory)
    for name in sorted(written.keys() | found.keys()):
        if written.get(name) != found.get(name):
            raise ValueError(
                f"{directory / name} is not the file that was exported: {FILE} has hash "
                f"{written.get(name, 'none')[:12]}, the file {found.get(name, 'is missing')[:12]}. Copy "
                "the export again, or export the drafter again."
            )


def _hashes(directory: Path) -> dict[str, str]:
    """Of the files whose change makes another drafter: the weights and the tokenizer."""
    files = sorted([*directory.glob("*.safetensors"), *directory.glob("tokenizer.json")])
    return {file.name: sha256_of(file) for file in files}
