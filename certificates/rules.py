"""Acceptance rules: which draft tokens the target lets through.

Every single-token rule accepts the greedy token, and any other token whose probability is *strictly* above a
threshold; a tie is a rejection. `Coverage` is the rule of a draft tree: the greedy token must be among the
drafter's m best.

Sources: arXiv 2606.30265 §4 (rules, strictness); published decoders use other constants, so none is a default
here. Axis letters: *step leading axes · V vocabulary · K entries of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from certdraft.certificates.divergences import entropy
from certdraft.certificates.head import Head
from certdraft.certificates.selection import select

# Head probabilities are rebuilt from rounded logarithms: closer to the threshold than this counts as a tie.
HEAD_TIE = 1e-6


class _SingleToken:
    """What the single-token rules share: accepted = greedy, or strictly above the threshold."""

    def threshold_from(
        self, top: Float[Tensor, "*step K"], entropy: Float[Tensor, "*step"] | None, vocab_size: int
    ) -> Float[Tensor, "*step"]:
        """The threshold, from the largest probabilities in descending order and the entropy."""
        raise NotImplementedError

    def threshold(self, p: Float[Tensor, "*step V"] | Head) -> Float[Tensor, "*step"]:
        """Probability that a token other than the greedy one must exceed; negative when every token passes.

        Args:
            p: target probabilities, or a head of them.

        Raises:
            ValueError: the typical rule meets a head without entropy.
        """
        rank = self.m if isinstance(self, TopM) else 1
        if isinstance(p, Head):
            return self.threshold_from(p.truncate(min(rank, p.num_kept)).p, p.entropy, p.vocab_size)
        rank = min(rank, p.shape[-1])
        h = entropy(p) if isinstance(self, Typical) else None
        return self.threshold_from(select(p, rank)[0], h, p.shape[-1])

    def accepts(
        self, p: Float[Tensor, "*step V"] | Head, token: Int[Tensor, "*step"]
    ) -> Bool[Tensor, "*step"]:
        """Whether the target accepts this draft token.

        Args:
            p: target probabilities, or a head of them.
            token: one draft token a step.

        Returns:
            True only when acceptance is certain: of a token outside a head nothing is known, unless the
            threshold is negative and everything passes.

        Raises:
            ValueError: the shape of token is not that of the steps.
        """
        step = p.shape if isinstance(p, Head) else p.shape[:-1]
        if token.shape != step:
            raise ValueError(
                f"token has shape {list(token.shape)} and the steps of p have {list(step)}; they must agree"
            )
        theta = self.threshold(p)
        if isinstance(p, Head):
            held = (p.ids == token.unsqueeze(-1)) & self.accepted_entries(p)
            return held.any(-1) | (theta < -HEAD_TIE)
        chosen = p.gather(-1, token.unsqueeze(-1)).squeeze(-1)
        return (token == p.argmax(-1)) | (chosen > theta)

    def accepted_entries(self, p: Float[Tensor, "*step V"] | Head) -> Bool[Tensor, "*step V"]:
        """The accepted set as a mask over the vocabulary, or over the entries of a head.

        Args:
            p: target probabilities, or a head of them.
        """
        theta = self.threshold(p)
        if isinstance(p, Head):
            count = self.num_accepted(p, theta)
            return torch.arange(p.num_kept, device=p.device) < count.unsqueeze(-1)
        greedy = p.argmax(-1, keepdim=True)
        return (p > theta.unsqueeze(-1)) | (torch.arange(p.shape[-1], device=p.device) == greedy)

    def num_accepted(self, head: Head, theta: Float[Tensor, "*step"]) -> Int[Tensor, "*step"]:
        """How many entries of a head are certainly accepted at this threshold, 1 to K: the first ones.

        Args:
            head: target head.
            theta: its threshold.
        """
        limit = (-theta.clamp_min(0.0).log() - head.lse_gap) * (1 - HEAD_TIE) - HEAD_TIE
        count = torch.searchsorted(head.gap.contiguous(), limit.unsqueeze(-1)).squeeze(-1)
        return torch.where(theta < -HEAD_TIE, head.num_kept, count.clamp_min(1))


@dataclass(frozen=True)
class StrictGreedy(_SingleToken):
    """Accept the greedy token and nothing else, as lossless greedy decoding does (arXiv 2606.30265, 4.7)."""

    def threshold_from(
        self, top: Float[Tensor, "*step K"], entropy: Float[Tensor, "*step"] | None, vocab_size: int
    ) -> Float[Tensor, "*step"]:
        """p(x0): nothing is strictly above it."""
        return top[..., 0]

    def __str__(self) -> str:
        return "strict"


@dataclass(frozen=True)
class Additive(_SingleToken):
    """Accept y when p(y) > p(x0) − t (arXiv 2606.30265, Thm 4.10).

    Args:
        t: probability given away, in [0, 1]; 0 is strict greedy.
    """

    t: float

    def __post_init__(self) -> None:
        _check_fraction("Additive", "t", self.t)

    def threshold_from(
        self, top: Float[Tensor, "*step K"], entropy: Float[Tensor, "*step"] | None, vocab_size: int
    ) -> Float[Tensor, "*step"]:
        """p(x0) − t; negative when every token passes."""
        return top[..., 0] - self.t

    def __str__(self) -> str:
        return f"additive(t={self.t:g})"


@dataclass(frozen=True)
class Multiplicative(_SingleToken):
    """Accept y when p(y) > α p(x0) (arXiv 2606.30265, Thm 4.12).

    Args:
        alpha: fraction of the greedy token's probability, in [0, 1]; 1 is strict greedy.
    """

    alpha: float

    def __post_init__(self) -> None:
        _check_fraction("Multiplicative", "alpha", self.alpha)

    def threshold_from(
        self, top: Float[Tensor, "*step K"], entropy: Float[Tensor, "*step"] | None, vocab_size: int
    ) -> Float[Tensor, "*step"]:
        """α p(x0)."""
        return self.alpha * top[..., 0]

    def __str__(self) -> str:
        return f"multiplicative(alpha={self.alpha:g})"


@dataclass(frozen=True)
class TopM(_SingleToken):
    """Additive or multiplicative, and above the target's m-th token (arXiv 2606.30265, Thm 4.14).

    The m-th token itself fails, so at most m − 1 tokens are accepted: m ≤ 2 is strict greedy.

    Args:
        m: rank that must be beaten, ≥ 1; rank 1 is the greedy token.
        t: probability given away, in [0, 1].
        alpha: fraction of p(x0), in [0, 1]; exactly one of t and alpha.
    """

    m: int
    t: float | None = None
    alpha: float | None = None

    def __post_init__(self) -> None:
        _check_rank("TopM", self.m)
        if (self.t is None) == (self.alpha is None):
            raise ValueError(f"TopM takes exactly one of t and alpha; got t={self.t} and alpha={self.alpha}")
        if self.t is not None:
            _check_fraction("TopM", "t", self.t)
        if self.alpha is not None:
            _check_fraction("TopM", "alpha", self.alpha)

    @property
    def relaxation(self) -> Additive | Multiplicative:
        """The rule without its rank test."""
        return Additive(self.t) if self.t is not None else Multiplicative(self.alpha or 0.0)

    def threshold_from(
        self, top: Float[Tensor, "*step K"], entropy: Float[Tensor, "*step"] | None, vocab_size: int
    ) -> Float[Tensor, "*step"]:
        """max(p(x0) − t or α p(x0), p of the m-th token).

        A head shorter than m lends its last entry: the threshold is then too high, never too low.
        """
        base = self.relaxation.threshold_from(top, entropy, vocab_size)
        if self.m > vocab_size:
            return base
        return torch.maximum(base, top[..., min(self.m, top.shape[-1]) - 1])

    def __str__(self) -> str:
        slack = f"t={self.t:g}" if self.t is not None else f"alpha={self.alpha:g}"
        return f"topm(m={self.m}, {slack})"


@dataclass(frozen=True)
class Typical(_SingleToken):
    """Accept y when p(y) > min(ε, δ exp(−H(p))) (arXiv 2606.30265, Thm 4.15).

    The paper uses ε = 0.1, δ = 0.09; the Medusa code ε = 0.09, δ = 0.3. H is in nats.

    Args:
        epsilon: highest threshold, in [0, 1].
        delta: scale of the entropy threshold, ≥ 0.
    """

    epsilon: float
    delta: float

    def __post_init__(self) -> None:
        _check_fraction("Typical", "epsilon", self.epsilon)
        _check_number("Typical", "delta", self.delta, float("inf"), "0 or more and finite")

    def threshold_from(
        self, top: Float[Tensor, "*step K"], entropy: Float[Tensor, "*step"] | None, vocab_size: int
    ) -> Float[Tensor, "*step"]:
        """min(ε, δ exp(−H(p)))."""
        if entropy is None:
            raise ValueError(
                f"{self} needs the entropy of p, and this head was stored without; record it in `entropy`"
            )
        return (self.delta * (-entropy).exp()).clamp_max(self.epsilon)

    def __str__(self) -> str:
        return f"typical(epsilon={self.epsilon:g}, delta={self.delta:g})"


@dataclass(frozen=True)
class Coverage:
    """The greedy token is among the drafter's m best: the rule of a tree of width m (arXiv 2606.30265, Thm
    5.1).

    Args:
        m: width, ≥ 1; 1 is strict greedy.
    """

    m: int

    def __post_init__(self) -> None:
        _check_rank("Coverage", self.m)

    def accepts(
        self, p: Float[Tensor, "*step V"] | Head, q: Float[Tensor, "*step V"]
    ) -> Bool[Tensor, "*step"]:
        """Whether the target's greedy token is in the drafter's top-m, ties against.

        Args:
            p: target probabilities, or a head of them.
            q: drafter probabilities, log-probabilities or logits: only their order matters.
        """
        greedy = p.greedy if isinstance(p, Head) else p.argmax(-1)
        own = q.gather(-1, greedy.unsqueeze(-1))
        return (q >= own).sum(-1) <= self.m  # the greedy token itself is one of them

    def __str__(self) -> str:
        return f"coverage(m={self.m})"


SingleTokenRule = StrictGreedy | Additive | Multiplicative | TopM | Typical
Rule = SingleTokenRule | Coverage


def _check_number(rule: str, name: str, value: float, top: float, what: str) -> None:
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if not number or not 0.0 <= value <= top or value == float("inf"):
        raise ValueError(f"{rule}: {name}={value!r} must be a number, {what}")


def _check_fraction(rule: str, name: str, value: float) -> None:
    _check_number(rule, name, value, 1.0, "from 0 to 1")


def _check_rank(rule: str, m: int) -> None:
    if isinstance(m, bool) or not isinstance(m, int) or m < 1:
        raise ValueError(f"{rule}: m={m!r} must be a whole number, 1 or more")
