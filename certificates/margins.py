"""Margins: how far ahead the greedy token is.

Axis letters: *step leading axes · V vocabulary.
"""

from __future__ import annotations

from jaxtyping import Float, Int
from torch import Tensor

from certdraft.certificates.head import Head
from certdraft.certificates.selection import select


def greedy_token(p: Float[Tensor, "*step V"] | Head) -> Int[Tensor, "*step"]:
    """x0 = argmax p; the lowest index at an exact tie."""
    return p.greedy if isinstance(p, Head) else p.argmax(-1)


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
