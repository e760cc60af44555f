"""Chains of models with linear attention: every round's logits and features are those of a plain pass."""

from __future__ import annotations

import pytest
import torch
from oracles.models.architectures import EXPERTS, LINEAR, V, made
from transformers import PreTrainedModel

from certdraft.decoding import Chain, decode, decode_batch
from certdraft.drafters import CachedLM, CausalDrafter, ChainCache, TargetLayers
from certdraft.drafters.features.feature_drafter import TargetEnds

MODELS = {
    "qwen3 next": made("Qwen3Next", **EXPERTS | LINEAR),
    "qwen3.5": made("Qwen3_5Text", **LINEAR),
}


@torch.no_grad()
def plain(model: PreTrainedModel, ids: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [T, V] and the output of layer 1 [T, H], of one pass without a cache."""
    output = model(input_ids=torch.tensor([ids]), use_cache=False, output_hidden_states=True)
    return output.logits[0], output.hidden_states[2][0]


@pytest.mark.parametrize("start", [0, 1, 9])
@pytest.mark.parametrize("name", MODELS)
def test_rounds_are_plain_passes(name: str, start: int) -> None:
    """Rounds that keep all, some or none of what they read, in one pass or two, and many kept in a row."""
    model = MODELS[name]
    lm = CachedLM(model, taps=(1,))
    generator = torch.Generator().manual_seed(start)
    draw = lambda num: torch.randint(V, (num,), generator=generator).tolist()  # noqa: E731
    text = draw(start)
    cache = lm.prefill(text)
    assert isinstance(cache, ChainCache)
    longest = 0
    for round_ in range(24):
        nodes = draw(5 if round_ % 3 else 1)
        cut = len(nodes) if round_ % 2 else (len(nodes) + 1) // 2  # read in one call or in two
        logits = lm.extend(cache, nodes[:cut], range(-1, cut - 1))
        features = [cache.features]
        if cut < len(nodes):
            logits = torch.cat([logits, lm.extend(cache, nodes[cut:])])
            features.append(cache.features)
        expected, states = plain(model, text + nodes)
        torch.testing.assert_close(logits, expected[len(text) :], atol=1e-3, rtol=1e-3)
        found = torch.cat([part[:, 0] for part in features])
        torch.testing.assert_close(found, states[len(text) :], atol=1e-3, rtol=1e-3)
        kept = [4, 0, 5, 3, 4, 4][round_ % 6] if len(nodes) > 1 else round_ // 3 % 2
        cache.keep(list(range(kept)))
        text += nodes[:kept]
        assert cache.length == len(text)
        longest = max(longest, len(cache.waiting))
    assert longest > 3, "some round was taken back"
    assert longest <= 32 + 5, "what waits is read for good in the end"


@pytest.mark.parametrize("name", MODELS)
def test_what_waits_long_is_read_for_good(name: str) -> None:
    model = MODELS[name]
    lm = CachedLM(model)
    text = list(range(4))
    cache = lm.prefill(text)
    passes = []
    for _ in range(14):  # every round keeps four of five: the state never gets beyond its snapshot
        nodes = [(7 * len(text) + i) % V for i in range(5)]
        logits = lm.extend(cache, nodes)
        passes.append(len(cache.waiting))
        torch.testing.assert_close(logits, plain(model, text + nodes)[0][len(text) :], atol=1e-3, rtol=1e-3)
        cache.keep(range(4))
        text += nodes[:4]
    assert max(passes) == 32
    assert passes.count(0) == 2, "at the start, and once they were read"


def test_trees_are_refused_by_name() -> None:
    lm = CachedLM(MODELS["qwen3 next"])
    cache = lm.prefill([1, 2, 3])
    with pytest.raises(ValueError, match="Qwen3NextForCausalLM has linear_attention layers.*no token trees"):
        lm.extend(cache, [4, 5, 6], [-1, 0, 0])
    lm.extend(cache, [4, 5, 6])
    with pytest.raises(ValueError, match="root of this chain of 3"):
        cache.keep([0, 2])
    with pytest.raises(ValueError, match="reads tokens in order|read tokens in order"):
        CausalDrafter(from_target=TargetLayers(2)).build(V, MODELS["qwen3.5"])
    drafter = CausalDrafter(from_target=TargetLayers(2)).build(V, made("Llama")).eval()
    with pytest.raises(ValueError, match="decode takes one text after the other"):
        decode_batch(MODELS["qwen3.5"], drafter, [[1, 2, 3]], Chain(2), max_new_tokens=4)
    assert len(decode(MODELS["qwen3.5"], drafter, [1, 2, 3], Chain(2), max_new_tokens=4).tokens) == 4


@pytest.mark.parametrize("name", ["Llama", "Qwen3Next"])
def test_the_norm_that_drafters_start_with_is_the_gain(name: str) -> None:
    """Qwen3-Next stores one less than it multiplies by."""
    model = made(name, **(EXPERTS | LINEAR if name == "Qwen3Next" else {}))
    torch.nn.init.normal_(model.model.norm.weight, std=0.2)
    x = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = model.model.norm(x)
    found = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * TargetEnds.of(model).norm
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-4)
