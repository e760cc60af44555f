"""Comparison of a drafter with what its export loads as, by logits on fixed tokens."""

import torch
from torch import Tensor


def checked_logits(logits: Tensor) -> Tensor:
    """Return logits that are all finite.

    Raises:
        ValueError: some are not.
    """
    if not logits.isfinite().all():
        raise ValueError("the drafter's logits are not finite; its weights hold NaN or infinity.")
    return logits


def check_same_logits(expected: Tensor, found: Tensor) -> None:
    """Refuse an export that loads as another network.

    Raises:
        ValueError: logits that are not bit for bit equal.
    """
    if not torch.equal(expected, found):
        raise ValueError(
            "the drafter loaded from the export is not the one written: logits differ by up to "
            f"{(expected - found).abs().max().item():.2g}. A weight or a config key does not survive saving."
        )
