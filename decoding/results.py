"""What decoding leaves behind: the tokens, one record per round, and the numbers derived from them.

Acceptance length tau = tokens committed / target passes, pooled over rounds and texts, the bonus token
included; plain decoding has tau = 1. Every target pass after the prefill of the prompt counts, also the
passes of rounds without a draft; tokens cut off behind an end-of-sequence token do not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, slots=True)
class Round:
    """One target pass.

    Attributes:
        context: committed tokens before the round's root.
        nodes: draft tokens verified.
        depth: longest path of the tree.
        expected: accepted draft tokens the drafter expected (sum of its path probabilities); None where a
            replay does not know.
        accepted: draft tokens committed.
        committed: tokens committed, the bonus token included.
        draft_s: seconds inside the drafter.
        verify_s: seconds of the target pass and of reading its verdict.
        host_s: every other second of the round.
        bonus_rank: rank of the bonus token at its depth under a marginal drafter, 0 = its first choice; known
            to replays alone.
    """

    context: int
    nodes: int
    depth: int
    expected: float | None
    accepted: int
    committed: int
    draft_s: float = 0.0
    verify_s: float = 0.0
    host_s: float = 0.0
    bonus_rank: int | None = None

    @property
    def seconds(self) -> float:
        """Of the whole round."""
        return self.draft_s + self.verify_s + self.host_s


@dataclass(frozen=True)
class DecodeResult:
    """A decoded text.

    Attributes:
        tokens: the new tokens, an end-of-sequence token included.
        rounds: one record per target pass, in order.
        stopped: why decoding ended.
        prefill_s: seconds of both prefills.
        fallbacks: rounds decoded plainly because the drafter's logits were not finite.
    """

    tokens: list[int]
    rounds: list[Round]
    stopped: Literal["eos", "length"]
    prefill_s: float = 0.0
    fallbacks: int = 0

    @property
    def acceptance_length(self) -> float:
        """tau of this text, >= 1."""
        return acceptance_length([self])

    @property
    def accepted_per_round(self) -> float:
        """Mean accepted draft tokens per target pass; the bonus token is not counted."""
        return sum(r.accepted for r in self.rounds) / len(self.rounds)

    @property
    def seconds(self) -> float:
        """Of all rounds; the prefill is not counted."""
        return sum(r.seconds for r in self.rounds)


def acceptance_length(results: Iterable[DecodeResult]) -> float:
    """Pooled acceptance length tau: tokens committed / target passes over all texts, bonus tokens included.

    Raises:
        ValueError: no rounds.
    """
    tokens = passes = 0
    for result in results:
        tokens += sum(r.committed for r in result.rounds)
        passes += len(result.rounds)
    if not passes:
        raise ValueError("acceptance length of no rounds; decode at least one text")
    return tokens / passes
