"""Files of an export as the static check reads them, and the rules that all formats share.

Only config.json, safetensors headers and, where asked for, single small tensors are read. Letters: V target
vocabulary, H target hidden, A aux hidden-state layers; h, f sizes of the drafter; n query heads, k key-value
heads, d head dimension.
"""

import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open
from torch import Tensor

Config = Mapping[str, Any]
Shapes = Mapping[str, tuple[int, ...]]


@dataclass(frozen=True)
class Finding:
    """Something wrong with an export.

    Attributes:
        severity: "error": an engine that reads the format refuses the folder, or drafts badly with it.
            "warning": fewer engines read it than the format is meant for, or shorter texts.
        where: key of config.json, or tensor.
        message: what is wrong and what to do.
    """

    severity: Literal["error", "warning"]
    where: str
    message: str

    def __str__(self) -> str:
        return f"{self.severity}: {self.where}: {self.message}"


def error(where: str, message: str) -> Finding:
    """A finding that makes the export wrong."""
    return Finding("error", where, message)


def warning(where: str, message: str) -> Finding:
    """A finding that makes the export less portable."""
    return Finding("warning", where, message)


@dataclass(frozen=True)
class Header:
    """One tensor of a safetensors file: its dtype there ("F32"), its shape, and the file."""

    dtype: str
    shape: tuple[int, ...]
    file: Path


@dataclass(frozen=True)
class Folder:
    """An export as far as the static check reads it."""

    path: Path
    config: Config
    tensors: Mapping[str, Header]

    def tensor(self, name: str) -> Tensor:
        """One tensor's values."""
        with safe_open(self.tensors[name].file, framework="pt") as file:
            value: Tensor = file.get_tensor(name)
        return value


@dataclass(frozen=True)
class Layout:
    """One way a drafter kind is written to disk.

    Attributes:
        name: of the layout.
        matches: whether a folder is written in it.
        rules: what is wrong with such a folder, given the target's config or None.
    """

    name: str
    matches: Callable[[Folder], bool]
    rules: Callable[[Folder, Config | None], Iterator[Finding]]


def class_names(folder: Folder) -> str:
    """`architectures` of the config, joined."""
    return " ".join(folder.config.get("architectures") or ())


def by_speculators(folder: Folder, model_type: str | None = None, class_name: str | None = None) -> bool:
    """Whether a folder is written in the layout of speculators, for a model type or a class named so."""
    found = folder.config.get("speculators_model_type")
    if found is None and "speculators_config" not in folder.config:
        return False
    if model_type is None or found == model_type:
        return True
    return class_name is not None and class_name in class_names(folder)


def read_folder(path: str | Path) -> Folder:
    """Config and headers of a folder."""
    folder = Path(path).expanduser()
    if not (folder / "config.json").is_file():
        raise FileNotFoundError(
            f"{folder}: {'no config.json there' if folder.is_dir() else 'no such folder'}."
        )
    return Folder(folder, read_json(folder / "config.json"), read_headers(folder))


def read_json(path: Path) -> dict[str, Any]:
    """Read the object in a JSON file.

    Raises:
        ValueError: not valid JSON, or no object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as problem:
        raise ValueError(f"{path} is not valid JSON: {problem}.") from problem
    if not isinstance(content, dict):
        raise ValueError(f"{path} holds a {type(content).__name__}, not an object.")
    return content


def read_headers(folder: Path) -> dict[str, Header]:
    """Read the tensor headers of a folder by name: of model.safetensors, or of the shards its index lists."""
    index = folder / "model.safetensors.index.json"
    names = sorted(set(read_json(index)["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    tensors: dict[str, Header] = {}
    for name in names:
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder}: no {name} there; engines load safetensors.")
        for tensor, entry in _header(folder / name).items():
            if tensor != "__metadata__":
                tensors[tensor] = Header(entry["dtype"], tuple(entry["shape"]), folder / name)
    return tensors


def _header(file: Path) -> dict[str, Any]:
    size = file.stat().st_size
    with file.open("rb") as stream:
        length = struct.unpack("<Q", stream.read(8))[0] if size >= 8 else size
        if length > size - 8:
            raise ValueError(
                f"{file} is not a safetensors file, or only the beginning of one; write it again."
            )
        try:
            content: dict[str, Any] = json.loads(stream.read(length))
            tensors = [entry for name, entry in content.items() if name != "__metadata__"]
            end = max((int(entry["data_offsets"][1]) for entry in tensors), default=0)
        except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as problem:
            raise ValueError(f"{file} has an unreadable header: {problem}.") from problem
    if end != size - 8 - length:
        raise ValueError(
            f"{file} has {size - 8 - length:,} bytes of tensors, its header describes {end:,}; write "
            "it again."
        )
    return content


def check_numbers(config: Config, keys: Sequence[str], at: str = "") -> Iterator[Finding]:
    """Sizes that must be there as positive integers."""
    for key in keys:
        value = config.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            yield error(at + key, f"must be a positive integer, is {value!r}.")


def check_layers(folder: Folder, config: Config, at: str = "") -> Iterator[Finding]:
    """No more layers than there are tensors: rules that name every layer would otherwise never end."""
    found = config.get("num_hidden_layers")
    if isinstance(found, int) and found > len(folder.tensors):
        yield error(
            f"{at}num_hidden_layers", f"is {found}, but the folder has {len(folder.tensors)} tensors."
        )


def check_equal(config: Config, expected: Config, at: str = "") -> Iterator[Finding]:
    """Keys that have only one right value; a key must be there, because engines' defaults differ."""
    for key, value in expected.items():
        if config.get(key, _ABSENT) != value:
            found = f"is {config[key]!r}" if key in config else "is missing, and engines' defaults differ"
            yield error(at + key, f"must be {value!r}, {found}.")


def check_rope(config: Config, at: str = "") -> Iterator[Finding]:
    """Rotary base and scaling, under the name of every reader: one that misses its own takes a default."""
    modern: Any = config.get("rope_parameters")
    if isinstance(modern, Mapping) and "full_attention" not in modern:
        scaling = {key: value for key, value in modern.items() if key != "rope_theta"}
        plain = scaling.get("rope_type", "default") == "default"
        legacy = config.get("rope_scaling") or {}
        if legacy != scaling and not (plain and legacy.get("rope_type", "default") == "default"):
            yield error(
                f"{at}rope_scaling", f"is {legacy}, in rope_parameters {scaling}; write the same to both."
            )
    if not isinstance(modern, Mapping) or "full_attention" not in modern:
        modern = {"full_attention": modern}  # one base for all layers; Gemma 3 has one for each kind of layer
    names = {"full_attention": "rope_theta", "sliding_attention": "rope_local_base_freq"}
    for kind, values in modern.items():
        if not isinstance(values, Mapping) or "rope_theta" not in values:
            yield error(
                f"{at}rope_parameters", "must hold rope_theta and rope_type, for readers of transformers 5."
            )
        elif kind in names and config.get(names[kind]) != values["rope_theta"]:
            yield error(
                f"{at}{names[kind]}",
                f"is {config.get(names[kind])!r}, in rope_parameters {values['rope_theta']!r}; write the "
                "same value to both.",
            )


def check_positions(config: Config, target: Config | None, at: str = "") -> Iterator[Finding]:
    """As many positions as the target has."""
    found, wanted = (c.get("max_position_embeddings") if c else None for c in (config, target))
    if isinstance(found, int) and isinstance(wanted, int) and found < wanted:
        yield warning(
            f"{at}max_position_embeddings",
            f"is {found}, the target's {wanted}: in longer texts engines stop drafting, or limit the context "
            "of both. Train a drafter with the target's number of positions.",
        )


def check_speculators(config: Config, algorithm: str) -> Iterator[Finding]:
    """Keys without which vLLM does not serve a folder of speculators by its path."""
    section = config.get("speculators_config") or {}
    at = "speculators_config."
    yield from check_equal(section, {"algorithm": algorithm, "default_proposal_method": "greedy"}, at)
    methods = section.get("proposal_methods") or [{}]
    yield from check_equal(methods[0], {"proposal_type": "greedy"}, f"{at}proposal_methods[0].")
    yield from check_numbers(methods[0], ("speculative_tokens",), f"{at}proposal_methods[0].")
    verifier = section.get("verifier") or {}
    for key in ("name_or_path", "architectures"):
        if not verifier.get(key):
            yield error(f"{at}verifier.{key}", "is missing; vLLM serves the folder's own path with it.")
    if not config.get("speculators_version"):
        yield error("speculators_version", "is missing.")


def check_tensors(folder: Folder, required: Shapes, optional: Shapes | None = None) -> Iterator[Finding]:
    """Names and shapes: everything the format has, nothing else."""
    known = {**(optional or {}), **required}
    for name, shape in known.items():
        header = folder.tensors.get(name)
        if header is None:
            if name in required:
                yield error(name, f"is missing; must be {list(shape)}.")
        elif header.shape != shape:
            yield error(name, f"has shape {list(header.shape)}, must be {list(shape)}.")
    for name in sorted(folder.tensors.keys() - known.keys()):
        inner = next((key for key in known if name.endswith(f".{key}")), None)
        hint = f"; drop the prefix {name.removesuffix(inner)!r}" if inner else ""
        yield error(name, f"is not a tensor of this format{hint}. Engines refuse it, or skip it silently.")


def decoder_shapes(config: Config, prefix: str, *, inputs: int | None = None, norms: bool = False) -> Shapes:
    """Tensors of one pre-norm decoder layer.

    Args:
        config: sizes in the keys of transformers.
        prefix: of the names, with its dot.
        inputs: what attention reads; None: the hidden size.
        norms: normalised queries and keys (Qwen3).
    """
    h, f, n, k = (config[key] for key in (*SIZES[:2], "num_attention_heads", "num_key_value_heads"))
    d = config["head_dim"]
    read = inputs or h
    shapes: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (h,),
        "post_attention_layernorm.weight": (h,),
        "self_attn.q_proj.weight": (n * d, read),
        "self_attn.k_proj.weight": (k * d, read),
        "self_attn.v_proj.weight": (k * d, read),
        "self_attn.o_proj.weight": (h, n * d),
        "mlp.gate_proj.weight": (f, h),
        "mlp.up_proj.weight": (f, h),
        "mlp.down_proj.weight": (h, f),
    }
    if norms:
        shapes |= {"self_attn.q_norm.weight": (d,), "self_attn.k_norm.weight": (d,)}
    return {prefix + name: shape for name, shape in shapes.items()}


SIZES = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "vocab_size",
    "max_position_embeddings",
)
_ABSENT = object()
