"""Validation metrics of the user: averaged over positions, logged like the others, followed by best.ckpt."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from certdraft.certificates import Head
from certdraft.losses import TargetBatch
from certdraft.train import ValidationMetric, ValidationSettings
from certdraft.train.commands.cli import main
from certdraft.train.validation import ValidationSums

TARGET = TargetBatch(Head.from_probs(torch.tensor([[0.6, 0.4, 0.0], [0.1, 0.2, 0.7], [0.5, 0.3, 0.2]]), 3))
LOGITS = torch.tensor([[3.0, 1.0, 0.0], [3.0, 1.0, 0.0], [0.0, 2.0, 1.0]])


class Confidence(ValidationMetric):
    """The drafter's probability of its own first choice, where the target is surer than `above`."""

    def __init__(self, above: float = 0.0, name: str = "confidence") -> None:
        self.above, self.name = above, name

    def __call__(self, logits: Tensor, target: TargetBatch) -> Tensor:
        value = logits.softmax(-1).amax(-1)
        return torch.where(target.head.p[:, 0] > self.above, value, math.nan)


class Agreement(ValidationMetric):
    name = "agreement"

    def __call__(self, logits: Tensor, target: TargetBatch) -> Tensor:
        return logits.argmax(-1) == target.greedy


def test_a_metric_is_the_mean_over_positions_that_have_a_value() -> None:
    extra = (Confidence(), Confidence(0.55, "sure"), Confidence(0.9, "never"), Agreement())
    sums = ValidationSums(ValidationSettings(extra=extra))
    sums.add_steps(LOGITS[:1], TARGET[:1])
    sums.add_steps(LOGITS[1:], TARGET[1:])
    found = sums.metrics()
    top = LOGITS.softmax(-1).amax(-1)
    assert found["confidence"] == pytest.approx(float(top.mean()), rel=1e-6)
    assert found["sure"] == pytest.approx(float(top[:2].mean()), rel=1e-6)
    assert "never" not in found
    assert found["agreement"] == pytest.approx(1 / 3)
    doubled = sums.metrics(lambda total: 2 * total)  # what two ranks with the same data add up to
    assert doubled["confidence"] == pytest.approx(found["confidence"])


@pytest.mark.parametrize("name", ["", "two words", "coverage@2", "kl_nats", "low_margin_coverage@4"])
def test_names_that_cannot_be_logged_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=r"validation\.extra: .*name"):
        ValidationSettings(extra=(Confidence(name=name),))


def test_two_metrics_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match="'agreement' is taken"):
        ValidationSettings(extra=(Agreement(), Agreement()))


def test_a_metric_without_a_value_per_position_is_refused() -> None:
    class Mean(Agreement):
        def __call__(self, logits: Tensor, target: TargetBatch) -> Tensor:
            return super().__call__(logits, target).float().mean()

    sums = ValidationSums(ValidationSettings(extra=(Mean(),)))
    with pytest.raises(ValueError, match=r"agreement \(Mean\) returned shape \[\] for 3 token positions"):
        sums.add_steps(LOGITS, TARGET)


def test_a_metric_named_in_yaml_is_logged_exported_and_decides_what_is_best(
    settings: dict[str, Any], write: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "my_metrics", sys.modules[__name__])
    metric = {"class_path": "my_metrics.Confidence", "init_args": {"above": 0.2}}
    settings["model"]["validation"] = {"extra": [metric]}
    settings["checkpoint"]["monitor"] = "val/confidence"
    settings["trainer"]["max_steps"] = 4
    main(["fit", "--config", write(settings)])
    (folder,) = Path(settings["runs_dir"], "tiny").iterdir()
    assert "val/confidence" in (folder / "metrics.csv").read_text().splitlines()[0]
    best = torch.load(folder / "checkpoints" / "best.ckpt", weights_only=True)
    assert 0 < best["certdraft"]["metrics"]["confidence"] <= 1
