"""Normalise the loss by the global count of token positions, over ranks and accumulated batches.

Lightning averages the gradients of accumulated batches, so a token position of a batch with few of them in
the loss mask would weigh more than one of a full batch. Here each batch's mean is scaled to its sum, and
before the optimiser step the gradient is divided by the total weight.
"""

from __future__ import annotations

from collections.abc import Iterable

from torch import Tensor, nn


class Accumulation:
    """The batches of one optimiser step; see the module's header.

    Examples:
        >>> import torch
        >>> weight = nn.Parameter(torch.tensor(1.0))
        >>> group = Accumulation()
        >>> for values in (torch.tensor([1.0, 2.0, 3.0]), torch.tensor([10.0])):  # means 2 and 10
        ...     loss = group.scaled((weight * values).mean(), torch.tensor(float(len(values))), size=2)
        ...     (loss / 2).backward()  # as Lightning does it
        >>> group.settle([weight], size=2)
        >>> float(weight.grad)  # the mean of all four
        4.0
    """

    def __init__(self) -> None:
        self._counts: list[Tensor] = []

    def scaled(self, loss: Tensor, count: Tensor, size: int) -> Tensor:
        """The loss to run backward.

        Args:
            loss: mean of a batch over ranks and token positions.
            count: weight of its token positions, the mean over ranks.
            size: batches of an optimiser step; nothing changes for 1.
        """
        if size == 1:
            return loss
        self._counts.append(count.detach())
        return loss * self._counts[-1]

    def settle(self, parameters: Iterable[nn.Parameter], size: int) -> None:
        """Turn the accumulated gradient into that of the mean over all positions; call before clipping.

        Args:
            parameters: those with the gradient.
            size: as given to `scaled`; the last group of an epoch may hold fewer batches.
        """
        counts, self._counts = self._counts, []
        if not counts:
            return
        total = sum(counts[1:], counts[0])
        factor = size / total.clamp_min(1e-12)  # an empty loss mask: the gradient is zero anyway
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor.to(parameter.grad.dtype))

    def forget(self) -> None:
        """Drop what was accumulated, as a resumed run does."""
        self._counts = []
