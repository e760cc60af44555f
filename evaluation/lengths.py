"""Acceptance lengths: how many tokens a target pass commits, depth by depth, and why rounds end.

The rounds come from real decoding (`bench`) or from replaying the target's recorded greedy text with the
drafter alone, which gives the same rounds without the target: a tight τ for a fraction of the time.

Axis letters: N prompts. τ = Σ tokens / Σ target passes over all prompts, bonus tokens included.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy import ndarray

from certdraft.decoding import DecodeResult, Round, TreeBuilder, greedy_ranks, replay
from certdraft.evaluation.reading import Document
from certdraft.evaluation.statistics import pooled_ratio


@dataclass
class Lengths:
    """Rounds of one drafter and one builder over N prompts.

    Attributes:
        tokens: per prompt, tokens committed.
        passes: per prompt, target passes.
        reached: per draft depth 1.., rounds whose tree is that deep and whose shallower tokens were accepted.
        accepted: per draft depth, rounds that accepted it.
        rejections: rounds that ended by a rejection, by cause; see `Lengths.add`.
        nodes: draft tokens verified in all rounds.
    """

    tokens: list[int] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    reached: list[int] = field(default_factory=list)
    accepted: list[int] = field(default_factory=list)
    rejections: dict[str, int] = field(
        default_factory=lambda: {
            "rounds": 0,
            "rejected": 0,
            "numerical_tie": 0,
            "not_in_tree": 0,
            "not_in_top_m": 0,
        }  # fmt: skip
    )
    nodes: int = 0

    def add(
        self, rounds: Sequence[Round], ranks: Sequence[int], lead: Sequence[float], top_m: int, tie_gap: float
    ) -> None:
        """Count one prompt.

        A round is rejected when its accepted path is shorter than its tree is deep. The cause is read off the
        token the target chose instead: *numerical tie* when the target itself leads by at most `tie_gap` nats
        there, *not in top-m* when the drafter ranks it below `top_m`, else *not in the tree*: the drafter had
        it, the tree did not spend a node on it.

        Args:
            rounds: in order.
            ranks: rank of every committed token under the drafter, 0 = its first choice; empty: causes
                unknown.
            lead: the target's lead at every committed token, nats.
            top_m: drafter ranks that count as "had it".
            tie_gap: nats.
        """
        self.tokens.append(sum(r.committed for r in rounds))
        self.passes.append(len(rounds))
        done = 0
        for r in rounds:
            self.nodes += r.nodes
            while len(self.reached) < r.depth:
                self.reached.append(0)
                self.accepted.append(0)
            for depth in range(1, min(r.accepted + 1, r.depth) + 1):
                self.reached[depth - 1] += 1
                self.accepted[depth - 1] += depth <= r.accepted
            self.rejections["rounds"] += 1
            at = done + r.accepted
            if r.accepted < r.depth and r.committed > r.accepted and at < len(ranks):
                self.rejections["rejected"] += 1
                if lead[at] <= tie_gap:
                    self.rejections["numerical_tie"] += 1
                elif ranks[at] >= top_m:
                    self.rejections["not_in_top_m"] += 1
                else:
                    self.rejections["not_in_tree"] += 1
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
                {"depth": d, "reached": r, "accepted": a}
                for d, (r, a) in enumerate(zip(self.reached, self.accepted, strict=True), start=1)
            ],
            "rejections": dict(self.rejections),
        }


def replay_lengths(
    drafter: Any,
    documents: Sequence[Document],
    builders: Mapping[str, TreeBuilder],
    *,
    top_m: int = 4,
    tie_gap: float = 1e-3,
    progress: Callable[[], None] = lambda: None,
) -> dict[str, Lengths]:
    """Acceptance lengths of a drafter on recorded greedy texts, without the target.

    Args:
        drafter: a conditional drafter with `hidden` and `head`.
        documents: prompts and greedy continuations.
        builders: label → tree builder.
        top_m: see `Lengths.add`.
        tie_gap: see `Lengths.add`.
        progress: called after each document.

    Returns:
        label → rounds.
    """
    found = {label: Lengths() for label in builders}
    for document in documents:
        ranks = greedy_ranks(drafter, document.prompt, document.text)
        for label, builder in builders.items():
            result = replay(drafter, document.prompt, document.text, builder)
            found[label].add(result.rounds, ranks, document.lead, top_m, tie_gap)
        progress()
    return found


def ranks_of(drafter: Any, prompt: Sequence[int], result: DecodeResult) -> list[int]:
    """Rank of each decoded token under the drafter; empty where it does not read text left to right."""
    return greedy_ranks(drafter, prompt, result.tokens) if drafter.kind == "conditional" else []
