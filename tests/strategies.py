"""Hypothesis strategies for distributions with ties, point masses, zeros and near-ties, drawn on purpose."""

import numpy as np
import torch
from hypothesis import strategies as st

from certdraft.certificates import Additive, Coverage, Multiplicative, Rule, StrictGreedy, TopM, Typical

DIRECTIONS = ("forward", "reverse")
RULES = (
    StrictGreedy(),
    Additive(0.1),
    Additive(0.4),
    Multiplicative(0.5),
    Multiplicative(0.05),
    TopM(4, t=0.1),
    TopM(3, alpha=0.2),
    Typical(0.1, 0.09),
    Typical(0.3, 0.6),
    Coverage(1),
    Coverage(3),
)


def dirichlet(concentration: float, size: int, count: int) -> torch.Tensor:
    """Distributions [count, size], float64; a low concentration gives confident ones."""
    alpha = torch.full((size,), concentration, dtype=torch.float64)
    return torch.distributions.Dirichlet(alpha).sample((count,))


# Few values, so that exact ties are common; zeros; and scales far apart.
_WEIGHTS = st.one_of(
    st.sampled_from([0.0, 1.0, 1.0, 2.0, 3.0, 8.0]),
    st.floats(1e-6, 1.0),
    st.floats(-30.0, 3.0).map(lambda x: float(np.exp(x))),
)
_NEAR = st.sampled_from([0.0, 1e-9, 1e-6, 1e-4, 1e-2])


@st.composite
def distributions(draw: st.DrawFn, min_size: int = 1, max_size: int = 12) -> torch.Tensor:
    """Probability vectors [V], float64, in any order."""
    size = draw(st.integers(min_size, max_size))
    kind = draw(st.sampled_from(["any", "any", "near-tie", "point", "flat"]))
    if kind == "flat":
        weights = [1.0] * size
    elif kind == "point":
        weights = [0.0] * size
        weights[draw(st.integers(0, size - 1))] = 1.0
    else:
        weights = draw(st.lists(_WEIGHTS, min_size=size, max_size=size))
        if max(weights) <= 1e-12:
            weights[draw(st.integers(0, size - 1))] = 1.0
    if kind == "near-tie" and size > 1:  # the runner-up moves next to the greedy token
        first, second = np.argsort(weights)[::-1][:2]
        weights[second] = weights[first] * (1 - draw(_NEAR))
    p = torch.tensor(weights, dtype=torch.float64)
    return p / p.sum()


def single_token_rules() -> st.SearchStrategy[Rule]:
    """Every rule that looks at one draft token, with constants from the whole range."""
    share = st.one_of(st.sampled_from([0.0, 0.1, 0.5, 1.0]), st.floats(0.0, 1.0))
    rank = st.integers(1, 8)
    return st.one_of(
        st.just(StrictGreedy()),
        st.builds(Additive, share),
        st.builds(Multiplicative, share),
        st.builds(lambda m, t: TopM(m, t=t), rank, share),
        st.builds(lambda m, a: TopM(m, alpha=a), rank, share),
        st.builds(Typical, share, st.floats(0.0, 1.5)),
    )


def rules() -> st.SearchStrategy[Rule]:
    """All acceptance rules."""
    return st.one_of(single_token_rules(), st.builds(Coverage, st.integers(1, 6)))


def directions() -> st.SearchStrategy[str]:
    """Both KL directions."""
    return st.sampled_from(["forward", "reverse"])
