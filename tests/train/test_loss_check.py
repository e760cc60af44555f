"""Losses and step weights tried before a run: what is refused, what is let through, what stays untouched."""

from __future__ import annotations

import pytest
import torch

from certdraft import losses as L
from certdraft.train.loss_check import check_loss
from certdraft.train.target_outputs import TargetSettings


class EndOfText(L.HardCE):
    """A loss of a user's that knows the ids of a real vocabulary."""

    def forward(self, logits: torch.Tensor, target: L.TargetBatch) -> torch.Tensor:
        return super().forward(logits, target) + logits.log_softmax(-1)[:, 1000].exp()


def test_a_loss_of_another_package_is_not_tried() -> None:
    check_loss(EndOfText(), None, paths=False, num_kept=32)
    check_loss(L.Mixture([L.HardCE(), EndOfText()], [0.5, 0.5]), None, paths=False, num_kept=32)


def test_a_trace_of_the_whole_vocabulary_has_all_there_is() -> None:
    check_loss(L.RunnerUpForgivingCE(40), None, paths=False, num_kept=32, vocab_size=32)
    with pytest.raises(ValueError, match="needs the 40 most probable target tokens"):
        check_loss(L.RunnerUpForgivingCE(40), None, paths=False, num_kept=32)


def test_online_targets() -> None:
    weights = L.LowMarginWeights()
    with pytest.raises(ValueError, match="an online target has no margins"):
        check_loss(L.HardCE(), weights, paths=False, num_kept=None, online=TargetSettings())
    only_states = TargetSettings(logits=False)  # distributions come from the trace
    check_loss(L.HardCE(), weights, paths=True, num_kept=32, online=only_states)
    check_loss(L.ForwardKL(vocabulary="full"), None, paths=False, num_kept=None, online=TargetSettings())
    head_only = TargetSettings(full=False)
    with pytest.raises(ValueError, match="full"):
        check_loss(L.ForwardKL(vocabulary="full"), None, paths=False, num_kept=None, online=head_only)


def test_a_loss_that_measures_has_measured_nothing() -> None:
    loss = L.AdaptiveSharpenedKL().train()
    check_loss(loss, None, paths=True, num_kept=8)
    assert loss._measured is None
    assert loss.a == 1.0
