"""Static rules of causal drafters: folders of transformers causal LMs."""

from collections.abc import Iterator

from certdraft.drafters.formats.lint_files import (
    SIZES,
    Config,
    Finding,
    Folder,
    Layout,
    check_layers,
    check_numbers,
    check_positions,
    check_rope,
    check_tensors,
    decoder_shapes,
    error,
)


def lint_causal(folder: Folder, target: Config | None) -> Iterator[Finding]:
    """A causal LM folder."""
    config = folder.config
    for file in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        if not (folder.path / file).is_file():
            yield error(file, "is missing.")
    problems = list(check_numbers(config, [key for key in SIZES if key != "head_dim" or key in config]))
    problems += check_layers(folder, config)
    yield from problems
    if "rope_parameters" in config or "rope_theta" in config:
        yield from check_rope(config)
    yield from check_positions(config, target)
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


LAYOUTS = (Layout("transformers", lambda folder: True, lint_causal),)
