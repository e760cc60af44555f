"""Which token positions of packed rows belong to one draft path: counted, and in one document.

Axis letters: R rows · T tokens of a row · D draft depth.
"""

from __future__ import annotations

from jaxtyping import Bool, Int
from torch import Tensor
from torch.nn import functional


def path_mask(
    loss_mask: Bool[Tensor, "R T"], document_ids: Int[Tensor, "R T"], depth: int
) -> Bool[Tensor, "R T D"]:
    """True at depth d of the path from t where positions t to t + d all count and lie in one document.

    Args:
        loss_mask: true where the next token is to be learned.
        document_ids: −1 at padding.
        depth: D.
    """
    padded = functional.pad(document_ids.masked_fill(~loss_mask, -1), (0, depth - 1), value=-1)
    same = padded.unfold(1, depth, 1) == document_ids[..., None]
    return (same & (document_ids >= 0)[..., None]).cumprod(-1).bool()
