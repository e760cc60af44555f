"""The draft vocabulary: the tokens a drafter can propose, those that the target finds most probable.

An lm_head over the 32,000 most frequent of 150,000 tokens costs a fifth, and every greedy token outside them
is rejected for certain: their share is the *lost coverage*. Stored as engines read it: `d2t[i]` is an offset,
target id = i + d2t[i]; `t2d` marks the members.

Letters: V target vocabulary, D draft vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int, Shaped
from torch import Tensor

ABSENT = -1e4  # logit of a token outside the draft vocabulary: finite, so that no difference is nan


@dataclass(frozen=True)
class DraftVocabCoverage:
    """Share of the target's greedy tokens that a draft vocabulary lacks.

    Attributes:
        lost: share of token positions whose greedy token is outside, in [0, 1].
        steps: token positions counted.
        missed: the most frequent tokens outside, with their counts.
    """

    lost: float
    steps: int
    missed: tuple[tuple[int, int], ...]

    def __str__(self) -> str:
        worst = ", ".join(f"{token} ({count}×)" for token, count in self.missed)
        return f"{self.lost:.2%} of {self.steps:,} greedy tokens lost" + (
            f"; missed: {worst}" if worst else ""
        )


def choose(weight: Shaped[Tensor, " V"], size: int) -> Int[Tensor, " D"]:
    """Return the `size` tokens of the largest weight, ascending.

    The weight is the probability mass of a token over a trace, or how often it was the greedy token. Mass
    loses fewer greedy tokens of other text: runners-up here are greedy tokens elsewhere. Ties go to the lower
    id, which byte-pair merges made first.

    Examples:
        >>> choose(torch.tensor([5, 0, 7, 0, 1]), 3).tolist()
        [0, 2, 4]
    """
    if not 1 <= size <= len(weight):
        raise ValueError(f"draft_vocab_size is {size}; the target's vocabulary has {len(weight)} tokens.")
    return weight.sort(descending=True, stable=True).indices[:size].sort().values


def coverage(counts: Int[Tensor, " V"], ids: Int[Tensor, " D"]) -> DraftVocabCoverage:
    """Count the greedy tokens that a draft vocabulary lacks."""
    outside = counts.clone()
    outside[ids] = 0
    values, tokens = outside.topk(min(5, len(outside)))
    missed = tuple((t, c) for t, c in zip(tokens.tolist(), values.tolist(), strict=True) if c)
    total = int(counts.sum())
    return DraftVocabCoverage(int(outside.sum()) / max(total, 1), total, missed)


def to_tables(ids: Int[Tensor, " D"], vocab_size: int) -> tuple[Int[Tensor, " D"], Bool[Tensor, " V"]]:
    """`(d2t, t2d)` of ascending token ids.

    Examples:
        >>> d2t, t2d = to_tables(torch.tensor([0, 2, 4]), 5)
        >>> d2t.tolist(), t2d.tolist()
        ([0, 1, 2], [True, False, True, False, True])
    """
    t2d = torch.zeros(vocab_size, dtype=torch.bool)
    t2d[ids] = True
    return ids - torch.arange(len(ids)), t2d


def from_tables(d2t: Int[Tensor, " D"], t2d: Bool[Tensor, " V"] | None, vocab_size: int) -> Int[Tensor, " D"]:
    """Token ids of a stored draft vocabulary.

    Raises:
        ValueError: ids that are not ascending or leave the vocabulary, as absolute ids stored for offsets do;
            a `t2d` that marks others.
    """
    ids = d2t.long().cpu() + torch.arange(len(d2t))
    if not (bool((ids.diff() > 0).all()) and 0 <= int(ids[0]) and int(ids[-1]) < vocab_size):
        raise ValueError(
            f"d2t does not hold offsets into a vocabulary of {vocab_size}: i + d2t[i] must ascend within it, "
            f"it goes from {int(ids[0])} to {int(ids[-1])}. Absolute ids stored as offsets look like this."
        )
    if t2d is not None and not torch.equal(t2d.bool().cpu().nonzero().flatten(), ids):
        raise ValueError("d2t and t2d name different tokens; the checkpoint's draft vocabulary is broken.")
    return ids


def spread(
    logits: Float[Tensor, "*step D"], ids: Int[Tensor, " D"], vocab_size: int
) -> Float[Tensor, "*step V"]:
    """Draft logits over the whole vocabulary, `ABSENT` outside."""
    full = logits.new_full((*logits.shape[:-1], vocab_size), ABSENT)
    return full.index_copy(-1, ids, logits)
