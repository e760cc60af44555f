"""Schedules, the data token and step weights reach the training step from a configuration."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from certdraft.data import TraceDataModule
from certdraft.drafters import CausalDrafter
from certdraft.losses import BudgetWeights, HardCE, TokenCE, reduce
from certdraft.train import DrafterModule
from certdraft.train.commands.cli import main
from certdraft.train.target_outputs import recorded


def test_a_run_with_a_ramp_and_a_budget(settings: dict[str, Any], write: Callable[..., str]) -> None:
    settings["trainer"] |= {"max_steps": 2, "limit_val_batches": 0}
    losses = [{"class_path": "TokenCE"}, {"class_path": "MarginDiscountedCE"}]
    settings["model"]["loss"] = {
        "class_path": "Ramp",
        "init_args": {"losses": losses, "start": [1.0, 0.0], "stop": [0.0, 1.0]},
    }
    settings["model"]["step_weights"] = {
        "class_path": "certdraft.losses.BudgetWeights",
        "init_args": {"node_budget": 16, "depth": 3},
    }
    main(["fit", "--config", write(settings)])


def test_the_training_loss_is_the_weighted_mean_of_its_steps(tiny: Path) -> None:
    data = TraceDataModule(str(tiny / "train"), str(tiny / "validation"), seq_len=256, batch_size=4)
    data.setup()
    batch = next(iter(data.val_dataloader()))
    drafter = CausalDrafter(pretrained=str(tiny / "target"))
    weights, seen = BudgetWeights(16, 3), []
    for chunk_tokens in (7, 0):
        module = DrafterModule(drafter, TokenCE(), chunk_tokens=chunk_tokens, step_weights=weights).eval()
        module.log_dict = lambda values, **_: None  # type: ignore[method-assign, assignment]
        rates = type("O", (), {"param_groups": [{"lr": 1.0}]})
        facts = {"accumulate_grad_batches": 1, "global_step": 0, "log_every_n_steps": 10}
        module._trainer = type("T", (), {"world_size": 1, "optimizers": [rates], **facts})()
        seen.append(module.training_step(batch, 0))
    steps = batch.steps()
    target = recorded(batch, (), ()).at(steps)
    logits = drafter.logits(batch.input_ids, batch.position_ids, batch.document_ids).flatten(0, 1)[steps]
    nll = HardCE()(logits, target).detach()
    weight = weights(target, batch.loss_mask, batch.document_ids, nll)
    assert weight.std() > 0
    expected = reduce(TokenCE()(logits, target), weight=weight)
    torch.testing.assert_close(torch.stack(seen), expected.expand(2), rtol=1e-5, atol=1e-6)
