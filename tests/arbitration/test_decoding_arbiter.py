"""Arbitration: its two extremes, its equality with the simulator, and what it may never cost."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
import torch
from oracles.models.decoding_models import (
    BrokenDrafter,
    MarginalDrafter,
    NetworkDrafter,
    TableDrafter,
    TableTarget,
    perturbed,
    random_distribution,
    tiny_qwen3,
)
from torch import Tensor

from certdraft.arbitration import (
    FEATURES,
    Arbiter,
    ArbiterPolicy,
    Branches,
    Lockstep,
    LogRatio,
    RandomArbitration,
    TooManyBranches,
    TypicalAcceptance,
    load_policy,
    simulate,
)
from certdraft.arbitration.mismatch_features import NUM_STATIC, static_features
from certdraft.certificates import StrictGreedy, kl_divergence, radius
from certdraft.decoding import BestFirst, Chain, StaticTree, Strict, TargetRunner, decode, greedy

PROMPTS = [[3, 7, 1], [9, 9, 2, 30, 11], [17], [5, 0, 8, 21]]


class Script:
    """Decisions given in advance; strict when they run out."""

    def __init__(self, actions: Sequence[int]) -> None:
        self.actions = list(actions)

    def __call__(self, features: Tensor) -> Tensor:
        return torch.tensor([1.0 if self.actions and self.actions.pop(0) else -1.0 for _ in features])


@pytest.fixture(scope="module")
def pair():
    model = tiny_qwen3()
    return model, perturbed(model, 0.5)


class Moody:
    """Says yes and no about equally often, from the features alone."""

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def __call__(self, features: Tensor) -> Tensor:
        return torch.sin(5 * (features[:, 0] + self.seed))


def trained_policy(seed: int = 0, hidden: int = 8) -> ArbiterPolicy:
    """An arbitrary one."""
    torch.manual_seed(seed)
    policy = ArbiterPolicy(hidden)
    with torch.no_grad():
        for weight in policy.parameters():
            weight.copy_(torch.randn_like(weight))
        policy.mean.copy_(torch.randn(len(FEATURES)))
    return policy.eval()


# ---- extremes


@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("builder", [Chain(1), Chain(4), StaticTree((3, 2)), BestFirst(7, 3)], ids=repr)
def test_threshold_one_is_strict_decoding(pair, builder, look_ahead: bool) -> None:
    target, drafter = TargetRunner(pair[0]), NetworkDrafter(pair[1])
    for prompt in PROMPTS[:2]:
        arbiter = Arbiter(trained_policy(), threshold=1.0, look_ahead=look_ahead)
        ours = decode(target, drafter, prompt, builder, arbiter, 24)
        strict = decode(target, drafter, prompt, builder, Strict(), 24)
        assert ours.tokens == strict.tokens == greedy(target, prompt, 24)
        assert [r.committed for r in ours.rounds] == [r.committed for r in strict.rounds]
        assert arbiter.decisions
        assert not arbiter.overrides


@pytest.mark.parametrize("depth", [1, 3, 6])
def test_threshold_zero_with_look_ahead_is_the_drafters_own_text(pair, depth: int) -> None:
    target, drafter = TargetRunner(pair[0]), NetworkDrafter(pair[1])
    for prompt in PROMPTS[:2]:
        arbiter = Arbiter(lambda features: torch.full((len(features),), -200.0), 0.0, look_ahead=True)
        ours = decode(target, drafter, prompt, Chain(depth), arbiter, 22)
        assert ours.tokens == greedy(TargetRunner(pair[1]), prompt, 22)
        assert ours.tokens != greedy(target, prompt, 22)
        assert len(ours.rounds) == -(-22 // (depth + 1))


def test_without_look_ahead_the_bonus_is_the_targets(pair) -> None:
    target, drafter = TargetRunner(pair[0]), NetworkDrafter(pair[1])
    arbiter = Arbiter(lambda features: torch.ones(len(features)), 0.0)
    ours = decode(target, drafter, PROMPTS[0], Chain(2), arbiter, 12).tokens
    for end in (2, 5, 8):  # every third token follows a full window
        assert ours[end] == greedy(target, [*PROMPTS[0], *ours[:end]], 1)[0]
    assert arbiter.overrides


# ---- every committed token is one of two, and cuts are what costs passes


@pytest.mark.parametrize("look_ahead", [False, True])
def test_every_token_is_the_targets_or_the_drafters(pair, look_ahead: bool) -> None:
    target, drafter = TargetRunner(pair[0]), NetworkDrafter(pair[1])
    for seed, prompt in enumerate(PROMPTS[:3]):
        arbiter = Arbiter(Moody(seed), look_ahead=look_ahead)
        tokens = decode(target, drafter, prompt, Chain(4), arbiter, 16).tokens
        where = {decision.position: decision for decision in arbiter.decisions}
        for position, token in enumerate(tokens):
            prefix = [*prompt, *tokens[:position]]
            theirs, ours = greedy(target, prefix, 1)[0], greedy(TargetRunner(pair[1]), prefix, 1)[0]
            decision = where.get(position)
            if decision is None:
                assert token == theirs
            else:
                assert (decision.target, decision.draft) == (theirs, ours)
                assert token == (ours if decision.overridden else theirs)
                assert decision.overridden == (decision.log_odds > 0)


def test_fewer_cuts_never_mean_more_passes() -> None:
    """The same text, once with its mismatches overridden and once cut at each: §7.2's monotone rounds."""
    vocab = 5
    for seed in range(40):
        p, q = random_distribution(vocab, seed, 2.0), random_distribution(vocab, seed + 1, 2.0)
        arbiter = Arbiter(RandomArbitration(0.5, seed))
        length = 15 + seed % 7
        free = decode(TableTarget(p, vocab), TableDrafter(q, vocab), [0], Chain(3), arbiter, length)
        text = free.tokens

        def forced(prefix: tuple[int, ...], text=text, p=p) -> Sequence[float]:
            """A target whose greedy text is the arbitrated one."""
            row = [1e-3] * vocab
            row[text[len(prefix) - 1] if len(prefix) <= len(text) else 0] = 1.0
            return row

        strict = decode(TableTarget(forced, vocab), TableDrafter(q, vocab), [0], Chain(3), Strict(), length)
        assert strict.tokens == text
        # a token the drafter proposed is accepted there as well, so only overrides can differ: none is dearer
        assert len(free.rounds) <= len(strict.rounds)


def test_override_budget_counts_per_text(pair) -> None:
    target, drafter = TargetRunner(pair[0]), NetworkDrafter(pair[1])
    arbiter = Arbiter(lambda features: torch.ones(len(features)), override_budget=2)
    for prompt in PROMPTS[:2]:
        decode(target, drafter, prompt, Chain(4), arbiter, 30)
        assert arbiter.overrides == 2
        assert len(arbiter.decisions) > 2
    none = Arbiter(lambda features: torch.ones(len(features)), override_budget=0)
    assert decode(target, drafter, PROMPTS[0], Chain(4), none, 30).tokens == greedy(target, PROMPTS[0], 30)


# ---- the simulator


@pytest.mark.parametrize("look_ahead", [False, True])
@pytest.mark.parametrize("depth", [1, 3, 5])
def test_simulator_writes_what_windowed_decoding_writes(pair, depth: int, look_ahead: bool) -> None:
    target, drafter = TargetRunner(pair[0]), NetworkDrafter(pair[1])
    eos, length = {4, 13}, 17
    kinds = set()
    for seed in range(2):
        policy = Moody(seed)
        texts = simulate(
            Lockstep(pair[0]), Lockstep(pair[1]), PROMPTS, policy,
            depth=depth, max_new_tokens=length, eos=eos, look_ahead=look_ahead, override_budget=6,
        )  # fmt: skip
        for row, prompt in enumerate(PROMPTS):
            arbiter = Arbiter(policy, override_budget=6, look_ahead=look_ahead)
            windowed = decode(target, drafter, prompt, Chain(depth), arbiter, length, eos)
            made = arbiter.decisions
            # decisions behind an end-of-sequence token of the same round are made and thrown away
            made = [d for d in made if d.position < len(windowed.tokens)]
            assert texts.tokens[row] == windowed.tokens
            assert int(texts.passes[row]) == len(windowed.rounds)
            assert texts.actions()[row] == [int(d.overridden) for d in made]
            seen = texts.features[texts.row == row]
            torch.testing.assert_close(
                seen,
                torch.tensor([d.features for d in made]).reshape(-1, len(FEATURES)),
                atol=2e-4,
                rtol=1e-4,
            )
            kinds |= {(windowed.stopped, d.overridden) for d in made}
    assert len(kinds) >= 3  # both actions, and texts that end either way


def test_simulator_repeats_recorded_actions(pair) -> None:
    """Forced actions in the simulator, scripted ones in the window: same text. Copies draw on their own."""
    torch.manual_seed(5)
    models = Lockstep(pair[0]), Lockstep(pair[1])
    free = simulate(
        *models, PROMPTS, lambda f: torch.zeros(len(f)), depth=4, max_new_tokens=20, copies=3,
        threshold=None, look_ahead=True,
    )  # fmt: skip
    actions = free.actions()
    assert len({tuple(text) for text in free.tokens[:3]}) > 1
    width = max(map(len, actions))
    forced = torch.tensor([row + [-1] * (width - len(row)) for row in actions])
    again = simulate(
        *models, PROMPTS, lambda f: torch.full((len(f),), -9.0), depth=4, max_new_tokens=20, copies=3,
        look_ahead=True, forced=forced,
    )  # fmt: skip
    assert again.tokens == free.tokens
    assert again.passes.tolist() == free.passes.tolist()
    for row in (0, 4, 8, 11):
        arbiter = Arbiter(Script(actions[row]), look_ahead=True)
        windowed = decode(
            TargetRunner(pair[0]), NetworkDrafter(pair[1]), PROMPTS[row // 3], Chain(4), arbiter, 20
        )
        assert windowed.tokens == free.tokens[row]


@pytest.mark.parametrize("look_ahead", [False, True])
def test_a_table_of_branches_says_what_the_models_say(pair, look_ahead: bool) -> None:
    models = Lockstep(pair[0]), Lockstep(pair[1])
    settings = dict(depth=3, max_new_tokens=7, eos={4, 13}, copies=2, look_ahead=look_ahead)
    branches = Branches(*models, max_new_tokens=7, eos={4, 13})
    for seed in range(3):
        run = simulate(*models, PROMPTS, Moody(seed), **settings)
        read = simulate(*models, PROMPTS, Moody(seed), **settings, branches=branches)
        assert read.tokens == run.tokens
        assert read.passes.tolist() == run.passes.tolist()
        assert torch.equal(read.taken, run.taken)
        torch.testing.assert_close(read.features, run.features, atol=2e-4, rtol=1e-4)
        num = len(branches)
    assert len(branches) == num > 20
    with pytest.raises(TooManyBranches, match=r"texts\.branches"):
        Branches(*models, max_new_tokens=20, eos=(), most=3).roots(PROMPTS)


def test_simulator_refuses_nonsense(pair) -> None:
    models = Lockstep(pair[0]), Lockstep(pair[1])
    with pytest.raises(ValueError, match="needs prompts"):
        simulate(*models, [], trained_policy())
    with pytest.raises(ValueError, match="at least 1"):
        simulate(*models, PROMPTS, trained_policy(), depth=0)


# ---- by hand


def one_hot(token: int, mass: float, vocab: int = 4) -> list[float]:
    return [mass if i == token else (1 - mass) / (vocab - 1) for i in range(vocab)]


def test_an_override_goes_on_in_the_same_round() -> None:
    """Target says 1 always, drafter 2 then 1 1: one override makes one round of four tokens."""
    p = lambda prefix: one_hot(1, 0.7)  # noqa: E731
    q = lambda prefix: one_hot(2 if len(prefix) == 1 else 1, 0.9)  # noqa: E731
    arbiter = Arbiter(Script([1]))
    result = decode(TableTarget(p, 4), TableDrafter(q, 4), [0], Chain(3), arbiter, 4)
    assert result.tokens == [2, 1, 1, 1]
    assert [r.committed for r in result.rounds] == [4]
    (decision,) = arbiter.decisions
    assert (decision.position, decision.draft, decision.target, decision.overridden) == (0, 2, 1, True)


def test_in_a_tree_the_most_probable_child_is_the_draft_token() -> None:
    p = lambda prefix: one_hot(3, 0.7)  # noqa: E731
    q = lambda prefix: [0.1, 0.35, 0.5, 0.05]  # noqa: E731
    arbiter = Arbiter(Script([1, 0]))
    result = decode(TableTarget(p, 4), TableDrafter(q, 4), [0], StaticTree((2, 2)), arbiter, 3)
    assert result.tokens[:2] == [2, 3]
    assert [d.draft for d in arbiter.decisions] == [2, 2]


def test_parallel_drafters_are_arbitrated_too() -> None:
    p = lambda prefix: one_hot(1, 0.7)  # noqa: E731
    q = lambda prefix: [one_hot(2, 0.8), one_hot(1, 0.8), one_hot(3, 0.8)]  # noqa: E731
    arbiter = Arbiter(Script([1, 1]), look_ahead=True)
    result = decode(TableTarget(p, 4), MarginalDrafter(q, 4), [0], Chain(2), arbiter, 3)
    assert result.tokens == [2, 1, 3]  # the third row of the drafter is its look-ahead
    assert len(result.rounds) == 1


def test_rounds_without_a_draft_have_no_say(pair) -> None:
    drafter = BrokenDrafter(pair[1], lambda count: count in (2, 3, 6))
    arbiter = Arbiter(trained_policy(), threshold=1.0, look_ahead=True)
    with pytest.warns(RuntimeWarning, match="not finite"):
        result = decode(TargetRunner(pair[0]), drafter, PROMPTS[1], Chain(3), arbiter, 30)
    assert result.fallbacks
    assert result.tokens == greedy(pair[0], PROMPTS[1], 30)


def test_an_arbiter_that_heard_no_drafter_says_so(pair) -> None:
    from certdraft.decoding.trees.tree import Tree

    with pytest.raises(ValueError, match="listen"):
        Arbiter(trained_policy()).walk(Tree.root_only(1), torch.zeros(1, 40))


@pytest.mark.parametrize("threshold", [-0.1, 1.5])
def test_threshold_is_a_probability(threshold: float) -> None:
    with pytest.raises(ValueError, match="in \\[0, 1\\]"):
        Arbiter(trained_policy(), threshold)


# ---- features


def test_features_are_what_their_names_say() -> None:
    torch.manual_seed(1)
    z, w = 2 * torch.randn(6, 90), 2 * torch.randn(6, 90)
    x, y = w.argmax(-1), z.argmax(-1)
    seen = dict(zip(FEATURES[:NUM_STATIC], static_features(z, w, x, y).double().T, strict=True))
    p, q = z.double().softmax(-1), w.double().softmax(-1)
    rows = torch.arange(6)
    second = p.topk(2).values[:, 1]
    truth = {
        "target_logp": p[rows, y].log(),
        "target_log_ratio": (p[rows, y] / p[rows, x]).log(),
        "target_margin": p[rows, y] - second,
        "target_entropy": -(p * p.log()).sum(-1),
        "target_rank": torch.log1p((p > p[rows, x][:, None]).sum(-1).double()),
        "drafter_logp": q[rows, x].log(),
        "drafter_log_ratio": (q[rows, x] / q[rows, y]).log(),
        "drafter_entropy": -(q * q.log()).sum(-1),
        "radius": radius(p, StrictGreedy()),
    }
    for name, value in truth.items():
        torch.testing.assert_close(seen[name], value, atol=1e-4, rtol=1e-4, msg=name)
    full = kl_divergence(p, q)
    assert (seen["kl"] <= full + 1e-4).all()
    assert (seen["kl"] > 0.8 * full).all()  # 64 of 90 tokens and the rest as one
    mismatch = x != y
    assert (seen["kl"][mismatch] >= seen["radius"][mismatch] - 1e-4).all()


def test_features_of_saturated_logits_are_finite() -> None:
    z, w = torch.full((2, 40), -80.0), torch.full((2, 40), -90.0)
    z[:, 3], w[:, 5], w[1] = 80.0, 90.0, -torch.inf
    w[1, 5] = 0.0
    assert static_features(z, w, torch.tensor([5, 5]), torch.tensor([3, 3])).isfinite().all()


# ---- policies


def test_policy_survives_its_folder(tmp_path) -> None:
    policy = trained_policy()
    policy.standardise(torch.randn(50, len(FEATURES)) * 3 + 1)
    policy.save(tmp_path / "policy", {"note": "x"})
    features = torch.randn(7, len(FEATURES))
    assert torch.equal(load_policy(tmp_path / "policy")(features), policy(features))
    assert ArbiterPolicy(0)(features).shape == (7,)


def test_policy_starts_near_strict_decoding() -> None:
    odds = ArbiterPolicy(16, -2.0)(torch.randn(9, len(FEATURES)))
    assert torch.equal(odds, torch.full((9,), -2.0))


def test_a_policy_of_other_features_is_refused(tmp_path) -> None:
    trained_policy().save(tmp_path)
    settings = json.loads((tmp_path / "policy.json").read_text())
    settings["features"] = settings["features"][1:]
    (tmp_path / "policy.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="train it again"):
        load_policy(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"policy\.json"):
        load_policy(tmp_path / "nowhere")
    settings = {**settings, "features": list(FEATURES), "hidden": 3}
    (tmp_path / "policy.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match="does not fit"):
        load_policy(tmp_path)


def test_baselines_decide_as_defined() -> None:
    torch.manual_seed(2)
    z, w = 2 * torch.randn(300, 30), 2 * torch.randn(300, 30)
    x, y = w.argmax(-1), z.argmax(-1)
    features = torch.cat([static_features(z, w, x, y), torch.zeros(300, 3)], dim=-1)
    p = z.softmax(-1)
    px, py = (p.gather(-1, token[:, None])[:, 0] for token in (x, y))
    assert torch.equal(LogRatio(1.5)(features) > 0, (py / px).log() < 1.5)
    entropy = -(p * p.log()).sum(-1)
    typical = px > torch.minimum(torch.tensor(0.04), 0.2 * torch.exp(-entropy))
    assert torch.equal(TypicalAcceptance(0.04)(features) > 0, typical)
    rate = (RandomArbitration(0.3)(features) > 0).float().mean()
    assert 0.2 < float(rate) < 0.4
