"""Static rules of DFlash block drafters: z-lab's layout, that of speculators, and transformers' own."""

from collections.abc import Iterator, Mapping

from certdraft.drafters.dflash.windows import FULL, SLIDING
from certdraft.drafters.formats.lint_files import (
    SIZES,
    Config,
    Finding,
    Folder,
    Layout,
    by_speculators,
    check_equal,
    check_layers,
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


def lint_zlab(folder: Folder, target: Config | None) -> Iterator[Finding]:
    """z-lab's layout: vLLM, SGLang, TensorRT-LLM, llama.cpp and OpenVINO."""
    config = folder.config
    section = config.get("dflash_config") or {}
    size = config.get("block_size", section.get("block_size"))
    if section.get("block_size", size) != size:
        yield error("block_size", f"is {size}, in dflash_config {section['block_size']}.")
    yield from check_equal(config, {"architectures": ["DFlashDraftModel"], "model_type": "qwen3"})
    yield from check_numbers(config, ("num_target_layers",))
    yield from window_rules(config, section)
    ids, layers = section.get("target_layer_ids"), config.get("num_target_layers")
    mask = section.get("mask_token_id")
    yield from block_rules(
        folder, config, (ids, "dflash_config.target_layer_ids"), mask, size, layers, target
    )


def lint_speculators(folder: Folder, target: Config | None) -> Iterator[Finding]:
    """The layout of speculators: vLLM and speculators."""
    config = folder.config
    inner = config.get("transformer_layer_config") or {}
    at = "transformer_layer_config."
    yield from speculators_rules(config, inner, at, "dflash")
    yield from window_rules(inner, {}, at)
    kinds, flag = inner.get("layer_types") or (), config.get("sliding_window_non_causal")
    if flag is None and SLIDING in kinds:
        yield error("sliding_window_non_causal", "is missing: false for speculators, true for vLLM.")
    elif flag is False and set(kinds) != {SLIDING}:
        yield error("sliding_window_non_causal", "is false, with which vLLM 0.32 makes every layer causal.")
    yield from check_equal(config, {"sample_from_anchor": False})
    name = "aux_hidden_state_layer_ids"
    ids = config.get(name)
    from_0 = [number - 1 for number in ids] if isinstance(ids, list) else ids  # it counts hidden states
    layers = target.get("num_hidden_layers") if target else None
    mask, size = config.get("mask_token_id"), config.get("block_size")
    yield from block_rules(folder, inner, (from_0, name), mask, size, layers, target, at)


def lint_transformers(folder: Folder, target: Config | None) -> Iterator[Finding]:
    """transformers' own layout (`speculation_type="dflash"`)."""
    config = folder.config
    yield from check_equal(
        config, {"architectures": ["MuseGlimmerAssistantModel"], "model_type": "muse_glimmer_assistant"}
    )
    names = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
    layers = target.get("num_hidden_layers") if target else None
    ids, mask, size = (config.get(key) for key in ("target_layer_ids", "mask_token_id", "block_size"))
    yield from block_rules(folder, config, (ids, "target_layer_ids"), mask, size, layers, target, names=names)


def speculators_rules(config: Config, inner: Config, at: str, algorithm: str) -> Iterator[Finding]:
    """Rules of a block drafter in the layout of speculators; `inner` has the sizes of the layers, at `at`."""
    yield from check_equal(inner, {"model_type": "qwen3"}, at)
    yield from check_speculators(config, algorithm)
    vocab, drafted = inner.get("vocab_size"), config.get("draft_vocab_size")
    if drafted != vocab:
        yield error("draft_vocab_size", f"is {drafted!r}; must be vocab_size, {vocab!r}.")


def block_rules(
    folder: Folder,
    config: Config,
    layer_ids: tuple[object, str],
    mask: object,
    block_size: object,
    layers: object,
    target: Config | None,
    at: str = "",
    names: dict[str, str] | None = None,
    more: Mapping[str, tuple[int, ...]] | None = None,
    optional: Mapping[str, tuple[int, ...]] | None = None,
) -> Iterator[Finding]:
    """Rules that the layouts share; `layer_ids` from 0 with their key, `layers` of the target.

    `more` and `optional` are tensors, with their shapes, that a layout has beside those of the block.
    """
    ids, key = layer_ids
    sizes = SIZES if names is None else tuple(size for size in SIZES if size != "vocab_size")
    problems = [*check_numbers(config, sizes, at), *check_layers(folder, config, at)]
    yield from problems
    yield from check_rope(config, at)
    if config.get("attention_bias"):
        yield error(f"{at}attention_bias", "is true; the format has no biases.")
    if not isinstance(block_size, int) or block_size < 2:
        yield error("block_size", f"is {block_size!r}; must be at least 2 (the anchor and one draft token).")
    num = config.get("num_hidden_layers")
    kinds = config.get("layer_types")
    if not problems and not (isinstance(kinds, list) and len(kinds) == num and set(kinds) <= {FULL, SLIDING}):
        yield error(f"{at}layer_types", f"is {kinds!r}; must be {FULL} or {SLIDING}, {num} times in all.")
    vocab = target.get("vocab_size") if target else config.get("vocab_size")
    if type(mask) is not int or mask < 0 or (isinstance(vocab, int) and mask >= vocab):
        yield error(
            "mask_token_id", f"is {mask!r}; must be a row of the target's embeddings, 0 to {vocab} - 1."
        )
    if not isinstance(ids, list) or not ids or not all(type(number) is int for number in ids):
        yield error(
            key, f"is {ids!r}; must list the target's layers, because each engine has another default."
        )
        return
    if min(ids) < 0 or len(set(ids)) < len(ids) or ids != sorted(ids):
        yield error(key, f"names layers {ids}; must be different ones, ascending, from 0 on.")
    known = target.get("num_hidden_layers") if target else layers
    if target and isinstance(layers, int) and layers != known:
        yield error("num_target_layers", f"is {layers}, the target has {known}.")
    if isinstance(known, int) and max(ids) > known - 2:
        yield error(
            key, f"names layers {ids}; the last one every engine hands out of {known} is {known - 2}."
        )
    yield from check_positions(config, target, at)
    if problems:
        return  # no sizes to compare tensors with
    h = config["hidden_size"]
    if target and (target.get("hidden_size"), target.get("vocab_size")) != (
        h,
        config.get("vocab_size", vocab),
    ):
        yield error(
            f"{at}hidden_size, vocab_size",
            f"are {h} and {config.get('vocab_size')}; the target's embeddings, which the drafter shares, are "
            f"{target.get('vocab_size')} by {target.get('hidden_size')}.",
        )
    required: dict[str, tuple[int, ...]] = {
        "fc.weight": (h, len(ids) * h),
        "hidden_norm.weight": (h,),
        "norm.weight": (h,),
    }
    for layer in range(config["num_hidden_layers"]):
        required |= decoder_shapes(config, f"layers.{layer}.", norms=True)
    named = {(names or {}).get(name, name): s for name, s in required.items()}
    yield from check_tensors(folder, named | dict(more or {}), optional or {})


def window_rules(config: Config, section: Config, at: str = "") -> Iterator[Finding]:
    """A window where layers slide, in every key that a reader takes it from, and none where none does."""
    slides = SLIDING in (config.get("layer_types") or ())
    window, used = config.get("sliding_window"), bool(config.get("use_sliding_window"))
    if slides and (type(window) is not int or window < 1):
        yield error(f"{at}sliding_window", f"is {window!r}, but layers slide; must be at least 1.")
    if slides and not used:
        yield error(f"{at}use_sliding_window", "is not true, with which transformers drops the window.")
    if not slides and (window is not None or used or section.get("use_swa")):
        yield error(
            f"{at}sliding_window", "is set, but no layer slides: readers differ. Name them in layer_types."
        )
    if section.get("swa_window_size", window) != window:
        yield error(
            "dflash_config.swa_window_size", f"is {section['swa_window_size']}, sliding_window {window}."
        )
    if section.get("causal") != config.get("is_causal"):
        yield error(
            "dflash_config.causal",
            f"is {section.get('causal')!r}, is_causal {config.get('is_causal')!r}; engines read the one, "
            "z-lab's own code the other. Write both, or neither.",
        )
    elif slides and section.get("causal") is False:
        yield warning(
            "dflash_config.causal", "is false, which vLLM computes; SGLang reads sliding layers in order."
        )
    if slides:
        yield warning(f"{at}layer_types", "has windows, which vLLM and SGLang compute; older readers do not.")


def _is_transformers(folder: Folder) -> bool:
    return folder.config.get("model_type") == "muse_glimmer_assistant"


def _is_zlab(folder: Folder) -> bool:
    return not by_speculators(folder) and (
        "dflash_config" in folder.config or "DFlash" in class_names(folder)
    )


LAYOUTS = (
    Layout("dflash-speculators", lambda folder: by_speculators(folder, "dflash", "DFlash"), lint_speculators),
    Layout("dflash-transformers", _is_transformers, lint_transformers),
    Layout("dflash", _is_zlab, lint_zlab),
)
