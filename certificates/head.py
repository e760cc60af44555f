"""Head: the K most probable tokens of a distribution as logit gaps, and the mass that is left.

A head is what a trace stores. Everything is kept relative to the greedy token, `log p_k = −gap_k − lse_gap`,
so that margins near zero do not suffer cancellation: a gap of 1e-6 is as precise as a gap of 10.

Axis letters: *step leading axes · V vocabulary · K entries kept.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from certdraft.certificates.divergences import entropy
from certdraft.certificates.selection import largest, over_rows, select

_SUM_TOLERANCE = 1e-3  # of a row of probabilities


@dataclass(frozen=True, eq=False)
class Head:
    """The K largest probabilities of each step, with the log of everything else in `lse_gap`.

    Args:
        ids: token ids in descending probability; the first is the greedy token.
        gap: z(x0) − z_k ≥ 0, ascending, nats; the first is 0; +inf for probability zero.
        lse_gap: logsumexp(z) − z(x0) ≥ 0 over the whole vocabulary, nats; this is −log p(x0).
        vocab_size: V, the size of the vocabulary the head was cut from.
        entropy: H(p) over the whole vocabulary, nats; only the typical rule needs it.
    """

    ids: Int[Tensor, "*step K"]
    gap: Float[Tensor, "*step K"]
    lse_gap: Float[Tensor, "*step"]
    vocab_size: int
    entropy: Float[Tensor, "*step"] | None = None

    def __post_init__(self) -> None:
        if self.ids.shape != self.gap.shape or self.gap.shape[:-1] != self.lse_gap.shape:
            raise ValueError(
                f"a head needs ids and gap of one shape [*step, K] and lse_gap of shape [*step]; got "
                f"{list(self.ids.shape)}, {list(self.gap.shape)} and {list(self.lse_gap.shape)}"
            )
        if self.entropy is not None and self.entropy.shape != self.lse_gap.shape:
            raise ValueError(
                f"entropy has shape {list(self.entropy.shape)}, lse_gap {list(self.lse_gap.shape)}; "
                "they must agree"
            )
        if not 1 <= self.num_kept <= self.vocab_size:
            raise ValueError(
                f"a head of {self.num_kept} entries does not fit a vocabulary of {self.vocab_size}"
            )

    @property
    def num_kept(self) -> int:
        """K."""
        return self.gap.shape[-1]

    @property
    def shape(self) -> torch.Size:
        """The leading axes, *step."""
        return self.lse_gap.shape

    @property
    def device(self) -> torch.device:
        """Where the tensors live."""
        return self.gap.device

    @property
    def greedy(self) -> Int[Tensor, "*step"]:
        """The greedy token x0."""
        return self.ids[..., 0]

    @property
    def logp(self) -> Float[Tensor, "*step K"]:
        """Natural log-probabilities of the kept tokens, descending."""
        return -self.gap - self.lse_gap.unsqueeze(-1)

    @property
    def p(self) -> Float[Tensor, "*step K"]:
        """Probabilities of the kept tokens, descending."""
        return self.logp.exp()

    @property
    def tail_mass(self) -> Float[Tensor, "*step"]:
        """1 − Σ p over the kept tokens, in [0, 1]; 0 when nothing but rounding is left."""
        return tail_mass(self.gap, self.lse_gap, self.vocab_size)

    @property
    def tail_logp(self) -> Float[Tensor, "*step"]:
        """log of `tail_mass`; −inf when nothing is left."""
        return self.tail_mass.log()

    def __getitem__(self, index: Any) -> Head:
        """Index the leading axes: `head[mask]`, `head[3]`, `head[:, 1:]`."""
        keys = index if isinstance(index, tuple) else (index,)
        rows = (*keys, slice(None)) if any(key is Ellipsis for key in keys) else keys
        return self._each(lambda x: x[rows], lambda x: x[keys])

    def flatten(self) -> Head:
        """The same head with all leading axes merged into one."""
        return self._each(lambda x: x.reshape(-1, self.num_kept), lambda x: x.reshape(-1))

    def to(self, device: torch.device | str) -> Head:
        """The same head on another device."""
        return self._each(lambda x: x.to(device), lambda x: x.to(device))

    def _each(self, rows: Callable[[Tensor], Tensor], steps: Callable[[Tensor], Tensor]) -> Head:
        """The head with functions applied to its [*step, K] and to its [*step] tensors."""
        h = None if self.entropy is None else steps(self.entropy)
        return Head(rows(self.ids), rows(self.gap), steps(self.lse_gap), self.vocab_size, h)

    def truncate(self, k: int) -> Head:
        """The first k entries; what is cut joins the tail.

        Raises:
            ValueError: k outside 1..K.
        """
        if not 1 <= k <= self.num_kept:
            raise ValueError(f"cannot cut a head of {self.num_kept} entries to {k}")
        return Head(self.ids[..., :k], self.gap[..., :k], self.lse_gap, self.vocab_size, self.entropy)

    @classmethod
    def from_logits(cls, logits: Float[Tensor, "*step V"], k: int, check: bool = True) -> Head:
        """Cut a head from logits, in float32 unless they are float64.

        Args:
            logits: natural-log scores up to a constant; −inf marks an impossible token.
            k: entries to keep; more than V keeps V.
            check: refuse rows without finite logits, for which the host waits for a device. Without it such
                a row has an `lse_gap` that is not finite.

        Raises:
            ValueError: a row holds NaN or +inf, or no finite entry; the row is named.
        """
        vocab_size = logits.shape[-1]
        kept = min(k, vocab_size)
        ids, gap, lse_gap, entropy = over_rows(lambda z: _cut_logits(z, kept), logits)
        if check:
            _require(torch.isfinite(lse_gap), "logits", "holds NaN, +inf or nothing finite", lse_gap)
        return cls(ids, gap, lse_gap, vocab_size, entropy)

    @classmethod
    def from_probs(cls, p: Float[Tensor, "*step V"], k: int) -> Head:
        """Cut a head from probabilities; rows are taken as proportional to the distribution.

        Args:
            p: probabilities; each row must sum to 1 within 1e-3.
            k: entries to keep; more than V keeps V.

        Raises:
            ValueError: a row is no distribution; the row is named.
        """
        vocab_size = p.shape[-1]
        p = p if p.dtype == torch.float64 else p.float()
        values, ids = largest(p, min(k, vocab_size))
        require_distributions(p, values)
        top = values[..., :1].double()
        # float64 keeps every digit of a small gap between neighbours
        gap = -(values.double() / top).log().clamp_max(0.0)
        lse_gap = (mass_of_others(p, ids[..., :1]).double() / top.squeeze(-1)).log1p()
        return cls(ids, gap.to(p.dtype), lse_gap.to(p.dtype), vocab_size, entropy(p))


def margin(p: Float[Tensor, "*step V"] | Head) -> Float[Tensor, "*step"]:
    """γ = p(x0) − p(x1), in [0, 1]; 0 at a tie."""
    return order_margin(p, 1)


def order_margin(p: Float[Tensor, "*step V"] | Head, m: int) -> Float[Tensor, "*step"]:
    """γ_m = p(x0) − p(x(m)), the lead over the m-th best other token, in [0, 1].

    Args:
        p: target probabilities, or a head of them.
        m: which competitor, from 1 (the runner-up) to V − 1.

    Raises:
        ValueError: there is no such competitor in p, or in the head.
    """
    held = p.num_kept if isinstance(p, Head) else p.shape[-1]
    if not 1 <= m < held:
        what = "the head keeps" if isinstance(p, Head) else "p has"
        raise ValueError(f"order margin {m} needs {m + 1} tokens; {what} {held}")
    if isinstance(p, Head):
        return -(-p.gap[..., m]).expm1() * (-p.lse_gap).exp()
    values = select(p, m + 1)[0]
    return values[..., 0] - values[..., m]


def tail_mass(
    gap: Float[Tensor, "*step K"], lse_gap: Float[Tensor, "*step"], vocab_size: int
) -> Float[Tensor, "*step"]:
    """`Head.tail_mass` from its parts."""
    if gap.shape[-1] == vocab_size:
        return torch.zeros_like(lse_gap)
    # relative to p(x0): the 1 never meets the small numbers, so a confident step keeps its small tail
    kept = (-gap[..., 1:].double()).exp().sum(-1)
    others = lse_gap.double().expm1()
    rounding = 8 * torch.finfo(lse_gap.dtype).eps * others
    tail = torch.where(others - kept > rounding, others - kept, 0.0) * (-lse_gap.double()).exp()
    return tail.to(lse_gap.dtype)


def require_distributions(p: Float[Tensor, "*step V"], top: Float[Tensor, "*step K"]) -> None:
    """Raise ValueError, naming the first bad row, unless each sums to 1 within 1e-3.

    Args:
        p: the rows.
        top: their largest entries, descending; negative ones hide only below these.
    """
    if torch.compiler.is_compiling():
        return
    with torch.no_grad():
        total = p.sum(-1)
        _require((total - 1).abs() < _SUM_TOLERANCE, "p", "does not sum to 1", total)
        _require(top[..., -1] >= 0, "p", "holds a negative probability", top[..., -1])
        _require(top[..., 0] < 1 + _SUM_TOLERANCE, "p", "holds a probability above 1", top[..., 0])


def mass_of_others(p: Float[Tensor, "*step V"], token: Int[Tensor, "*step 1"]) -> Float[Tensor, "*step"]:
    """Σ p over all tokens but one, added up without it: small masses keep their digits."""
    return over_rows(lambda x, i: (x.scatter(-1, i, 0.0).sum(-1),), p, token)[0]


def _cut_logits(logits: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """ids, gap, lse_gap, entropy of a block of rows, [N, V] → [N, K], [N, K], [N], [N]."""
    z = logits if logits.dtype == torch.float64 else logits.float()
    values, ids = largest(z, k)
    top = values[:, :1]
    # Without the greedy token, log1p keeps a confident step's small tail. exp is 0 below −745: the floor
    # changes nothing but the product 0·inf.
    others = (z - top).clamp_min_(-1000.0).scatter_(-1, ids[:, :1], -1000.0)
    weight = others.exp()
    lse_gap = torch.log1p(weight.sum(-1)) + (top - top).squeeze(-1)  # NaN where the greedy logit is infinite
    mean_gap = -torch.linalg.vecdot(weight, others) * (-lse_gap).exp()
    return ids, top - values, lse_gap, lse_gap + mean_gap


def _require(good: Tensor, name: str, problem: str, seen: Tensor) -> None:
    """Raise unless every row is good, naming the first that is not and the value seen there."""
    if torch.compiler.is_compiling() or bool(good.all()):
        return
    row = (~good).nonzero()[0].tolist()
    count = f"{int((~good).sum())} of {good.numel()} rows"
    raise ValueError(
        f"{name}: row {row} {problem} (it gives {float(seen[tuple(row)]):g}); {count} are like it"
    )
