"""The loss that suits the decoder a drafter is trained for, where a config names none."""

from __future__ import annotations

from typing import Literal, get_args

from certdraft.drafters import Drafter
from certdraft.losses import (
    LK,
    AdaptiveSharpenedKL,
    ForwardKL,
    HardCE,
    Loss,
    Mixture,
    RunnerUpForgivingCE,
    SharpenedKL,
)

Decoder = Literal["chain", "best-first", "m-ary", "sampling"]
DECODERS: tuple[Decoder, ...] = get_args(Decoder)
_CANDIDATES = [21, 3, 1]  # by depth, in best-first trees of 32 nodes of an EAGLE-3 head of SmolLM2-135M


def default_loss(decoder: Decoder, drafter: Drafter) -> Loss:
    """Return the loss for a decoder; docs/losses.md has the measurements behind the choice.

    Args:
        decoder: "chain", one draft token a position, as vLLM decodes; "best-first", a tree of a node budget;
            "m-ary", a tree of a fixed width; "sampling", verification by speculative sampling.
        drafter: one trained along draft paths takes candidates by depth for best-first trees.

    Raises:
        ValueError: another decoder.
    """
    if decoder == "chain":
        return _half(HardCE(), ForwardKL())
    if decoder == "best-first" and drafter.reads_target:
        return Mixture([RunnerUpForgivingCE(_CANDIDATES), AdaptiveSharpenedKL()], [0.1, 0.9])
    if decoder == "best-first":
        return _half(RunnerUpForgivingCE(4), SharpenedKL(1.5))
    if decoder == "m-ary":
        return _half(RunnerUpForgivingCE(8), ForwardKL())
    if decoder == "sampling":
        return LK()
    raise ValueError(f"decoder={decoder!r}: choose one of {', '.join(DECODERS)}")


def _half(first: Loss, second: Loss) -> Mixture:
    return Mixture([first, second], [0.5, 0.5])
