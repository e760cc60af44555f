"""Drafters that read the target, small enough to train in a test: their data, loss and a few steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from certdraft.data import TraceDataModule
from certdraft.drafters import (
    BlockConfig,
    BlockDrafter,
    Drafter,
    DSparkConfig,
    DSparkDrafter,
    EagleConfig,
    EagleDrafter,
)
from certdraft.train import DrafterModule


def data_of(tiny: Path, suffix: str = "-features", **more: Any) -> TraceDataModule:
    more = {"seq_len": 256, "batch_size": 4} | more
    data = TraceDataModule(str(tiny / f"train{suffix}"), str(tiny / f"validation{suffix}"), **more)
    data.setup()
    return data


def make(family: str, **changes: Any) -> Drafter:
    if family == "eagle":
        head = EagleConfig(target_layer_ids=(0,), draft_vocab_size=changes.pop("draft_vocab_size", None))
        return EagleDrafter(head, unroll=3, **changes)
    sizes = {"num_hidden_layers": 1, "target_layer_ids": (0,)}
    changes = {"num_anchors": 5} | changes
    if family == "dspark":
        return DSparkDrafter(DSparkConfig(**sizes, block_size=3, markov_rank=4), **changes)
    return BlockDrafter(BlockConfig(**sizes, block_size=4), **changes)


def loss_of(module: DrafterModule, batch: Any) -> float:
    """What a training step minimises, without a Trainer."""
    found: list[float] = []
    module.log_dict = lambda values, **_: found.append(values["train/loss_nats"].item())  # type: ignore[method-assign]
    optimizer = type("O", (), {"param_groups": [{"lr": 1.0}]})()
    trainer = {
        "world_size": 1, "accumulate_grad_batches": 1, "optimizers": [optimizer],
        "global_step": 0, "log_every_n_steps": 1,
    }  # fmt: skip
    module._trainer = type("T", (), trainer)()  # type: ignore[assignment]
    torch.manual_seed(11)  # of the anchors
    module.training_step(batch, 0)
    return found[0]


def wide(family: str) -> dict[str, int]:
    """Arguments with which validation drafts from every position."""
    return {} if family == "eagle" else {"num_anchors": 1000}


def learn(drafter: Drafter, batch: Any, steps: int = 25) -> list[float]:
    """A few steps on one batch: right now and then."""
    torch.manual_seed(3)
    optimizer = torch.optim.Adam(drafter.parameters(), 1e-2)
    losses = []
    for _ in range(steps):
        paths = drafter.paths(
            batch.input_ids, batch.position_ids, batch.document_ids, batch.loss_mask, batch.features
        )
        logits = drafter.head(paths.hidden[paths.mask])
        labels = batch.head.greedy.flatten()[paths.steps[paths.mask]]
        loss = torch.nn.functional.cross_entropy(logits, labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    drafter.eval()
    return losses
