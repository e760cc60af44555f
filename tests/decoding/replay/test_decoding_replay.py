"""Replay against the live loop, round by round."""

from dataclasses import replace

import pytest
import torch
from oracles.models.decoding_models import (
    FeatureDrafter,
    FeatureMarginalDrafter,
    GarbageDrafter,
    MarginalDrafter,
    NetworkDrafter,
    perturbed,
    random_distribution,
    tiny_qwen3,
)
from oracles.models.feature_drafters import enlarge

from certdraft.decoding import (
    BestFirst,
    Chain,
    CostAware,
    CostModel,
    RealClock,
    StaticTree,
    TableClock,
    TargetRunner,
    decode,
    fingerprint,
    greedy,
    greedy_ranks,
    replay,
)
from certdraft.decoding.draft_session import DraftSession
from certdraft.decoding.replay.exact_replay import _through_the_loop
from certdraft.drafters import BlockConfig, BlockDrafter, EagleConfig, EagleDrafter

V = 40
TARGET = TargetRunner(tiny_qwen3(0, V))
PROMPT = [1, 2, 3]
BUILDERS = {
    "chain": lambda: Chain(3),
    "long_chain": lambda: Chain(40),
    "static": lambda: StaticTree((3, 2, 1, 1)),
    "best_first": lambda: BestFirst(9, max_depth=4),
    "narrow_frontier": lambda: BestFirst(12, max_depth=5, temperature=0.7, frontier=2),
    "cost_aware": lambda: CostAware(CostModel.table([1 + 0.05 * n for n in range(33)], 0.1), max_depth=4),
}


@pytest.fixture(scope="module")
def text() -> list[int]:
    return greedy(TARGET, PROMPT, 30)


def key(rounds) -> list[tuple]:
    return [(r.context, r.nodes, r.depth, r.accepted, r.committed) for r in rounds]


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("scale", [0.0, 0.1, 0.3])
def test_replay_is_the_live_loop_round_by_round(builder: str, scale: float, text: list[int]) -> None:
    drafter = NetworkDrafter(perturbed(TARGET.model, scale))
    live = decode(TARGET, drafter, PROMPT, BUILDERS[builder](), max_new_tokens=30)
    again = replay(drafter, PROMPT, text, BUILDERS[builder]())
    assert again.tokens == live.tokens
    assert key(again.rounds) == key(live.rounds)
    assert again.acceptance_length == live.acceptance_length
    assert again.stopped == live.stopped


@pytest.mark.parametrize("builder", BUILDERS)
def test_a_clock_prices_replayed_rounds_as_it_does_live_ones(builder: str, text: list[int]) -> None:
    drafter = NetworkDrafter(perturbed(TARGET.model, 0.1))
    clock = TableClock(CostModel.table([1 + 0.5 * n for n in range(9)], 0.25, draft_node_s=0.125))
    live = decode(TARGET, drafter, PROMPT, BUILDERS[builder](), max_new_tokens=30, clock=clock)
    again = replay(drafter, PROMPT, text, BUILDERS[builder](), clock=clock)
    assert [(r.draft_s, r.verify_s) for r in again.rounds] == [(r.draft_s, r.verify_s) for r in live.rounds]
    assert all(r.verify_s > 0 for r in again.rounds)
    assert key(again.rounds) == key(replay(drafter, PROMPT, text, BUILDERS[builder]()).rounds)


@pytest.mark.parametrize("builder", BUILDERS)
def test_replay_ends_where_the_text_ends(builder: str, text: list[int]) -> None:
    """Stop tokens at every place of the round, with room left that the live loop still drafts for."""
    drafter = NetworkDrafter(perturbed(TARGET.model, 0.05))
    for stop in (text[3], text[9], text[10], text[11], text[17]):
        live = decode(TARGET, drafter, PROMPT, BUILDERS[builder](), max_new_tokens=30, eos=stop)
        again = replay(drafter, PROMPT, live.tokens, BUILDERS[builder](), max_new_tokens=30, eos=stop)
        assert key(again.rounds) == key(live.rounds)
        assert again.stopped == live.stopped == "eos"


def test_other_drafters_replay_through_the_loop(text: list[int]) -> None:
    table = random_distribution(V, 4, 4.0)
    parallel = MarginalDrafter(lambda p: [table((*p, d)) for d in range(4)], V)

    def garbage() -> GarbageDrafter:  # its logits differ at every call: only the loop asks in the same order
        return GarbageDrafter(V, seed=3)

    fixed = CostAware(CostModel.table([1.0], 0.1), "fixed", budget=9, temperature=1.0)
    for make, builder in ((lambda: parallel, Chain(3)), (lambda: parallel, BestFirst(9)), (garbage, fixed)):
        live = decode(TARGET, make(), PROMPT, builder, max_new_tokens=30)
        assert key(replay(make(), PROMPT, text, builder).rounds) == key(live.rounds)


@pytest.mark.parametrize(
    ("builder", "prompt"), [("chain", PROMPT), ("best_first", [7, 8]), ("cost_aware", PROMPT)]
)
def test_drafters_that_read_features_replay_with_those_of_the_text(builder: str, prompt: list[int]) -> None:
    table = random_distribution(V, 4, 4.0)
    for make in (
        lambda: FeatureDrafter(perturbed(TARGET.model, 0.1), 0.5),
        lambda: FeatureMarginalDrafter(lambda p: [table((*p, d)) for d in range(4)], V, 32),
    ):
        drafter = make()
        target = TargetRunner(TARGET.model, drafter.taps)
        live = decode(target, drafter, prompt, BUILDERS[builder](), max_new_tokens=20)
        features = target.features(target.start([*prompt, *live.tokens[:-1]]))
        again = replay(make(), prompt, live.tokens, BUILDERS[builder](), features=features)
        assert key(again.rounds) == key(live.rounds)
        assert again.tokens == live.tokens
        with pytest.raises(ValueError, match=f"these are of {len(features) - 1}"):
            replay(make(), prompt, live.tokens, features=features[:-1])


def real_drafter(family: str):
    model = tiny_qwen3(0, V, layers=7)
    if family == "block":
        config = BlockConfig(num_hidden_layers=1, block_size=5, mask_token_id=V - 1, target_layer_ids=(1, 4))
        drafter = BlockDrafter(config).build(V, model)
    else:
        size = 25 if "short" in family else None
        drafter = EagleDrafter(EagleConfig(draft_vocab_size=size), max_lost_coverage=1.0).build(
            V, model, torch.arange(V) % 7 + 1
        )
    return model, enlarge(drafter.eval()) or drafter


def half_guessed(drafter, prompt: list[int], features: torch.Tensor, length: int) -> list[int]:
    """A text of which a chain guesses 0 to 4 tokens, then misses one, and so on."""
    tokens: list[int] = []
    for number in range(length):
        known = [*prompt, *tokens]
        state = drafter.start(known[:-1], features[: len(known) - 1])
        session = DraftSession(drafter, [], RealClock())
        session._state = state
        tree = Chain(4).build(session, known[-1], max_depth=4)
        kept = tree.tokens[1 : 1 + number % 5]
        tokens += [*kept, (tree.tokens[1 + len(kept)] if len(kept) < 4 else 0) + 1]
        tokens = [token % V for token in tokens]
        if len(tokens) >= length:
            return tokens[:length]


@pytest.mark.parametrize("family", ["eagle", "eagle_short_vocabulary", "block"])
@torch.inference_mode()
def test_real_families_replay_at_once(family: str) -> None:
    """One pass over a text (chains, static trees, a block's best-first trees) against the loop over it."""
    model, drafter = real_drafter(family)
    for prompt in (PROMPT, [5, 9]):
        shape = (len(prompt) + 24, len(drafter.taps), model.config.hidden_size)
        features = torch.randn(shape, generator=torch.Generator().manual_seed(2))
        text = half_guessed(drafter, prompt, features, 24)
        for name in ("chain", "long_chain", "static", "best_first"):
            again = replay(drafter, prompt, text, BUILDERS[name](), features=features)
            loop = _through_the_loop(drafter, prompt, text, BUILDERS[name](), 24, None, features)
            assert key(again.rounds) == key(loop.rounds)
            assert sum(r.accepted for r in again.rounds) > 7
            if family == "block":
                for mine, theirs in zip(again.rounds, loop.rounds, strict=True):
                    assert mine.bonus_rank == theirs.bonus_rank or mine.accepted == mine.depth


@pytest.mark.parametrize("family", ["eagle", "block"])
def test_real_families_decode_and_replay_the_targets_text(family: str) -> None:
    model, drafter = real_drafter(family)
    target = TargetRunner(model, drafter.taps)
    text = greedy(model, PROMPT, 16)
    features = target.features(target.start([*PROMPT, *text[:-1]]))
    for name in ("chain", "best_first", "cost_aware"):
        live = decode(target, drafter, PROMPT, BUILDERS[name](), max_new_tokens=16)
        assert live.tokens == text
        assert key(replay(drafter, PROMPT, text, BUILDERS[name](), features=features).rounds) == key(
            live.rounds
        )


def test_the_rank_of_the_bonus_token_is_overheard(text: list[int]) -> None:
    """By hand: rank of the true token at the depth where the chain of a parallel drafter fails."""
    table = random_distribution(V, 4, 4.0)
    drafter = MarginalDrafter(lambda p: [table((*p, d)) for d in range(4)], V)
    done, ranks = 0, []
    for r in (again := replay(drafter, PROMPT, text, Chain(3))).rounds:
        row = torch.tensor(table((*PROMPT, *text[:done], r.accepted)))
        known = r.depth > 0 and r.accepted < 4 and r.committed > r.accepted
        expected = int((row > row[text[done + r.accepted]]).sum()) if known else None
        assert r.bonus_rank == expected
        ranks.append(expected)
        done += r.committed
    assert len(again.rounds) > 10
    assert any(rank and rank > 3 for rank in ranks)


def test_ranks_of_the_drafters_own_text_are_zero(text: list[int]) -> None:
    assert greedy_ranks(NetworkDrafter(TARGET.model), PROMPT, text) == [0] * 30
    ranks = greedy_ranks(NetworkDrafter(perturbed(TARGET.model, 0.3)), PROMPT, text)
    assert 0 < sum(rank == 0 for rank in ranks) < 30


def test_an_unfinished_text_is_refused(text: list[int]) -> None:
    drafter = NetworkDrafter(TARGET.model)
    with pytest.raises(ValueError, match="30 tokens, .* max_new_tokens is 40"):
        replay(drafter, PROMPT, text, max_new_tokens=40)
    with pytest.raises(ValueError, match=f"ends after {text.index(text[4]) + 1}"):
        replay(drafter, PROMPT, text, eos=text[4])
    drafter.taps = (1,)
    with pytest.raises(ValueError, match=r"target layers \(1,\); .* at the first 32 tokens .* `features`"):
        replay(drafter, PROMPT, text)


@pytest.mark.parametrize("family", ["eagle", "block"])
def test_costs_measured_with_a_drafter_hold_for_its_replay(family: str, text: list[int]) -> None:
    _, drafter = real_drafter(family)
    table = CostModel.table([1 + 0.05 * n for n in range(33)], 0.1)
    builder = CostAware(replace(table, drafter=fingerprint(drafter)), max_depth=4)
    features = torch.randn(len(PROMPT) + len(text), len(drafter.taps), drafter.config.hidden_size)
    assert replay(drafter, PROMPT, text, builder, features=features).rounds
    other = CostAware(replace(table, drafter="another"), max_depth=4)
    with pytest.raises(ValueError, match="measured with drafter"):
        replay(drafter, PROMPT, text, other, features=features)
