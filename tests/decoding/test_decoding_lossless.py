"""Losslessness at length: the embedded target's greedy text on 200 prompts by every decoder; and in bf16."""

import pytest
import torch
from oracles.models.decoding_models import (
    FeatureDrafter,
    FeatureMarginalDrafter,
    GarbageDrafter,
    NetworkDrafter,
    perturbed,
    random_distribution,
    tiny_qwen3,
)

from certdraft.data import load_target, load_tokenizer, standard_library
from certdraft.decoding import (
    BestFirst,
    Chain,
    CostAware,
    CostModel,
    StaticTree,
    TargetRunner,
    decode,
    greedy,
    replay,
)

COST = CostModel.table([1 + 0.02 * n for n in range(65)], 0.1)
BUILDERS = {
    "chain": lambda: Chain(4),
    "static": lambda: StaticTree((3, 2, 1)),
    "best_first": lambda: BestFirst(16, max_depth=5),
    "cost_aware": lambda: CostAware(COST, budget=32, max_depth=5),
}


def assert_lossless(model, drafters: dict, prompts: list[list[int]], tokens: int, tie: float = 0.0) -> int:
    """Every decoder writes the greedy text, up to ties of `tie` nats; the number of accepted tokens."""
    plain, accepted = TargetRunner(model), 0
    for prompt in prompts:
        text = greedy(plain, prompt, tokens)
        for drafter in drafters.values():
            target = TargetRunner(model, drafter.taps)
            for make in BUILDERS.values():
                result = decode(target, drafter, prompt, make(), max_new_tokens=tokens)
                accepted += sum(r.accepted for r in result.rounds)
                if result.tokens == text:
                    continue
                at = next(i for i, (a, b) in enumerate(zip(text, result.tokens, strict=True)) if a != b)
                logits = model.float()(torch.tensor([[*prompt, *text[:at]]])).logits[0, -1]
                assert logits.max() - logits[result.tokens[at]] < tie, f"{drafter} at token {at}"
    return accepted


def test_drafters_that_read_features_write_the_greedy_text() -> None:
    model = tiny_qwen3(0, 40)
    table = random_distribution(40, 4, 4.0)
    drafters = {
        "features": FeatureDrafter(perturbed(model, 0.1), 0.5),
        "marginal": FeatureMarginalDrafter(lambda p: [table((*p, d)) for d in range(4)], 40, 32),
    }
    assert assert_lossless(model, drafters, [[1, 2, 3], [7, 9]], 16) > 10


def test_bf16_differs_at_ties_alone() -> None:
    """In bf16 a pass of another width rounds differently: a text may leave the greedy one where the target
    hardly prefers its token, and nowhere else. The lead is measured in fp32, on the same rounded weights."""
    half = tiny_qwen3(0, 40).to(torch.bfloat16)
    texts = {}
    for prompt in ([1, 2, 3], [7], [30, 31], [5, 5], [17, 2], [21]):
        text = greedy(half, prompt, 24)
        for name, make in BUILDERS.items():
            texts[name, tuple(prompt)] = (
                text,
                decode(half, NetworkDrafter(half), prompt, make(), max_new_tokens=24).tokens,
            )
    wide, differing = tiny_qwen3(0, 40).to(torch.bfloat16).float(), 0
    for (_, prompt), (text, tokens) in texts.items():
        at = next((i for i, (a, b) in enumerate(zip(text, tokens, strict=True)) if a != b), None)
        if at is not None:
            logits = wide(torch.tensor([[*prompt, *text[:at]]])).logits[0, -1]
            rounding = 2**-7 * logits.abs().max()
            assert logits.max() - logits[text[at]] < rounding
            assert logits.max() - logits[tokens[at]] < rounding
            differing += 1
    assert differing < len(texts) / 2


@pytest.mark.parametrize(
    "make", [lambda: Chain(60), lambda: BestFirst(500, max_depth=2), lambda: BestFirst(90)]
)
def test_budgets_beyond_the_vocabulary_take_what_there_is(make) -> None:
    model = tiny_qwen3(0, 12)
    text = greedy(model, [1, 2], 10)
    for drafter in (NetworkDrafter(perturbed(model, 0.3)), GarbageDrafter(12)):
        assert decode(model, drafter, [1, 2], make(), max_new_tokens=10).tokens == text
    rounds = replay(NetworkDrafter(perturbed(model, 0.3)), [1, 2], text, make()).rounds
    assert max(r.nodes for r in rounds) <= 12 + 12 * 12 + 60


@pytest.mark.slow
@pytest.mark.parametrize("drafter", ["noisy", "garbage", "parallel"])
def test_greedy_text_on_200_prompts_by_every_decoder(drafter: str) -> None:
    """The embedded target on 200 beginnings of standard-library files."""
    model, words = load_target(), load_tokenizer()
    sources = [words(d.text[:400])["input_ids"][:24] for d in standard_library("test")]
    sources += [words(d.text[400:800])["input_ids"][:24] for d in standard_library("validation")]
    sources += [words(d.text[800:1200])["input_ids"][:24] for d in standard_library("train")[:200]]
    prompts = [ids for ids in sources if len(ids) == 24][:200]
    assert len(prompts) == 200
    table = random_distribution(64, 4, 4.0)
    made = {
        "noisy": lambda: NetworkDrafter(perturbed(model, 0.1)),
        "garbage": lambda: GarbageDrafter(2048),
        "parallel": lambda: FeatureMarginalDrafter(
            lambda p: [[*table((*p, d)), *[1e-9] * 1984] for d in range(4)], 2048, 128
        ),
    }
    assert_lossless(model, {drafter: made[drafter]()}, prompts, 16, tie=1e-3)
