"""The environment that a policy is trained and measured in: arbitrated texts with verified answers.

An `ArbitrationEnv` holds a frozen target, a frozen drafter and a verifier. It writes texts under any policy,
under decisions given in advance, or along every possible path of decisions.

Letters: P problems · R texts, the copies of a problem side by side · N decisions · F features.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from certdraft.arbitration import (
    ASK,
    Branches,
    Policy,
    Problem,
    Rollouts,
    Sandbox,
    Stepper,
    simulate,
    verify_all,
)
from certdraft.arbitration.tasks.problems import Template, prompt_texts

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class ArbitrationSettings:
    """How texts are written.

    Args:
        depth: draft tokens per round.
        max_new_tokens: of each text.
        look_ahead: also arbitrate the bonus token; see `Arbiter`.
        override_budget: most draft tokens taken at mismatches of one text; None is no limit.
        texts_at_once: texts that share a pass.
        branches: for short answers: most branches per problem to explore once, after which texts of that
            problem cost no model pass; 0 runs the models every time.
        template: "none" takes problems as they stand; "chat" makes each the user's turn of a chat, by the
            target's chat template.
        system: "chat" only: the system's turn; the template's own, where it has one, when not given.
        thinking: "chat" only: value of `enable_thinking` for the template.

    Raises:
        ValueError: a system turn or thinking without a chat.
    """

    depth: int = 4
    max_new_tokens: int = 256
    look_ahead: bool = False
    override_budget: int | None = None
    texts_at_once: int = 1024
    branches: int = 0
    template: Template = "none"
    system: str | None = None
    thinking: bool = False

    def __post_init__(self) -> None:
        if self.template == "none" and (self.system is not None or self.thinking):
            raise ValueError("texts.system and texts.thinking are for chats; set texts.template to chat")


@dataclass(frozen=True)
class VerifiedTexts:
    """Texts and whether their answers are right.

    Attributes:
        rollouts: the texts and their decisions.
        right: the verifier's verdict on each.
    """

    rollouts: Rollouts
    right: Bool[Tensor, " R"]

    @property
    def num_tokens(self) -> Int[Tensor, " R"]:
        """New tokens of each text."""
        return torch.tensor([len(text) for text in self.rollouts.tokens])


def never(features: Float[Tensor, "N F"]) -> Float[Tensor, " N"]:
    """Log-odds of strict decoding: never take the draft token."""
    return torch.full(features.shape[:1], -torch.inf, device=features.device)


def always(features: Float[Tensor, "N F"]) -> Float[Tensor, " N"]:
    """Log-odds of following the drafter at every mismatch."""
    return torch.full(features.shape[:1], torch.inf, device=features.device)


class ArbitrationEnv:
    """A frozen target, a frozen drafter and a verifier.

    Args:
        target: frozen; `Lockstep(model)`.
        drafter: frozen; `Lockstep(model)` of a causal drafter.
        tokenizer: of both.
        settings: how texts are written.
        sandbox: limits on programs that the verifier runs.
        eos: tokens that end a text; the tokenizer's when not given.
    """

    def __init__(
        self,
        target: Stepper,
        drafter: Stepper,
        tokenizer: PreTrainedTokenizerBase,
        settings: ArbitrationSettings = ArbitrationSettings(),
        sandbox: Sandbox = Sandbox(),  # noqa: B008, frozen
        eos: Sequence[int] | None = None,
    ) -> None:
        self.target, self.drafter, self.tokenizer = target, drafter, tokenizer
        self.settings, self.sandbox = settings, sandbox
        self.eos = tuple(eos) if eos is not None else (int(tokenizer.eos_token_id),)
        self._branches = None
        if settings.branches:
            self._branches = Branches(
                target, drafter, max_new_tokens=settings.max_new_tokens, eos=self.eos,
                most=settings.branches, texts_at_once=settings.texts_at_once,
            )  # fmt: skip

    @torch.no_grad()
    def write(
        self,
        problems: Sequence[Problem],
        policy: Policy,
        *,
        copies: int = 1,
        threshold: float | None = 0.5,
        forced: Sequence[Sequence[int]] | None = None,
    ) -> VerifiedTexts:
        """Write texts for problems and verify their answers.

        Args:
            problems: what is asked.
            policy: decides at mismatches.
            copies: texts per problem.
            threshold: probability above which the draft token is taken; None draws.
            forced: the first decisions of each text, 1 to take the draft token; the policy makes the rest.
        """
        size = max(1, self.settings.texts_at_once // copies)
        parts = [
            self._rollouts(problems[start : start + size], policy, copies, threshold,
                           None if forced is None else forced[start * copies : (start + size) * copies])
            for start in range(0, len(problems), size)
        ]  # fmt: skip
        rollouts = _joined(parts)
        texts = self.tokenizer.batch_decode(rollouts.tokens, skip_special_tokens=True)
        asked = [problem for problem in problems for _ in range(copies)]
        return VerifiedTexts(rollouts, torch.tensor(verify_all(asked, texts, self.sandbox)))

    def flips(
        self,
        problems: Sequence[Problem],
        base: VerifiedTexts,
        policy: Policy,
        which: Sequence[tuple[int, int]],
    ) -> Bool[Tensor, " M"]:
        """Return verdicts with one decision of a text flipped and all later ones made by the policy.

        Args:
            problems: one per text of `base`.
            base: texts with their decisions.
            policy: makes the later decisions, without drawing.
            which: (text, number of the decision) of each of the M flips.
        """
        actions = base.rollouts.actions()
        forced = [[*actions[row][:index], 1 - actions[row][index]] for row, index in which]
        return self.write([problems[row] for row, _ in which], policy, forced=forced).right if which else (
            torch.zeros(0, dtype=torch.bool)
        )  # fmt: skip

    def any_path(
        self, problems: Sequence[Problem], max_paths: int = 256, known: Bool[Tensor, " P"] | None = None
    ) -> tuple[Bool[Tensor, " P"], int]:
        """Return whether some path of decisions gives a right answer: an upper bound of every policy.

        Every path is written once: paths are told apart by their decisions, each new one turns the last
        forced decision of its parent to the draft token and goes on strictly.

        Args:
            problems: what is asked.
            max_paths: most paths per problem; beyond it the ceiling is a lower bound.
            known: problems that some path is known to answer rightly; no path of them is written.

        Returns:
            The verdict per problem, and how many problems had more paths than were tried.
        """
        right = torch.zeros(len(problems), dtype=torch.bool) if known is None else known.clone()
        paths = [1] * len(problems)
        cut: set[int] = set()
        frontier: list[tuple[int, list[int]]] = [(row, []) for row in (~right).nonzero()[:, 0].tolist()]
        while frontier:
            verified = self.write(
                [problems[row] for row, _ in frontier], never, forced=[f for _, f in frontier]
            )
            following: list[tuple[int, list[int]]] = []
            for (row, _), verdict in zip(frontier, verified.right.tolist(), strict=True):
                right[row] |= verdict
            for (row, forced), actions in zip(frontier, verified.rollouts.actions(), strict=True):
                if right[row]:
                    continue
                for index in range(len(forced), len(actions)):
                    if paths[row] == max_paths:
                        cut.add(row)
                        break
                    paths[row] += 1
                    following.append((row, [*actions[:index], 1]))
            frontier = following
        return right, len([row for row in cut if not right[row]])

    def _rollouts(
        self, problems: Sequence[Problem], policy: Policy, copies: int, threshold: float | None,
        forced: Sequence[Sequence[int]] | None,
    ) -> Rollouts:  # fmt: skip
        settings, orders = self.settings, None
        texts = prompt_texts(
            problems, self.tokenizer, settings.template, settings.system, settings.thinking
        )  # fmt: skip
        prompts = self.tokenizer(texts, add_special_tokens=False)["input_ids"]
        if forced is not None:
            width = max(map(len, forced))
            orders = torch.tensor([[*row, *[ASK] * (width - len(row))] for row in forced], dtype=torch.long)
            orders = orders.view(len(forced), width)
        return simulate(
            self.target,
            self.drafter,
            prompts,
            policy,
            depth=settings.depth,
            max_new_tokens=settings.max_new_tokens,
            eos=self.eos,
            copies=copies,
            threshold=threshold,
            override_budget=settings.override_budget,
            look_ahead=settings.look_ahead,
            forced=orders,
            branches=self._branches,
        )


def branch_labels(
    env: ArbitrationEnv, problems: Sequence[Problem], policy: Policy, copies: int = 1
) -> tuple[Float[Tensor, "M F"], Bool[Tensor, " M"]]:
    """Decisions with the one of the two branches that leads to a right answer, where just one does.

    One decision of each text is picked at random (torch's generator); both of its branches are finished
    with the policy's most probable decisions.

    Args:
        env: writes and verifies texts.
        problems: what is asked.
        policy: draws the decisions in front, and finishes the branches.
        copies: texts per problem.

    Returns:
        Features of the decisions, and whether the draft token is the right one. Ties are left out.
    """
    drawn = env.write(problems, policy, copies=copies, threshold=None).rollouts
    counts = drawn.mismatches.cpu()
    rows = counts.nonzero()[:, 0]
    if not len(rows):
        return drawn.features[:0], torch.zeros(0, dtype=torch.bool)
    picked = (torch.rand(len(rows)) * counts[rows]).long()
    actions = drawn.actions()
    fronts = [actions[row][:index] for row, index in zip(rows.tolist(), picked.tolist(), strict=True)]
    asked = [problems[row // copies] for row in rows.tolist()]
    forced = [[*front, branch] for branch in (1, 0) for front in fronts]
    with_draft, without = env.write([*asked, *asked], policy, forced=forced).right.chunk(2)
    place = (counts.cumsum(0) - counts)[rows] + picked  # decisions are ordered by text, then by number
    told = with_draft != without
    return drawn.features[place.to(drawn.features.device)][told.to(drawn.features.device)], with_draft[told]


def _joined(parts: Sequence[Rollouts]) -> Rollouts:
    """Concatenate rollouts; texts are numbered through."""
    if len(parts) == 1:
        return parts[0]
    starts, start = [], 0
    for part in parts:
        starts.append(start)
        start += len(part.tokens)
    return Rollouts(
        [text for part in parts for text in part.tokens],
        *(
            torch.cat([getattr(part, name) for part in parts])
            for name in ("passes", "overrides", "mismatches")
        ),
        row=torch.cat([part.row + first for part, first in zip(parts, starts, strict=True)]),
        index=torch.cat([part.index for part in parts]),
        features=torch.cat([part.features for part in parts]),
        taken=torch.cat([part.taken for part in parts]),
    )
