"""Every step of an optimiser step weighs alike, over ranks and over accumulated batches.

Lightning averages the gradients of accumulated batches, so a step of a batch with few counted steps would
weigh more than one of a full batch. Here each batch's mean is scaled to its sum, and before the optimiser
steps the gradient is divided by the weight of all of them.
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
        """What to run backward.

        Args:
            loss: mean of a batch over ranks and steps.
            count: weight of its steps, the mean over ranks.
            size: batches of an optimiser step; nothing changes for 1.
        """
        if size == 1:
            return loss
        self._counts.append(count.detach())
        return loss * self._counts[-1]

    def settle(self, parameters: Iterable[nn.Parameter], size: int) -> None:
        """Makes the accumulated gradient that of the mean over all steps; call before clipping.

        Args:
            parameters: those with the gradient.
            size: as given to `scaled`; the last group of an epoch may hold fewer batches.
        """
        counts, self._counts = self._counts, []
        if not counts:
            return
        total = sum(counts[1:], counts[0])
        factor = size / total.clamp_min(1e-12)  # no counted step: the gradient is zero anyway
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(factor.to(parameter.grad.dtype))

    def forget(self) -> None:
        """Starts anew, as a resumed run does."""
        self._counts = []
