"""Chains and trees on many architectures: the target's own greedy text, or refused by name."""

import pytest
import torch
from oracles.models.architectures import EQUAL, REFUSED, V, made
from transformers import PreTrainedModel

from certdraft.decoding import BestFirst, Chain, TreeBuilder, decode
from certdraft.drafters import CausalDrafter, TargetLayers

PROMPT = torch.randint(0, V, (20,), generator=torch.Generator().manual_seed(6)).tolist()


@torch.no_grad()
def greedy(model: PreTrainedModel, num: int) -> list[int]:
    ids = list(PROMPT)
    for _ in range(num):
        ids.append(int(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
    return ids[len(PROMPT) :]


@pytest.mark.parametrize("case", EQUAL)
def test_texts_are_greedy(case: str) -> None:
    model = made(EQUAL[case][0], **EQUAL[case][1])
    if "bias" in case:  # such a drafter is refused
        drafter = CausalDrafter(from_target=TargetLayers([0, 3])).build(V, made("Llama"))
    else:
        drafter = CausalDrafter(from_target=TargetLayers([0, 1, 3])).build(V, model)
    expected = greedy(model, 24)
    builders: list[TreeBuilder] = [Chain(3), BestFirst(8)]
    for builder in builders:
        assert decode(model, drafter.eval(), PROMPT, builder, max_new_tokens=24).tokens == expected


@pytest.mark.parametrize("case", REFUSED)
def test_a_target_that_is_misread_decodes_nothing(case: str) -> None:
    name, changes, _ = REFUSED[case]
    drafter = CausalDrafter(from_target=TargetLayers(2)).build(V, made("Llama")).eval()
    model = made(name, **changes)
    with pytest.raises(ValueError, match=f"{type(model).__name__}|the target reads at most 16 positions"):
        decode(model, drafter, PROMPT, Chain(3), max_new_tokens=8)
