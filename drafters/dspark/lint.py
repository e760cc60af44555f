"""Static rules of DSpark drafters: the layout of DeepSpec, and that of speculators."""

from collections.abc import Iterator

from certdraft.drafters.dflash.lint import block_rules, speculators_rules, window_rules
from certdraft.drafters.formats.lint_files import (
    Config,
    Finding,
    Folder,
    Layout,
    by_speculators,
    check_equal,
    check_numbers,
    class_names,
    error,
)

_VANILLA = {"markov_head_type": "vanilla"}


def lint_deepspec(folder: Folder, target: Config | None) -> Iterator[Finding]:
    """DeepSpec's layout: vLLM and SGLang."""
    config = folder.config
    yield from check_equal(config, {"architectures": ["Qwen3DSparkModel"], "model_type": "qwen3"})
    yield from check_numbers(config, ("num_target_layers",))
    yield from _heads(config, needs_anchor=False)
    yield from _block(folder, config, "target_layer_ids", config.get("num_target_layers"), target)


def lint_speculators(folder: Folder, target: Config | None) -> Iterator[Finding]:
    """The layout of speculators: vLLM and speculators."""
    config = folder.config
    inner = config.get("transformer_layer_config") or {}
    at = "transformer_layer_config."
    yield from speculators_rules(config, inner, at, "dspark")
    yield from _heads(config, needs_anchor=True)
    layers = target.get("num_hidden_layers") if target else None
    yield from _block(folder, inner, "aux_hidden_state_layer_ids", layers, target, at)


def _heads(config: Config, needs_anchor: bool) -> Iterator[Finding]:
    """Keys of the two heads, each of which some reader has another default for."""
    yield from check_equal(config, _VANILLA)
    yield from check_numbers(config, ("markov_rank",))
    for key in ("enable_confidence_head", *(("sample_from_anchor",) if needs_anchor else ())):
        if not isinstance(config.get(key), bool):
            yield error(key, f"is {config.get(key)!r}; must be true or false: readers' defaults differ.")
    if config.get("enable_confidence_head") and not isinstance(
        config.get("confidence_head_with_markov"), bool
    ):
        yield error("confidence_head_with_markov", "must be true or false, because vLLM's default is false.")
    both = (config.get("sample_from_anchor"), config.get("dspark_bonus_anchor"))
    if None not in both and both[0] == both[1]:
        yield error("dspark_bonus_anchor", f"is {both[1]} like sample_from_anchor; one is not the other.")


def _block(
    folder: Folder, inner: Config, key: str, layers: object, target: Config | None, at: str = ""
) -> Iterator[Finding]:
    """Rules of the block, and the tensors of the heads; `inner` has the sizes of the layers, at `at`."""
    config = folder.config
    yield from window_rules(inner, {}, at)
    if set(inner.get("layer_types") or ()) - {"full_attention"}:
        yield error(
            f"{at}layer_types", "has layers with a window, which readers of this format do not share."
        )
    ids = config.get(key)
    if at and isinstance(ids, list):
        ids = [number - 1 for number in ids]  # speculators counts hidden states
    rank, vocab, hidden = config.get("markov_rank"), inner.get("vocab_size"), inner.get("hidden_size")
    more: dict[str, tuple[int, ...]] = {}
    ends: dict[str, tuple[int, ...]] = {}  # of the target, which DeepSpec's own folders hold
    if isinstance(rank, int) and isinstance(vocab, int) and isinstance(hidden, int):
        more = {f"markov_head.markov_w{i}.weight": (vocab, rank) for i in (1, 2)}
        if config.get("enable_confidence_head"):
            inputs = hidden + (rank if config.get("confidence_head_with_markov") else 0)
            more |= {"confidence_head.proj.weight": (1, inputs), "confidence_head.proj.bias": (1,)}
        if not at:
            ends = {f"{name}.weight": (vocab, hidden) for name in ("embed_tokens", "lm_head")}
    mask, size = config.get("mask_token_id"), config.get("block_size")
    yield from block_rules(
        folder, inner, (ids, key), mask, size, layers, target, at, more=more, optional=ends
    )


def _is_deepspec(folder: Folder) -> bool:
    return not by_speculators(folder) and "DSpark" in class_names(folder)


LAYOUTS = (
    Layout("dspark-speculators", lambda folder: by_speculators(folder, "dspark", "DSpark"), lint_speculators),
    Layout("dspark", _is_deepspec, lint_deepspec),
)
