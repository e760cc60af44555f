"""Training a policy: the policy gradient against enumeration, labels, ceilings, and what is learned."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from certdraft.arbitration import (
    FEATURES,
    ArbitrationEnv,
    ArbitrationSettings,
    Lockstep,
    Problem,
    branch_labels,
    measure_arbitration,
    never,
    simulate,
    summarise,
)
from certdraft.arbitration.arbiter_module import (
    RewardSettings,
    group_advantages,
    reinforce_loss,
    text_rewards,
)


class Table:
    """A `Stepper` that says which token follows a prefix, with a given confidence."""

    def __init__(self, follow: Callable[[tuple[int, ...]], int], vocab: int = 8, mass: float = 0.7) -> None:
        self.follow, self.vocab, self.mass = follow, vocab, mass

    def start(self, prompts: list[list[int]], copies: int) -> Tensor:
        self.texts = [tuple(prompt) for prompt in prompts for _ in range(copies)]
        return self._logits()

    def step(self, tokens: Tensor) -> Tensor:
        self.texts = [(*text, token) for text, token in zip(self.texts, tokens.tolist(), strict=True)]
        return self._logits()

    def keep(self, rows: Tensor) -> None:
        self.texts = [self.texts[row] for row in rows.tolist()]

    def _logits(self) -> Tensor:
        cache: dict[tuple[int, ...], int] = {}
        out = torch.full((len(self.texts), self.vocab), math.log((1 - self.mass) / (self.vocab - 1)))
        for row, text in enumerate(self.texts):
            if text not in cache:
                cache[text] = self.follow(text)
            out[row, cache[text]] = math.log(self.mass)
        return out


class Digits:
    """A tokenizer for tests: token i is the digit i; 0 ends a text."""

    eos_token_id = 0

    def __call__(self, texts: list[str], **_: object) -> dict[str, list[list[int]]]:
        return {"input_ids": [[int(character) for character in text] for text in texts]}

    def batch_decode(self, texts: list[list[int]], **_: object) -> list[str]:
        return ["".join(str(token) for token in text if token) for text in texts]


def two_mismatches(wanted: tuple[int, int], length: int = 3) -> tuple[ArbitrationEnv, list[Problem]]:
    """Target says 1 1 end, drafter 2 2 end; the right answer is one of the four combinations."""
    answer = "".join(str(1 + branch) for branch in wanted)
    target = Table(lambda text: 1 if len(text) < length else 0)
    drafter = Table(lambda text: 2 if len(text) < length else 0)
    settings = ArbitrationSettings(depth=4, max_new_tokens=4, look_ahead=True, texts_at_once=1 << 20)
    return ArbitrationEnv(target, drafter, Digits(), settings), [Problem("3", answer)]  # type: ignore[arg-type]


# ---- reinforcement learning, by enumeration (F4)


class ByPlace(torch.nn.Module):
    """Two weights: the log-odds of the first and of a later decision."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([0.4, -0.8]))

    def forward(self, features: Tensor) -> Tensor:
        later = (features[:, FEATURES.index("committed")] > 0).long()
        return self.weight[later]


@pytest.mark.parametrize("wanted", [(1, 1), (0, 1)])
def test_policy_gradient_is_the_enumerated_one(wanted: tuple[int, int]) -> None:
    env, problems = two_mismatches(wanted)
    policy = ByPlace()
    paths = list(itertools.product((0, 1), repeat=2))

    def mass(path: tuple[int, ...]) -> Tensor:
        chances = policy.weight.sigmoid()
        return torch.stack([p if a else 1 - p for a, p in zip(path, chances, strict=True)]).prod()

    expected = mass(wanted)
    assert float(sum(mass(path).detach() for path in paths)) == pytest.approx(1.0)
    (exact,) = torch.autograd.grad(expected, policy.weight)
    copies = 40_000
    drawn = env.write(problems, policy, copies=copies, threshold=None)
    assert abs(float(drawn.right.float().mean()) - float(expected.detach())) < 5e-3
    rewards = text_rewards(drawn, RewardSettings(0.0, 0.0, 0.0), 4)
    advantages = group_advantages(rewards.view(1, -1)).flatten()
    rollouts = drawn.rollouts
    loss = reinforce_loss(policy(rollouts.features), rollouts.taken, rollouts.row, advantages)
    (estimate,) = torch.autograd.grad(loss, policy.weight)
    torch.testing.assert_close(-estimate * rewards.std(), exact, rtol=0.02, atol=5e-4)


def test_groups_without_a_difference_teach_nothing() -> None:
    rewards = torch.tensor([[1.0, 1.0, 1.0], [0.0, 0.0, 0.0]])
    assert not group_advantages(rewards).any()
    odds = torch.zeros(4, requires_grad=True)
    taken, row = torch.tensor([True, False, True, False]), torch.tensor([0, 0, 1, 5])
    loss = reinforce_loss(odds, taken, row, group_advantages(rewards).flatten())
    loss.backward()
    assert not odds.grad.any()


def test_rewards_are_what_they_say() -> None:
    env, problems = two_mismatches((1, 1))
    verified = env.write(problems, lambda f: torch.ones(len(f)))
    assert verified.rollouts.tokens == [[2, 2, 0]]
    reward = text_rewards(verified, RewardSettings(speed=0.1, override_cost=0.25), depth=4)
    assert float(reward) == pytest.approx(1 + 0.1 * 3 / 5 - 0.25)


def test_entropy_bonus_is_the_entropy_of_a_coin() -> None:
    odds = torch.tensor([0.3, -2.0])
    none = reinforce_loss(odds, torch.tensor([True, False]), torch.tensor([0, 0]), torch.tensor([1.0]))
    bonus = reinforce_loss(odds, torch.tensor([True, False]), torch.tensor([0, 0]), torch.tensor([1.0]), 1.0)
    p = odds.double().sigmoid()
    entropy = -(p * p.log() + (1 - p) * (1 - p).log()).mean()
    assert float(none - bonus) == pytest.approx(float(entropy), abs=1e-6)


# ---- labels, paths and counterfactuals


def test_branch_labels_are_the_branch_that_is_right() -> None:
    """The right text is 1 2: the draft token is wrong at the first mismatch and right at the second."""
    env, problems = two_mismatches((0, 1))
    torch.manual_seed(0)
    features, labels = branch_labels(env, problems * 64, lambda f: torch.zeros(len(f)), copies=2)
    place = features[:, FEATURES.index("committed")] > 0
    # the first decision is only told apart when the second is then made rightly, which strict odds do not do
    assert labels[place].all()
    assert 20 < int(place.sum()) < 100


def test_any_path_finds_what_one_path_finds() -> None:
    for wanted in itertools.product((0, 1), repeat=2):
        env, problems = two_mismatches(wanted)
        assert env.any_path(problems)[0].tolist() == [True]
    env, _ = two_mismatches((0, 0))
    hopeless = [Problem("3", "33")]
    assert env.any_path(hopeless) == (torch.tensor([False]), 0)
    right, cut = env.any_path(hopeless, max_paths=3)
    assert (right.tolist(), cut) == ([False], 1)


def test_every_path_is_written_once() -> None:
    env, _ = two_mismatches((0, 0), length=5)
    texts: list[tuple[int, ...]] = []
    write = env.write

    def remember(*args: Any, **settings: Any) -> Any:
        verified = write(*args, **settings)
        texts.extend(map(tuple, verified.rollouts.tokens))
        return verified

    env.write = remember  # type: ignore[method-assign]
    env.settings = ArbitrationSettings(depth=2, max_new_tokens=8, look_ahead=True)
    env.any_path([Problem("3", "9")])
    assert len(texts) == len(set(texts)) == 2**4


def test_overrides_are_counted_by_what_they_did() -> None:
    """Right is 2 2: both overrides are needed; right is 1 1: turning one of two round is not enough."""
    always = lambda f: torch.ones(len(f))  # noqa: E731
    for wanted, effects in {(1, 1): (2, 0, 0), (0, 1): (0, 1, 1), (0, 0): (0, 0, 2)}.items():
        env, problems = two_mismatches(wanted)
        result = measure_arbitration(env, always, problems * 3, problems)
        policy = result.arms["policy"]
        assert (policy.beneficial, policy.harmful, policy.neutral) == tuple(3 * e for e in effects)
        assert result.any_path.all()
        assert result.arms["target"].right.all() == (wanted == (0, 0))
        assert result.arms["drafter"].right.all() == (wanted == (1, 1))
        assert result.agreement == {(1, 1): 1.0, (0, 1): 0.0, (0, 0): None}[wanted]
        summary = summarise([result, result])
        assert summary["arms"]["policy"]["beneficial overrides"] == 6 * effects[0]
        json.dumps(summary)


# ---- a run


# ---- what is learned (F2, F3), on models that take no training


def planted(noisy: bool) -> tuple[ArbitrationEnv, list[Problem]]:
    """Answers of two digits. The target is sure of odd places' digits; the drafter is, where it can help.

    Complementary: the drafter is right, and sure, where the target is wrong and unsure. Null: the drafter is
    wrong wherever it differs.
    """

    class Mixed(Table):
        def __init__(self, mine: bool) -> None:
            super().__init__(lambda text: 0)
            self.mine = mine

        def _logits(self) -> Tensor:
            out = torch.zeros(len(self.texts), self.vocab)
            for row, text in enumerate(self.texts):
                hard, place = text[0] % 2 == 1, len(text) - 2
                right = 0 if place >= 2 else 1 + (text[1] + place) % 4
                wrong = 1 + (right % 4) if place < 2 else 0
                able = (not hard) if not self.mine else (hard and not noisy)
                out[row, right if able or place >= 2 else wrong] = 6.0 if able or place >= 2 else 1.5
                if noisy and self.mine and not hard and text[1] % 3:
                    out[row] = 0
                    out[row, right] = 3.0  # mostly agrees with the target
            return out

    settings = ArbitrationSettings(depth=2, max_new_tokens=4, look_ahead=True, branches=64)
    problems = [
        Problem(f"{a}{b}", "".join(str(1 + (b + place) % 4) for place in range(2)), family=str(a % 2))
        for a in range(1, 8)
        for b in range(1, 8)
    ]
    return ArbitrationEnv(Mixed(False), Mixed(True), Digits(), settings), problems  # type: ignore[arg-type]


def learn(env: ArbitrationEnv, problems: list[Problem], steps: int = 60) -> Any:
    from certdraft.arbitration import ArbiterPolicy

    torch.manual_seed(0)
    policy = ArbiterPolicy(8, -1.0)
    policy.standardise(env.write(problems, never).rollouts.features)
    optimizer = torch.optim.Adam(policy.parameters(), lr=0.03)
    for step in range(steps):
        if step < steps // 3:
            features, labels = branch_labels(env, problems, policy, copies=2)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(policy(features), labels.float())
        else:
            drawn = env.write(problems, policy, copies=8, threshold=None)
            rewards = text_rewards(drawn, RewardSettings(), 2)
            advantages = group_advantages(rewards.view(-1, 8)).flatten()
            rollouts = drawn.rollouts
            loss = reinforce_loss(policy(rollouts.features), rollouts.taken, rollouts.row, advantages, 0.003)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return policy


def test_training_finds_complementary_skill() -> None:
    env, problems = planted(noisy=False)
    policy = learn(env, problems)
    target, ours = (env.write(problems, each).right.float().mean() for each in (never, policy))
    assert target < 0.5
    assert ours == 1.0


def test_training_leaves_the_target_alone_where_there_is_nothing_to_gain() -> None:
    env, problems = planted(noisy=True)
    target = env.write(problems, never)
    verified = env.write(problems, learn(env, problems))
    assert verified.rollouts.mismatches.sum() >= 12
    assert verified.rollouts.overrides.sum() == 0
    assert verified.right.tolist() == target.right.tolist()


def test_lockstep_pads_on_the_left_without_a_trace() -> None:
    from oracles.models.decoding_models import tiny_qwen3

    model = tiny_qwen3()
    prompts = [[3, 7, 1, 4], [9], [5, 5]]
    together = Lockstep(model).start(prompts, 2)
    alone = torch.cat([Lockstep(model).start([prompt], 2) for prompt in prompts])
    torch.testing.assert_close(together, alone, atol=2e-4, rtol=1e-4)
    assert simulate(Lockstep(model), Lockstep(model), prompts, never).mismatches.sum() == 0
