"""Tree decoding against plain causal passes: logits of every node, and the cache after `keep`."""

from collections.abc import Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import Qwen3Config, Qwen3ForCausalLM

from certdraft.drafters import CachedLM, TreeCache, split_causal_lm
from certdraft.drafters.features.flex import use_block_masks

V = 96
ATTENTION = ["eager", "sdpa"]


def qwen3(attention: str = "sdpa", **changes: object) -> Qwen3ForCausalLM:
    """A random 3-layer Qwen3 with weights large enough that attention to a wrong token shows."""
    settings_ = {
        "vocab_size": V,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 512,
    } | changes
    torch.manual_seed(0)
    model = Qwen3ForCausalLM(Qwen3Config(**settings_)).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=0.25)
    model.set_attn_implementation(attention)
    return model


MODELS = {attention: qwen3(attention) for attention in ATTENTION}


def root_path(node: int, parents: Sequence[int]) -> list[int]:
    """Node numbers from the root down to `node`."""
    path = []
    while node >= 0:
        path.append(node)
        node = parents[node]
    return path[::-1]


@torch.no_grad()
def plain_logits(model: Qwen3ForCausalLM, ids: list[int]) -> Tensor:
    """Next-token logits by one uncached causal pass."""
    return model(torch.tensor([ids]), use_cache=False).logits[0, -1]


def assert_same_cache(cache: TreeCache, fresh: TreeCache) -> None:
    assert cache.length == fresh.length
    assert cache.num_nodes == fresh.num_nodes == 0
    for mine, theirs in zip(cache.layers, fresh.layers, strict=True):
        if fresh.length:
            assert mine.keys.shape == theirs.keys.shape
            torch.testing.assert_close(mine.keys, theirs.keys, atol=1e-4, rtol=0)
            torch.testing.assert_close(mine.values, theirs.values, atol=1e-4, rtol=0)


@st.composite
def rounds(draw: st.DrawFn) -> tuple[list[int], list[int], list[int], list[int]]:
    """(context, node tokens, parents, sizes of the passes) of one round; chains are drawn often."""
    context = draw(st.lists(st.integers(0, V - 1), max_size=12))
    num = draw(st.integers(1, 10))
    tokens = draw(st.lists(st.integers(0, V - 1), min_size=num, max_size=num))
    chain = draw(st.booleans())
    parents = [i - 1 if chain else draw(st.integers(-1, i - 1)) for i in range(num)]
    sizes = []
    while sum(sizes) < num:
        sizes.append(draw(st.integers(1, num - sum(sizes))))
    return context, tokens, parents, sizes


@pytest.mark.parametrize("attention", ATTENTION)
@settings(max_examples=30)
@given(first=rounds(), second=rounds(), data=st.data())
def test_tree_equals_plain_passes(attention: str, first, second, data) -> None:
    model = MODELS[attention]
    lm = CachedLM(model)
    text, cache = first[0], lm.prefill(first[0], room=1)  # room 1: the buffers grow on the way
    for _, tokens, parents, sizes in (first, second):
        done, logits = 0, []
        for size in sizes:
            logits.append(lm.extend(cache, tokens[done : done + size], parents[done : done + size]))
            done += size
        for node, row in enumerate(torch.cat(logits)):
            expected = plain_logits(model, text + [tokens[i] for i in root_path(node, parents)])
            torch.testing.assert_close(row, expected, atol=1e-4, rtol=0)
        path = root_path(data.draw(st.integers(-1, len(tokens) - 1)), parents)
        cache.keep(path)
        text = text + [tokens[i] for i in path]
        assert_same_cache(cache, lm.prefill(text))


def test_no_parents_means_a_chain() -> None:
    lm = CachedLM(MODELS["sdpa"])
    one, other = lm.prefill([1, 2, 3]), lm.prefill(torch.tensor([1, 2, 3]))
    chain = torch.cat([lm.extend(one, [4, 5]), lm.extend(one, [6])])
    given_parents = lm.extend(other, torch.tensor([4, 5, 6]), torch.tensor([-1, 0, 1]))
    torch.testing.assert_close(chain, given_parents, atol=1e-5, rtol=0)


def test_features_are_the_outputs_of_the_tapped_layers() -> None:
    model = MODELS["sdpa"]
    lm = CachedLM(model, taps=(1, 0))
    cache = lm.prefill([5, 6, 7])
    states = model(
        torch.tensor([[5, 6, 7, 8]]), output_hidden_states=True
    ).hidden_states  # [0] is the embedding
    torch.testing.assert_close(cache.features, torch.stack([states[2][0, :3], states[1][0, :3]], dim=1))
    lm.extend(cache, [8, 9], [-1, -1])
    torch.testing.assert_close(cache.features[0], torch.stack([states[2][0, 3], states[1][0, 3]]))
    assert cache.features.shape == (2, 2, 32)


def test_a_model_trained_with_block_masks_decodes_as_with_sdpa() -> None:
    """On CUDA training leaves its attention in the model, which is then bound anew for decoding."""
    model, drafts = qwen3(), ([4, 5, 6], [-1, 0, 0])
    use_block_masks(model)
    lms = CachedLM(model), CachedLM(MODELS["sdpa"])
    caches = [lm.prefill([1, 2, 3]) for lm in lms]
    for _ in range(2):  # a tree, then a tree on what was kept of it
        mine, wanted = (lm.extend(cache, *drafts) for lm, cache in zip(lms, caches, strict=True))
        torch.testing.assert_close(mine, wanted)
        for cache in caches:
            cache.keep([0, 2])


def test_bf16_model_gives_fp32_logits() -> None:
    lm = CachedLM(qwen3().to(torch.bfloat16))
    cache = lm.prefill([1, 2])
    assert lm.extend(cache, [3, 4, 5], [-1, 0, 0]).dtype == torch.float32


@pytest.mark.parametrize("path", [[1], [0, 2], [0, 1, 3], [0, 0], [-1], [0, 1, 9]])
def test_keep_refuses_what_is_not_a_root_path(path: list[int]) -> None:
    lm = CachedLM(MODELS["sdpa"])
    cache = lm.prefill([1])
    lm.extend(cache, [2, 3, 4, 5], [-1, 0, 1, 0])
    with pytest.raises(ValueError, match="does not lead down from the root"):
        cache.keep(path)


def test_extend_refuses_a_later_parent() -> None:
    lm = CachedLM(MODELS["sdpa"])
    with pytest.raises(ValueError, match="node 1 has parent 1"):
        lm.extend(lm.prefill([1]), [2, 3], [-1, 1])
    with pytest.raises(ValueError, match="2 tokens and 1 parents"):
        lm.extend(lm.prefill([1]), [2, 3], [-1])


def test_models_that_would_be_wrong_are_refused() -> None:
    with pytest.raises(ValueError, match="training mode"):
        CachedLM(qwen3().train()).prefill([1])
    windowed = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 0}
    lm = CachedLM(qwen3(**windowed))
    cache = lm.prefill([1, 2, 3])
    lm.extend(cache, [4, 5], [-1, -1])
    with pytest.raises(ValueError, match="Qwen3ForCausalLM has layers that attend to the last 4 tokens only"):
        lm.extend(cache, [6], [0])
    with pytest.raises(ValueError, match="a text has 5"):
        lm.prefill([1, 2, 3, 4, 5])
    linear = qwen3()
    linear.config.layer_types = ["mamba"] * 3
    with pytest.raises(ValueError, match="has mamba layers, which certdraft does not decode"):
        CachedLM(linear)
    with pytest.raises(ValueError, match="no separate language-model head"):
        split_causal_lm(qwen3().model)
    capped = qwen3()
    capped.config.final_logit_softcapping = 30.0
    with pytest.raises(ValueError, match="final_logit_softcapping"):
        CachedLM(capped)
    flex = qwen3()
    flex.config._attn_implementation_internal = "flex_attention"
    with pytest.raises(ValueError, match="cannot follow a tree"):
        CachedLM(flex)
    with pytest.raises(ValueError, match="layers 0 to 2"):
        CachedLM(qwen3(), taps=(3,))
