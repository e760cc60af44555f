"""The loop on networks: greedy text whatever the drafter (A1), tree passes and caches (A3-A5), bad input."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from oracles.models.decoding_models import (
    BrokenDrafter,
    GarbageDrafter,
    MarginalDrafter,
    NetworkDrafter,
    TableDrafter,
    TableTarget,
    disturbed_drafter,
    perturbed,
    random_distribution,
    tiny_qwen3,
)

from certdraft.decoding import (
    BestFirst,
    Chain,
    CostAware,
    CostModel,
    RealClock,
    SampleMatch,
    StaticTree,
    TargetRunner,
    Tree,
    acceptance_length,
    decode,
    greedy,
)
from certdraft.decoding.draft_session import DraftSession

V = 40
MODEL = tiny_qwen3(0, V)
TARGET = TargetRunner(MODEL)
PROMPTS = [[1, 2, 3], [7], [30, 31, 32, 33, 34, 35, 36]]
COST = CostModel.table([1 + 0.02 * n for n in range(33)], 0.1)
TABLE = random_distribution(V, 4, 4.0)


DRAFTERS = {
    "perfect": NetworkDrafter(MODEL),
    "good": disturbed_drafter(MODEL, 0.15),
    "bad": NetworkDrafter(perturbed(MODEL, 0.5)),
    "garbage": GarbageDrafter(V),
    "parallel": MarginalDrafter(lambda p: [TABLE((*p, d)) for d in range(4)], V),
}
BUILDERS = {
    "chain": lambda: Chain(4),
    "static": lambda: StaticTree((3, 2, 1)),
    "best_first_1": lambda: BestFirst(1),
    "best_first_7": lambda: BestFirst(7),
    "best_first_64": lambda: BestFirst(64, max_depth=4),
    "cost_aware": lambda: CostAware(COST, "lambda", budget=32, max_depth=4),
}


@pytest.fixture(scope="module")
def greedy_texts() -> list[list[int]]:
    return [greedy(TARGET, prompt, 24) for prompt in PROMPTS]


# A1


@pytest.mark.parametrize("builder", BUILDERS)
@pytest.mark.parametrize("drafter", DRAFTERS)
def test_text_is_the_targets_greedy_text(drafter: str, builder: str, greedy_texts) -> None:
    for prompt, text in zip(PROMPTS, greedy_texts, strict=True):
        result = decode(TARGET, DRAFTERS[drafter], prompt, BUILDERS[builder](), max_new_tokens=24)
        assert result.tokens == text
        assert result.stopped == "length"
        assert sum(r.committed for r in result.rounds) == 24
        assert all(r.committed == r.accepted + 1 for r in result.rounds)
        assert [r.context for r in result.rounds] == [
            len(prompt) - 1 + sum(r.committed for r in result.rounds[:i]) for i in range(len(result.rounds))
        ]


def test_greedy_is_the_models_own_argmax(greedy_texts) -> None:
    ids = [*PROMPTS[0], *greedy_texts[0]]
    logits = MODEL(torch.tensor([ids]), use_cache=False).logits[0]
    assert logits.argmax(-1)[len(PROMPTS[0]) - 1 : -1].tolist() == greedy_texts[0]


def test_drafters_differ_in_acceptance_alone(greedy_texts) -> None:
    def tau(drafter: str) -> float:
        results = [decode(TARGET, DRAFTERS[drafter], p, Chain(4), max_new_tokens=24) for p in PROMPTS]
        return acceptance_length(results)

    assert tau("perfect") == pytest.approx(72 / 15)  # 4 rounds of 5 tokens, one of 4
    assert tau("perfect") > tau("good") > tau("bad") >= 1


def test_eager_attention_and_bf16_agree_with_their_own_greedy_text() -> None:
    eager = tiny_qwen3(0, V, attention="eager")
    text = greedy(eager, PROMPTS[0], 16)
    assert text == decode(eager, DRAFTERS["good"], PROMPTS[0], BestFirst(7), max_new_tokens=16).tokens
    half = tiny_qwen3(0, V).to(torch.bfloat16)  # verified by its own passes: every token is an argmax there
    result = decode(half, NetworkDrafter(half), PROMPTS[0], BestFirst(7), max_new_tokens=16)
    logits = half(torch.tensor([[*PROMPTS[0], *result.tokens]]), use_cache=False).logits[0].float()
    logits = logits[len(PROMPTS[0]) - 1 : -1]
    chosen = logits.gather(1, torch.tensor(result.tokens)[:, None])[:, 0]
    assert (logits.amax(1) - chosen).max() < 0.05 * logits.std()


# end of text


def test_the_end_of_text_is_found_inside_the_tree(greedy_texts) -> None:
    """For every token of the text as the stop token: same text as greedy, wherever in the round it falls."""
    text = greedy_texts[0]
    inside = 0
    for stop in sorted(set(text)):
        expected = text[: text.index(stop) + 1]
        assert greedy(TARGET, PROMPTS[0], 24, eos=stop) == expected
        result = decode(
            TARGET, DRAFTERS["perfect"], PROMPTS[0], Chain(4), max_new_tokens=24, eos=[stop, V - 1]
        )
        assert result.tokens == expected
        assert result.stopped == "eos"
        last = result.rounds[-1]
        assert sum(r.committed for r in result.rounds) == len(expected)
        assert last.committed - last.accepted in (0, 1)  # no bonus after an accepted stop token
        inside += last.accepted == last.committed
    assert inside > 3


@pytest.mark.parametrize("limit", [1, 2, 5, 6])
@pytest.mark.parametrize("builder", BUILDERS)
def test_never_a_token_too_many(builder: str, limit: int, greedy_texts) -> None:
    result = decode(TARGET, DRAFTERS["perfect"], PROMPTS[0], BUILDERS[builder](), max_new_tokens=limit)
    assert result.tokens == greedy_texts[0][:limit]
    left = limit
    for r in result.rounds:
        assert r.depth <= left - 1  # and nothing is drafted in vain
        left -= r.committed


# A3-A5


@settings(max_examples=15)
@given(st.data())
def test_tree_pass_equals_plain_passes(data: st.DataObject) -> None:
    """A3: logits of every slot against a plain causal pass over its root path."""
    tokens, parents = [5], [-1]
    for slot in range(1, data.draw(st.integers(2, 9))):
        parents.append(data.draw(st.integers(0, slot - 1)))
        tokens.append(slot + 10)
    tree = Tree.from_parents(tokens, parents)
    logits = TARGET.verify(TARGET.start(PROMPTS[2]), tree)
    for slot in range(len(tokens)):
        ids = [*PROMPTS[2], *(tokens[i] for i in tree.path_to(slot))]
        plain = MODEL(torch.tensor([ids]), use_cache=False).logits[0, -1]
        torch.testing.assert_close(logits[slot], plain, atol=1e-4, rtol=0)


class Watched(TargetRunner):
    """Keeps the states it made, and the committed text that each stands for."""

    def start(self, ids):
        self.state, self.text = super().start(ids), list(ids)
        return self.state

    def verify_greedy(self, state, tree):
        self.tree = tree
        return super().verify_greedy(state, tree)

    def keep(self, state, path) -> None:
        self.text += [self.tree.tokens[slot] for slot in path]
        super().keep(state, path)


def assert_same_cache(state, fresh) -> None:
    assert state.length == fresh.length
    for mine, theirs in zip(state.layers, fresh.layers, strict=True):
        for name in ("keys", "values"):  # the last round's nodes may still lie behind the committed tokens
            kept = getattr(mine, name)[:, :, : state.length]
            torch.testing.assert_close(kept, getattr(theirs, name), atol=1e-4, rtol=0)


@pytest.mark.parametrize("builder", BUILDERS)
def test_both_caches_equal_a_fresh_prefill(builder: str) -> None:
    """A4 and A5: after many rounds, keys and values are those of the committed text alone."""
    target, drafter = Watched(MODEL), NetworkDrafter(perturbed(MODEL, 0.15))
    states = []
    start = drafter.start
    drafter.start = lambda ids: states.append(start(ids)) or states[-1]
    result = decode(target, drafter, PROMPTS[0], BUILDERS[builder](), max_new_tokens=20)
    assert any(r.accepted for r in result.rounds)
    assert target.text == [*PROMPTS[0], *result.tokens][: len(target.text)]
    assert_same_cache(target.state, TARGET.start(target.text))
    read = states[0].length  # the drafter may lag behind by accepted leaves it never read
    assert len(target.text) - 1 <= read <= len(target.text)
    assert_same_cache(states[0], drafter.lm.prefill(target.text[:read]))


class Reader(NetworkDrafter):
    """Reads two target layers and remembers what it was handed."""

    taps = (0, 1)

    def start(self, ids, features):
        self.seen = [features]
        return super().start(ids)

    def commit(self, state, path, features=None) -> None:
        if features is not None:
            self.seen.append(features)
        super().commit(state, path)


class EverySecond(Chain):
    """Drafts every second round only."""

    def build(self, propose, root, *, max_depth, context=0) -> Tree:
        self.rounds = getattr(self, "rounds", 0) + 1
        return super().build(propose, root, max_depth=max_depth * (self.rounds % 2), context=context)


@pytest.mark.parametrize("builder", ["chain", "best_first_7", "every_second"])
def test_features_handed_over_are_those_of_the_committed_text(builder: str) -> None:
    """A5: against the tapped layers of one plain pass, also for rounds without a draft."""
    drafter = Reader(perturbed(MODEL, 0.15))
    target = TargetRunner(MODEL, drafter.taps)
    make = BUILDERS.get(builder, EverySecond)
    result = decode(target, drafter, PROMPTS[2], make(), max_new_tokens=16)
    seen = torch.cat(drafter.seen)  # [N, L, H]
    text = [*PROMPTS[2], *result.tokens][: len(seen)]
    assert len(text) > len(PROMPTS[2]) + 8
    plain = TargetRunner(MODEL, drafter.taps)
    torch.testing.assert_close(seen, plain.features(plain.start(text)), atol=1e-4, rtol=0)
    with pytest.raises(ValueError, match=r"reads target layers \(0, 1\)"):
        decode(TARGET, drafter, PROMPTS[2])


# the drafter's side


def test_unread_tokens_are_read_first_in_the_next_round() -> None:
    """A full accept leaves one leaf unread; two rounds without a draft leave everything."""
    drafter = TableDrafter(random_distribution(6, 0, 3.0), 6)
    session = DraftSession(drafter, [1, 2], RealClock())
    tree = Chain(2).build(session, 3, max_depth=9)
    session.commit(tree, [0, 1, 2])
    session.commit(Tree.root_only(5), [0])
    logits = session([0], [-1])
    assert drafter.passes == [1, 1, 3]  # the leaf, the undrafted root, this root
    text = (1, 2, *tree.tokens, 5, 0)
    torch.testing.assert_close(logits[0].exp(), torch.tensor(random_distribution(6, 0, 3.0)(text)))
    session([4, 4], [0, 1])
    session.commit(Tree((0, 4, 4), (-1, 0, 1), (0.0,) * 3, (0, 1, 2)), [0, 1, 2])
    assert session([1], [-1])[0].exp().tolist() == pytest.approx(
        random_distribution(6, 0, 3.0)((*text, 4, 4, 1)), rel=1e-4
    )


# drafters that break


@pytest.mark.parametrize("builder", BUILDERS)
def test_nan_logits_cost_the_draft_not_the_text(builder: str, greedy_texts) -> None:
    drafter = BrokenDrafter(perturbed(MODEL, 0.15), lambda number: 3 <= number <= 4)
    with pytest.warns(RuntimeWarning, match="not finite.*text is unaffected") as caught:
        result = decode(TARGET, drafter, PROMPTS[0], BUILDERS[builder](), max_new_tokens=24)
    assert len(caught) == 1
    assert result.tokens == greedy_texts[0]
    assert 1 <= result.fallbacks <= 3
    assert any(r.accepted for r in result.rounds[result.fallbacks + 2 :])


@torch.inference_mode()
def test_a_failed_round_leaves_nothing_in_the_drafters_cache() -> None:
    """The pending token was read in the broken pass: it must be read again."""
    drafter = BrokenDrafter(MODEL, lambda number: number == 1)
    session = DraftSession(drafter, PROMPTS[0], RealClock())
    session.commit(Tree.root_only(5), [0])
    assert session([6], [-1]).isnan().all()
    session.abandon()
    session.commit(Tree.root_only(6), [0])
    plain = MODEL(torch.tensor([[*PROMPTS[0], 5, 6, 7]]), use_cache=False).logits[0, -1:]
    torch.testing.assert_close(session([7], [-1]), plain, atol=1e-4, rtol=0)


def test_a_drafter_of_nan_is_asked_ever_less_often(greedy_texts) -> None:
    drafter = BrokenDrafter(MODEL, lambda number: True)
    with pytest.warns(RuntimeWarning, match="not finite"):
        result = decode(TARGET, drafter, PROMPTS[0], max_new_tokens=24)
    assert result.tokens == greedy_texts[0]
    assert result.fallbacks == len(result.rounds) - 1  # the last round has nothing to draft for
    assert result.acceptance_length == 1
    assert len(drafter.passes) == 5  # rounds 1, 2, 4, 8, 16


def test_nan_weights_of_the_target_are_an_error() -> None:
    broken = TableTarget(lambda p: [math.nan] * V, V)
    for run in (
        lambda: decode(broken, DRAFTERS["good"], [1]),
        lambda: decode(broken, DRAFTERS["good"], [1], acceptor=SampleMatch()),
        lambda: greedy(broken, [1]),
    ):
        with pytest.raises(ValueError, match="target logits are not finite"):
            run()


def test_no_warning_without_cause() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(TARGET, DRAFTERS["good"], PROMPTS[0], max_new_tokens=4)


# bad input


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ([], {}, "empty"),
        ([1, V], {}, f"reach from 1 to {V}, .* {V} tokens"),
        ([-1], {}, "reach from -1"),
        ([1], {"max_new_tokens": 0}, "at least one"),
        ([1] * 100, {"max_new_tokens": 61}, "context overflow: 100 .* 61 .* 161, the target .* 160 .* 60"),
    ],
)
def test_impossible_requests_are_refused(prompt, options, message: str) -> None:
    for run in (
        lambda: decode(TARGET, DRAFTERS["good"], prompt, **options),
        lambda: greedy(TARGET, prompt, **options),
    ):
        with pytest.raises(ValueError, match=message):
            run()


def test_another_vocabulary_and_a_shorter_context_are_refused() -> None:
    with pytest.raises(ValueError, match="41 tokens, the target's 40"):
        decode(TARGET, GarbageDrafter(41), [1])
    short = GarbageDrafter(V)
    short.max_context = 50
    with pytest.raises(ValueError, match="the drafter reads at most 50"):
        decode(TARGET, short, [1] * 30, max_new_tokens=21)


def test_the_whole_context_can_be_used() -> None:
    assert len(decode(TARGET, DRAFTERS["good"], [1] * 100, max_new_tokens=60).tokens) == 60


def test_prompts_may_be_tensors(greedy_texts) -> None:
    result = decode(MODEL, DRAFTERS["good"], torch.tensor([PROMPTS[0]]), max_new_tokens=8)
    assert result.tokens == greedy_texts[0][:8]


def test_no_rounds_no_acceptance_length() -> None:
    with pytest.raises(ValueError, match="no rounds"):
        acceptance_length([])
