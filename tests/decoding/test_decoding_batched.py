"""Batched chains: every row has the text and the rounds that it has alone, whoever its neighbours are."""

import copy
import functools
import warnings

import pytest
import torch
from oracles.models.decoding_models import (
    GarbageDrafter,
    TableTarget,
    disturbed_drafter,
    random_distribution,
    tiny_qwen3,
)

from certdraft.decoding import BestFirst, Chain, DecodeResult, TargetRunner, decode, decode_batch, greedy
from certdraft.decoding.batched import BatchedLM
from certdraft.drafters import CachedLM

V = 40
MODEL = tiny_qwen3(0, V)
PROMPTS = [[1, 2, 3], [7], [30, 31, 32, 33, 34, 35, 36], [5, 5], list(range(39, 10, -1)), [0]]
DRAFTERS = {
    name: disturbed_drafter(MODEL, noise)
    for name, noise in (("perfect", 0.0), ("good", 0.15), ("garbage", 5.0))
}


@functools.cache
def greedy_text(prompt: tuple[int, ...], tokens: int, eos: frozenset[int] | None) -> list[int]:
    return greedy(MODEL, prompt, tokens, eos)


def facts(result: DecodeResult) -> tuple:
    """All but the seconds."""
    rounds = [(r.context, r.nodes, r.depth, r.accepted, r.committed) for r in result.rounds]
    expected = [pytest.approx(r.expected, abs=1e-4) for r in result.rounds]
    return result.tokens, rounds, expected, result.stopped, result.fallbacks


def assert_as_alone(results: list[DecodeResult], model, drafter, prompts, depth, tokens, eos=None) -> None:
    assert len(results) == len(prompts)
    for result, prompt in zip(results, prompts, strict=True):
        alone = decode(model, drafter, prompt, Chain(depth), max_new_tokens=tokens, eos=eos)
        expected = [r.expected for r in result.rounds]
        assert facts(alone)[:2] == facts(result)[:2]
        assert facts(alone)[2] == expected
        assert facts(alone)[3:] == facts(result)[3:]
        assert result.tokens == greedy_text(tuple(prompt), tokens, eos)


@pytest.mark.parametrize(("name", "depth"), [("perfect", 4), ("good", 4), ("good", 1), ("garbage", 4)])
def test_ragged_prompts_have_the_texts_and_rounds_they_have_alone(name: str, depth: int) -> None:
    results = decode_batch(MODEL, DRAFTERS[name], PROMPTS, Chain(depth), max_new_tokens=24)
    assert_as_alone(results, MODEL, DRAFTERS[name], PROMPTS, depth, 24)
    accepted = sum(r.accepted for result in results for r in result.rounds)
    assert accepted > 20 or name == "garbage"


def test_the_perfect_drafter_is_accepted_whole() -> None:
    """3 of 4 rounds commit depth + 1 tokens: its unread leaf, one token behind the root, is read with it."""
    results = decode_batch(MODEL, DRAFTERS["perfect"], PROMPTS, Chain(3), max_new_tokens=12)
    assert [[r.committed for r in result.rounds] for result in results] == [[4, 4, 4]] * len(PROMPTS)


def test_rows_that_end_early_leave_the_others_alone() -> None:
    eos = frozenset({1, 23, 38})  # in four of the six greedy texts, at four places
    results = decode_batch(MODEL, DRAFTERS["good"], PROMPTS, Chain(4), max_new_tokens=40, eos=eos)
    assert len({len(result.tokens) for result in results}) >= 4
    assert {result.stopped for result in results} == {"eos", "length"}
    assert_as_alone(results, MODEL, DRAFTERS["good"], PROMPTS, 4, 40, eos)


@pytest.mark.parametrize("tokens", [1, 2, 5])
def test_no_row_goes_beyond_the_budget(tokens: int) -> None:
    results = decode_batch(MODEL, DRAFTERS["good"], PROMPTS, Chain(8), max_new_tokens=tokens)
    assert {len(result.tokens) for result in results} == {tokens}
    assert_as_alone(results, MODEL, DRAFTERS["good"], PROMPTS, 8, tokens)


def test_a_batch_of_one_is_decode() -> None:
    runner = TargetRunner(MODEL)
    results = decode_batch(runner, DRAFTERS["good"], [torch.tensor([3, 1, 4])], max_new_tokens=16)
    assert_as_alone(results, runner, DRAFTERS["good"], [[3, 1, 4]], 4, 16)


def test_eager_attention_sees_the_same_tokens() -> None:
    eager = copy.deepcopy(MODEL)
    eager.set_attn_implementation("eager")
    results = decode_batch(eager, DRAFTERS["good"], PROMPTS, Chain(4), max_new_tokens=16)
    assert_as_alone(results, MODEL, DRAFTERS["good"], PROMPTS, 4, 16)


def test_gaps_are_closed_when_they_outgrow_the_text() -> None:
    """A drafter that is always wrong wastes `depth` slots a round; texts stay right across compactions."""
    lm = BatchedLM(CachedLM(MODEL), [[1, 2], []])
    widest = 0
    for _ in range(40):
        logits = lm.extend([[5, 6, 7, 8, 9], [4]])
        assert logits.shape == (6, V)
        lm.keep([1, 1])
        widest = max(widest, lm.visible.shape[1])
        lm.select([0, 1])
    assert lm.visible.sum(1).tolist() == [42, 40]
    assert widest <= 2 * 42 + 64 + 5
    plain = MODEL(torch.tensor([[1, 2] + [5] * 40 + [3]])).logits[0, -1]
    torch.testing.assert_close(lm.extend([[3], []])[0], plain, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.*not finite:RuntimeWarning")
@pytest.mark.parametrize("token", [0, 1, 5])
def test_rows_in_which_the_drafter_breaks_fall_back_alone(token: int) -> None:
    """One embedding is NaN: rows that meet it go on without drafts, as alone; padding must not spread it."""
    broken = disturbed_drafter(MODEL, 0.15)
    text = greedy(MODEL, PROMPTS[0], 24)
    poison = 0 if token == 0 else text[token]
    with torch.no_grad():
        broken.model.get_input_embeddings().weight[poison] = torch.nan
    results = decode_batch(MODEL, broken, PROMPTS, Chain(4), max_new_tokens=24)
    assert any(result.fallbacks for result in results)
    assert_as_alone(results, MODEL, broken, PROMPTS, 4, 24)


def test_a_broken_drafter_warns_once_for_the_batch() -> None:
    broken = disturbed_drafter(MODEL, 0.15)
    with torch.no_grad():
        broken.head_weight.fill_(torch.nan)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = decode_batch(MODEL, broken, PROMPTS, Chain(4), max_new_tokens=12)
        assert ["not finite" in str(warning.message) for warning in caught] == [True]
        assert caught[0].filename == __file__
        assert_as_alone(results, MODEL, broken, PROMPTS, 4, 12)


def test_seconds_of_the_rows_add_up_to_the_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    """With a clock that says 1 at every lap, a step of two phases and its rest cost 3 whatever its rows."""

    class Ticks:
        def __init__(self, device: object) -> None: ...

        def lap(self, phase: str) -> float:
            return 1.0

    monkeypatch.setattr("certdraft.decoding.batched.RealClock", Ticks)
    results = decode_batch(MODEL, DRAFTERS["good"], PROMPTS, Chain(4), max_new_tokens=24)
    steps = max(len(result.rounds) for result in results)
    assert sum(result.seconds for result in results) == pytest.approx(3 * steps)
    assert sum(result.prefill_s for result in results) == pytest.approx(1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prompts": []}, "prompts is empty"),
        ({"prompts": [[1], []]}, "prompt_ids is empty"),
        ({"prompts": [[1], [V]]}, "vocabulary"),
        ({"prompts": [[1], [2] * 5000]}, "context overflow"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"builder": BestFirst(4)}, "a Chain; got"),
        ({"drafter": GarbageDrafter(V)}, "got .*GarbageDrafter"),
        ({"target": TableTarget(random_distribution(V, 4, 4.0), V)}, "got TableTarget"),
        ({"drafter": disturbed_drafter(MODEL, 0.1).train()}, "training mode"),
    ],
)
def test_what_it_cannot_do_is_refused(change: dict, message: str) -> None:
    given = {"target": MODEL, "drafter": DRAFTERS["good"], "prompts": PROMPTS, "max_new_tokens": 4} | change
    with pytest.raises(ValueError, match=message):
        decode_batch(**given)
