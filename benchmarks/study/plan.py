"""What the study compares: losses, drafters, budgets, learning rates, and the cells in the order they run.

Seed-major: all losses at seed 0 come before any at seed 1, so a study that is cut short still compares like
with like.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from certdraft.data import Corpus, Generation, Prompts, Recording
from certdraft.losses import (
    LK,
    BudgetWeights,
    CertificateHinge,
    ForwardKL,
    HardCE,
    Loss,
    LowMarginWeights,
    MarginDiscountedCE,
    Mixture,
    PoolDiscountedCE,
    RunnerUpForgivingCE,
    SharpenedKL,
    SoftTopK,
    StepWeights,
    TotalVariation,
)

LOSSES: dict[str, Callable[[], Loss]] = {
    "ce": HardCE,
    "ce+kl": lambda: Mixture([HardCE(), ForwardKL()], [0.5, 0.5]),
    "margin": MarginDiscountedCE,
    "sharp-2": lambda: SharpenedKL(2.0),
    "lk": LK,
    "tv+ce": lambda: Mixture([TotalVariation(), HardCE()], [0.9, 0.1]),
    "margin+kl": lambda: Mixture([MarginDiscountedCE(), ForwardKL()], [0.5, 0.5]),
    "margin+sharp-2": lambda: Mixture([MarginDiscountedCE(), SharpenedKL(2.0)], [0.5, 0.5]),
    "pool-4+kl": lambda: Mixture([PoolDiscountedCE(), ForwardKL()], [0.5, 0.5]),
    "runner-up-4+kl": lambda: Mixture([RunnerUpForgivingCE(), ForwardKL()], [0.5, 0.5]),
    "runner-up-4+sharp-2": lambda: Mixture([RunnerUpForgivingCE(), SharpenedKL(2.0)], [0.5, 0.5]),
    "runner-up-4+sharp-1.5": lambda: Mixture([RunnerUpForgivingCE(), SharpenedKL(1.5)], [0.5, 0.5]),
    "runner-up-8+kl": lambda: Mixture([RunnerUpForgivingCE(8), ForwardKL()], [0.5, 0.5]),
    "runner-up-16+kl": lambda: Mixture([RunnerUpForgivingCE(16), ForwardKL()], [0.5, 0.5]),
    # With the step weights below:
    "ce+kl, low": lambda: Mixture([HardCE(), ForwardKL()], [0.5, 0.5]),
    "runner-up-4+kl, low": lambda: Mixture([RunnerUpForgivingCE(), ForwardKL()], [0.5, 0.5]),
    "runner-up-8+kl, low": lambda: Mixture([RunnerUpForgivingCE(8), ForwardKL()], [0.5, 0.5]),
    "0.7 runner-up-4+kl": lambda: Mixture([RunnerUpForgivingCE(), ForwardKL()], [0.7, 0.3]),
    "pool-4+sharp-2": lambda: Mixture([PoolDiscountedCE(), SharpenedKL(2.0)], [0.5, 0.5]),
    "pool-4": PoolDiscountedCE,
    "budget-ce": HardCE,  # with the step weights below
    "kl": ForwardKL,
    "sharp-4": lambda: SharpenedKL(4.0),
    "runner-up-4": RunnerUpForgivingCE,
    "budget-margin": MarginDiscountedCE,
    "soft-top-10": SoftTopK,
    "hinge-4": CertificateHinge,
}
BASELINES = ("ce", "ce+kl", "lk", "tv+ce", "kl", "soft-top-10")
OURS = tuple(name for name in LOSSES if name not in BASELINES)
WEIGHTS: dict[str, Callable[[], StepWeights]] = {
    "budget-ce": BudgetWeights,
    "budget-margin": BudgetWeights,
    "ce+kl, low": LowMarginWeights,
    "runner-up-4+kl, low": LowMarginWeights,
    "runner-up-8+kl, low": LowMarginWeights,
}
BAR = ("ce", "ce+kl", "lk", "tv+ce")  # the baselines a claim has to beat

SIZES = {"1-layer": 1, "2-layer": 2}
TARGET_LAYERS = {"2-layer": (0, 7)}  # layers that the drafter starts from; the other starts fresh

SEEDS = (0, 1, 2)
# Learning rates, the likeliest first.
GRID = {"1-layer": (2e-3, 4e-3, 1e-3, 8e-3), "2-layer": (2e-3, 4e-3, 1e-3)}
CLOSE = 0.03  # coverage@4 by which a loss may trail the best one at the first rate and still be tuned further

SMALL, LARGE, DECAY = 150, 450, 0.2  # optimiser steps; the last fifth of each is the decay
FINE_TUNING = 100
WARMUP = 20
ROWS, SEQ_LEN = 4, 256
# Texts on which trees are replayed, of the validation split and, by size, of the test split; None: all.
REPLAYED = {"validation": 24, "1-layer": 72, "2-layer": None}

# What a finished cell says and the tuning table shows, by its name in the results.
SHOWN = (
    "coverage@1",
    "coverage@4",
    "low_margin_coverage@4",
    "tau/chain-4",
    "tau/4-ary",
    "tau/best-first-32",
)


@dataclass(frozen=True)
class Cell:
    """One training run.

    Attributes:
        stage: "tune" (small budget, validation split), "train" (both budgets, test split; "pick" looks at its
            large one on the validation split) or "fine-tune".
        size: key of `SIZES`.
        loss: key of `LOSSES`.
        lr: peak learning rate.
        seed: of initial weights and data order.
    """

    stage: str
    size: str
    loss: str
    lr: float
    seed: int

    @property
    def key(self) -> str:
        return f"{self.stage}/{self.size}/{self.loss}/{self.lr:g}/{self.seed}"


def recording(split: str, **changes: Any) -> Recording:
    """How the text of a split is recorded: training text and the target's own words, or these alone."""
    train = split == "train"
    settings: dict[str, Any] = {
        "corpus": Corpus(split=split),
        "prompts": Prompts(prompts_per_document=4 if train else 12),
        "generation": Generation(max_new_tokens=96, corpus_positions=train),
        "batch_size": 128,
    }
    return Recording(**settings | changes)
