"""A static check of exported drafters: every rule of the formats that files alone can break.

Engines load wrong folders without a word: a layer id off by one, a missing head, a flag left to its default
cost acceptance, never correctness, so nobody notices. This reads config.json, the headers of the safetensors
and the two vocabulary tables. It builds no network; what only numbers show (permuted columns, swapped norms,
another rotary base) is left to the comparison with real engines.

The rules are stated here a second time on purpose and share nothing with the writers.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from certdraft.drafters.dflash import lint as lint_dflash
from certdraft.drafters.eagle3 import lint as lint_eagle3
from certdraft.drafters.formats.lint_files import (
    SIZES,
    Config,
    Finding,
    Folder,
    check_numbers,
    check_rope,
    check_tensors,
    decoder_shapes,
    error,
    read_folder,
    read_json,
)

Rules = Callable[[Folder, Config | None], Iterator[Finding]]


def lint_export(path: str | Path, target: str | Path | Config | None = None) -> tuple[Finding, ...]:
    """What is wrong with a folder that engines are to load as a drafter.

    Args:
        path: folder with config.json and safetensors, in any layout `export` writes, whoever wrote it.
        target: folder of the target, its config.json, or what is in it, for what only the pair can get wrong:
            hidden size, vocabulary, number of layers.

    Returns:
        Findings, errors first; empty when nothing is wrong.

    Raises:
        FileNotFoundError: no such folder, or no config.json or safetensors in it.
        ValueError: a file that cannot be read at all.
    """
    folder = read_folder(path)
    found = LAYOUTS[layout_of(folder)](folder, _target_config(target))
    return tuple(sorted(found, key=lambda finding: finding.severity))


def layout_of(folder: Folder) -> str:
    """Which layout a folder is written in: a key of `LAYOUTS`."""
    config = folder.config
    names = " ".join(config.get("architectures") or ())
    model = config.get("speculators_model_type")
    if model is not None or "speculators_config" in config:
        return "dflash-speculators" if model == "dflash" or "DFlash" in names else "eagle3-speculators"
    if config.get("model_type") == "muse_glimmer_assistant":
        return "dflash-transformers"
    if "dflash_config" in config or "DFlash" in names:
        return "dflash"
    if "Eagle3" in names or "eagle_config" in config or "draft_vocab_size" in config:
        return "eagle3"
    return "transformers"


def lint_causal(folder: Folder, target: Config | None) -> Iterator[Finding]:
    """A causal LM folder."""
    config = folder.config
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if not (folder.path / file).is_file():
            yield error(file, "is missing.")
    problems = list(check_numbers(config, [key for key in SIZES if key != "head_dim" or key in config]))
    yield from problems
    if "rope_parameters" in config or "rope_theta" in config:
        yield from check_rope(config)
    if target is not None and target.get("vocab_size") != config.get("vocab_size"):
        yield error("vocab_size", f"is {config.get('vocab_size')}, the target's {target.get('vocab_size')}.")
    if config.get("model_type") != "qwen3" or problems:
        return  # other architectures have other tensors
    h, v = config["hidden_size"], config["vocab_size"]
    required = {"model.embed_tokens.weight": (v, h), "model.norm.weight": (h,)}
    if not config.get("tie_word_embeddings"):
        required["lm_head.weight"] = (v, h)
    for layer in range(config["num_hidden_layers"]):
        required |= decoder_shapes(config, f"model.layers.{layer}.", norms=True)
    yield from check_tensors(folder, required)


LAYOUTS: dict[str, Rules] = {
    "transformers": lint_causal,
    "eagle3": lint_eagle3.lint_flat,
    "eagle3-speculators": lint_eagle3.lint_speculators,
    "dflash": lint_dflash.lint_zlab,
    "dflash-speculators": lint_dflash.lint_speculators,
    "dflash-transformers": lint_dflash.lint_transformers,
}


def _target_config(target: str | Path | Config | None) -> Config | None:
    if target is None or isinstance(target, Mapping):
        return target
    path = Path(target).expanduser()
    file = path / "config.json" if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"{target}: give the target's folder, or its config.json.")
    return read_json(file)
