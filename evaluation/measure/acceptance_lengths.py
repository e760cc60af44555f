"""Acceptance lengths: tokens committed per target pass, acceptance by draft depth, and why rounds end.

The rounds come from real decoding (`bench`), or from replaying the target's recorded greedy text with the
drafter only, which gives the same rounds without running the target.

Axis letters: N prompts. τ = Σ tokens / Σ target passes over all prompts, bonus tokens included.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float
from numpy import ndarray
from torch import Tensor

from certdraft.decoding import Round, TreeBuilder, greedy_ranks, replay
from certdraft.evaluation.measure.statistics import pooled_ratio
from certdraft.evaluation.measure.trace_reading import Document, DrafterFeatures

_BINS = 8
_CAUSES = ("rounds", "rejected", "numerical_tie", "not_in_tree", "not_in_top_m", "unknown")


class ExpectedAccepted:
    """Expected and realised accepted draft tokens, over the rounds whose tree has an expectation.

    A tree expects the sum of its nodes' path probabilities under the drafter. Where that is below what is
    accepted, best-first trees spread too wide and cost-aware ones stop too early; above, the other way round.
    """

    def __init__(self) -> None:
        self.prompts: list[tuple[float, int]] = []  # Σ expected, Σ accepted of each prompt that has any
        self.rounds: list[tuple[float, int]] = []

    def add(self, rounds: Sequence[Round]) -> None:
        """Count the rounds of one prompt."""
        known = [(r.expected, r.accepted) for r in rounds if r.expected is not None and r.nodes]
        if known:
            self.rounds += known
            self.prompts.append((math.fsum(e for e, _ in known), sum(a for _, a in known)))

    def summary(self, seed: int = 0) -> dict[str, Any] | None:
        """Return means over rounds, accepted ÷ expected with an interval over prompts, and bins of equal
        counts by expectation; None without such rounds."""
        if not self.rounds:
            return None
        expected, accepted = (np.array(column, dtype=float) for column in zip(*self.rounds, strict=True))
        order = expected.argsort(kind="stable")
        parts = np.array_split(order, min(_BINS, max(1, len(order) // 10)))
        total_expected, total_accepted = (
            np.array(column, dtype=float) for column in zip(*self.prompts, strict=True)
        )
        return {
            "rounds": len(expected),
            "expected": float(expected.mean()),
            "accepted": float(accepted.mean()),
            "kept": vars(pooled_ratio(total_accepted, total_expected, seed=seed)),
            "bins": [
                {
                    "rounds": len(part),
                    "expected": float(expected[part].mean()),
                    "accepted": float(accepted[part].mean()),
                    "error": float(accepted[part].std() / math.sqrt(len(part))),
                }
                for part in parts
            ],
        }


@dataclass
class Lengths:
    """Rounds of one drafter and one builder over N prompts.

    Attributes:
        tokens: per prompt, tokens committed.
        passes: per prompt, target passes.
        groups: per prompt, what else it is pooled by.
        reached: per draft depth 1.., rounds whose tree is that deep and whose shallower tokens were accepted.
        accepted: per draft depth, rounds that accepted it.
        candidates: per draft depth, tokens that the trees of the rounds in `reached` offer.
        rejections: rounds that ended by a rejection, by cause; see `Lengths.add`.
        expected: expected and realised accepted draft tokens.
        nodes: draft tokens verified in all rounds.
    """

    tokens: list[int] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    groups: list[tuple[str, ...]] = field(default_factory=list)
    reached: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    candidates: list[int] = field(default_factory=list)
    rejections: dict[str, int] = field(default_factory=lambda: dict.fromkeys(_CAUSES, 0))
    expected: ExpectedAccepted = field(default_factory=ExpectedAccepted)
    nodes: int = 0

    def add(
        self,
        rounds: Sequence[Round],
        ranks: Sequence[int],
        lead: Sequence[float],
        top_m: int,
        tie_gap: float,
        groups: tuple[str, ...] = (),
    ) -> None:
        """Count one prompt.

        A round is rejected when its accepted path is shorter than its tree is deep. The cause is read off the
        token the target chose instead: *numerical tie* when the target itself leads by at most `tie_gap` nats
        there, *not in top-m* when the drafter ranks it below `top_m`, else *not in the tree*: the drafter
        ranked it high enough, but the tree has no node for it.

        Args:
            rounds: in order.
            ranks: rank of every committed token under the drafter, 0 = its first choice; used where a round
                does not know the rank itself. Empty: unknown.
            lead: the target's lead at every committed token, nats.
            top_m: drafter ranks that count as "in top-m".
            tie_gap: nats.
            groups: what else the prompt is pooled by.
        """
        self.tokens.append(sum(r.committed for r in rounds))
        self.passes.append(len(rounds))
        self.groups.append(groups)
        self.expected.add(rounds)
        done = 0
        for r in rounds:
            self.nodes += r.nodes
            while len(self.reached) < r.depth:
                for column in (self.reached, self.accepted, self.candidates):
                    column.append(0)
            for depth in range(1, min(r.committed, r.depth) + 1):
                self.reached[depth - 1] += 1
                self.accepted[depth - 1] += depth <= r.accepted
            for depth, offered in enumerate(r.candidates):
                self.candidates[depth] += offered
            self.rejections["rounds"] += 1
            at = done + r.accepted
            if r.accepted < r.depth and r.committed > r.accepted:
                rank = ranks[at] if r.bonus_rank is None and at < len(ranks) else r.bonus_rank
                self.rejections["rejected"] += 1
                self.rejections[_cause(rank, lead[at], top_m, tie_gap)] += 1
            done += r.committed

    def counts(self) -> tuple[ndarray, ndarray]:
        """Tokens and target passes per prompt, [N] each."""
        return np.array(self.tokens), np.array(self.passes)

    def summary(self, seed: int = 0) -> dict[str, Any]:
        """The JSON form; τ with an interval over prompts."""
        tokens, passes = self.counts()
        return {
            "prompts": len(tokens),
            "tokens": int(tokens.sum()),
            "target_passes": int(passes.sum()),
            "tau": vars(pooled_ratio(tokens, passes, seed=seed)),
            "per_request_mean": float(np.mean(tokens / passes)),
            "nodes_per_pass": self.nodes / int(passes.sum()),
            "depths": [
                {"depth": d, "reached": r, "accepted": a, "candidates": c / r if r else None}
                for d, (r, a, c) in enumerate(
                    zip(self.reached, self.accepted, self.candidates, strict=True), start=1
                )
            ],
            "rejections": dict(self.rejections),
            "promises": self.expected.summary(seed),
            "groups": [
                {
                    "group": name,
                    "prompts": len(at),
                    "tau": vars(pooled_ratio(tokens[at], passes[at], seed=seed)),
                }
                for name, at in members(self.groups).items()
            ],
        }


def _cause(rank: int | None, lead: float, top_m: int, tie_gap: float) -> str:
    if lead <= tie_gap:
        return "numerical_tie"
    if rank is None:
        return "unknown"
    return "not_in_top_m" if rank >= top_m else "not_in_tree"


def members(groups: Sequence[tuple[str, ...]]) -> dict[str, list[int]]:
    """Group → the prompts in it, in order of first appearance.

    Examples:
        >>> members([("a", "a: x"), ("a",), ()])
        {'a': [0, 1], 'a: x': [0]}
    """
    found: dict[str, list[int]] = {}
    for index, names in enumerate(groups):
        for name in names:
            found.setdefault(name, []).append(index)
    return found


def replay_lengths(
    drafter: Any,
    documents: Sequence[Document],
    builders: Mapping[str, TreeBuilder],
    *,
    top_m: int = 4,
    tie_gap: float = 1e-3,
    features: DrafterFeatures | None = None,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Lengths]:
    """Acceptance lengths of a drafter on recorded greedy texts, without the target.

    Args:
        drafter: any drafter.
        documents: prompts and greedy continuations.
        builders: label → tree builder; each starts afresh here.
        top_m: see `Lengths.add`.
        tie_gap: see `Lengths.add`.
        features: for a drafter that reads the target's layers; see `features_for`.
        progress: called after each document.

    Returns:
        label → rounds.
    """
    found = {label: Lengths() for label in builders}
    fresh_builders = {label: fresh(builder) for label, builder in builders.items()}
    for document in documents:
        ids = [*document.prompt, *document.text[:-1]]
        along = None if features is None else features.along(ids, document.index)
        ranks = ranks_of(drafter, document.prompt, document.text, along)
        for label, builder in fresh_builders.items():
            result = replay(drafter, document.prompt, document.text, builder, features=along)
            found[label].add(result.rounds, ranks, document.lead, top_m, tie_gap, document.groups)
        progress()
    return found


def fresh(builder: TreeBuilder) -> TreeBuilder:
    """Return a copy without learned state: a cost-aware tree starts again with each drafter."""
    made = copy.deepcopy(builder)
    if reset := getattr(made, "reset", None):
        reset()
    return made


def ranks_of(
    drafter: Any, prompt: Sequence[int], tokens: Sequence[int], features: Float[Tensor, "T L H"] | None
) -> list[int]:
    """Return the drafter's rank of each token given the text before it, 0 = its first choice.

    Empty for a drafter that drafts all depths in parallel: its ranks depend on where a round starts.
    """
    if drafter.kind != "conditional" or (features is not None and not hasattr(drafter, "paths")):
        return []
    return greedy_ranks(drafter, prompt, tokens, features)
