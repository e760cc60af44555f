"""Static rules of EAGLE-3 heads: the flat layout that most engines read, and that of speculators."""

from collections.abc import Iterator
from typing import Any

import torch

from certdraft.drafters.formats.lint_files import (
    SIZES,
    Config,
    Finding,
    Folder,
    Layout,
    by_speculators,
    check_equal,
    check_numbers,
    check_positions,
    check_rope,
    check_speculators,
    check_tensors,
    class_names,
    decoder_shapes,
    error,
    warning,
)

_IDS = "eagle_aux_hidden_state_layer_ids"
# Norms that a head may add, and the engines that compute each.
_FLAGS = {
    "norm_before_residual": "vLLM, speculators and llama.cpp",
    "norm_before_fc": "vLLM, SGLang, speculators and llama.cpp",
    "fc_norm": "vLLM, SGLang and speculators",
    "norm_output": "vLLM, SGLang and speculators",
}
# The second one is served by vLLM only.
_ARCHITECTURES = {"llama": "LlamaForCausalLMEagle3", "qwen3": "Eagle3Qwen3ForCausalLM"}


def lint_flat(folder: Folder, target: Config | None) -> Iterator[Finding]:
    """The flat layout: vLLM, SGLang, TensorRT-LLM, llama.cpp and OpenVINO."""
    config = folder.config
    yield from _body(folder, config, "midlayer.", target)
    yield from check_equal(config, {"architectures": [_ARCHITECTURES.get(config.get("model_type", ""), "?")]})
    yield from _flags(config)
    nested = config.get("eagle_config") or {}
    ids: Any = config.get(_IDS)
    lowered = nested.get(_IDS)
    if _is_ids(ids) and lowered != [number - 1 for number in ids]:
        yield error(
            f"eagle_config.{_IDS}",
            f"is {lowered}; must be {[number - 1 for number in ids]}, the top-level key minus one (SGLang "
            "counts layers, the others hidden states).",
        )
    yield from check_equal(nested, {"use_aux_hidden_state": True}, "eagle_config.")


def lint_speculators(folder: Folder, target: Config | None) -> Iterator[Finding]:
    """The layout of speculators: vLLM, speculators and llama.cpp."""
    config = folder.config
    inner = config.get("transformer_layer_config") or {}
    body = {
        **inner,
        **{k: config[k] for k in (_IDS, "draft_vocab_size", "target_hidden_size", *_FLAGS) if k in config},
    }
    yield from _body(folder, body, "layers.0.", target, "transformer_layer_config.")
    yield from check_equal(config, {"speculators_model_type": "eagle3"})
    if config.get("architectures") not in (["Eagle3Speculator"], ["Eagle3DraftModel"]):
        yield error("architectures", f"is {config.get('architectures')!r}; must be ['Eagle3Speculator'].")
    yield from check_speculators(config, "eagle3")
    yield from _flags(config)


def _body(
    folder: Folder, config: Config, prefix: str, target: Config | None, at: str = ""
) -> Iterator[Finding]:
    """Rules that both layouts share; `config` holds the sizes wherever they were written."""
    ids: Any = config.get(_IDS)
    problems = [*check_numbers(config, SIZES, at), *check_numbers(config, ("draft_vocab_size",))]
    if config.get("model_type") not in _ARCHITECTURES:
        problems.append(
            error(f"{at}model_type", f"is {config.get('model_type')!r}; must be llama (or qwen3).")
        )
    if not _is_ids(ids):
        problems.append(
            error(_IDS, f"is {ids!r}; must list entries of hidden_states, each from 1 on, ascending.")
        )
    yield from problems
    yield from check_rope(config, at)
    yield from check_equal(config, {"tie_word_embeddings": False}, at)
    if config.get("num_hidden_layers") != 1:
        yield error(
            f"{at}num_hidden_layers", f"is {config.get('num_hidden_layers')!r}; an EAGLE-3 head has 1."
        )
    if config.get("attention_bias"):
        yield error(f"{at}attention_bias", "is true; the format has no biases.")
    if problems:
        return  # no sizes to compare tensors with
    qwen = config["model_type"] == "qwen3"
    if qwen:
        yield warning(f"{at}model_type", "is qwen3 (normalised queries and keys), which only vLLM serves.")
    if len(ids) != 3:
        yield warning(_IDS, f"lists {len(ids)} layers; SGLang and OpenVINO read exactly 3.")
    h, v, dv = config["hidden_size"], config["vocab_size"], config["draft_vocab_size"]
    wide = config.get("target_hidden_size") or h
    required: dict[str, tuple[int, ...]] = {
        "fc.weight": (h, len(ids) * wide),
        f"{prefix}hidden_norm.weight": (h,),
        **decoder_shapes(config, prefix, inputs=2 * h, norms=qwen),
        "norm.weight": (h,),
        "lm_head.weight": (dv, h),
        **_flag_tensors(config, len(ids), wide),
    }
    tables: dict[str, tuple[int, ...]] = {"d2t": (dv,), "t2d": (v,)}
    if dv < v:
        required |= tables
    yield from check_tensors(folder, required, {"embed_tokens.weight": (v, h)} | tables)
    yield from _check_tables(folder, v, dv)
    if target is not None:
        yield from check_positions(config, target, at)
        yield from _check_pair(target, ids, wide, v)


def _check_tables(folder: Folder, v: int, dv: int) -> Iterator[Finding]:
    """d2t holds offsets, t2d marks the same tokens."""
    headers = folder.tensors
    if dv > v:
        yield error("draft_vocab_size", f"is {dv}, more than vocab_size {v}.")
    if headers.keys() & {"d2t", "t2d"} in ({"d2t"}, {"t2d"}):
        yield error("d2t, t2d", "belong together; one of them is missing.")
    if not {"d2t", "t2d"} <= headers.keys() or headers["d2t"].shape != (dv,) or headers["t2d"].shape != (v,):
        return
    if headers["d2t"].dtype != "I64" or headers["t2d"].dtype != "BOOL":
        yield error(
            "d2t, t2d", f"are {headers['d2t'].dtype} and {headers['t2d'].dtype}; must be I64 and BOOL."
        )
        return
    d2t, member = folder.tensor("d2t"), folder.tensor("t2d").nonzero().flatten()
    tokens = torch.arange(dv) + d2t
    if torch.equal(tokens, member):
        return
    if torch.equal(d2t, member):
        yield error("d2t", "holds token ids; engines read offsets, token id = i + d2t[i].")
    elif not bool((tokens[1:] > tokens[:-1]).all()) or int(tokens.min()) < 0 or int(tokens.max()) >= v:
        yield error("d2t", f"the token ids i + d2t[i] must ascend within 0 to {v - 1}.")
    else:
        yield error("t2d", f"marks {member.numel()} tokens that are not the {dv} of d2t.")


def _check_pair(target: Config, ids: list[int], wide: int, v: int) -> Iterator[Finding]:
    """Rules that need the target as well."""
    if target.get("hidden_size") != wide:
        yield error(
            "fc.weight", f"reads features of {wide} numbers, the target has {target.get('hidden_size')}."
        )
    if target.get("vocab_size") != v:
        yield error("vocab_size", f"is {v}, the target's {target.get('vocab_size')}.")
    layers = target.get("num_hidden_layers", 0)
    if max(ids) > layers - 1:
        yield error(_IDS, f"is {ids}; the target's last hidden state before the final norm is {layers - 1}.")


def _flags(config: Config) -> Iterator[Finding]:
    """Flags as booleans, the one with two defaults always there, and who computes those that are set."""
    for key, engines in _FLAGS.items():
        flag = config.get(key, None if key == "norm_before_residual" else False)
        if not isinstance(flag, bool):
            yield error(key, f"is {flag!r}; must be true or false. vLLM and speculators default differently.")
        elif flag:
            yield warning(key, f"is true, which only {engines} compute; others draft badly.")
    if config.get("norm_before_fc") and config.get("fc_norm"):
        yield error("norm_before_fc, fc_norm", "are both true; they exclude each other.")


def _flag_tensors(config: Config, num: int, wide: int) -> dict[str, tuple[int, ...]]:
    """Tensors of the norms before `fc`."""
    found: dict[str, tuple[int, ...]] = {}
    if config.get("norm_before_fc"):
        found["input_norm.weight"] = (num * wide,)
    if config.get("fc_norm"):
        found |= {f"fc_norm.{layer}.weight": (wide,) for layer in range(num)}
    return found


def _is_ids(ids: object) -> bool:
    """Whether these are hidden-state ids that every engine reads as the same layers."""
    if not isinstance(ids, list) or not ids or not all(type(number) is int for number in ids):
        return False
    return ids[0] >= 1 and all(a < b for a, b in zip(ids, ids[1:], strict=False))


def _is_flat(folder: Folder) -> bool:
    keys = {"eagle_config", "draft_vocab_size"} & folder.config.keys()
    return not by_speculators(folder) and ("Eagle3" in class_names(folder) or bool(keys))


LAYOUTS = (
    Layout("eagle3-speculators", lambda folder: by_speculators(folder, "eagle3", "Eagle3"), lint_speculators),
    Layout("eagle3", _is_flat, lint_flat),
)
