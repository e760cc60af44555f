"""DrafterModule: a drafter, a target and a loss under the Lightning Trainer.

Axis letters: R rows · T tokens · H hidden · N counted steps · V vocabulary.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor

from certdraft.data import Batch
from certdraft.drafters import Drafter
from certdraft.losses import (
    Chunked,
    HardCE,
    Loss,
    MarginDiscountedCE,
    OnlineTarget,
    StepWeights,
    TargetBatch,
    next_tokens,
    reduce,
)
from certdraft.train.fitting import fit_to_target
from certdraft.train.online import Online, TargetSettings
from certdraft.train.optim import OptimizerSettings
from certdraft.train.validation import ValidationSettings, ValidationSums

_ENTRIES_PER_CHUNK = 1 << 23  # of validation logits held at once


class DrafterModule(pl.LightningModule):
    """Trains a drafter on what a target says.

    The target is a trace (its head comes with every batch) or a model that is run beside the drafter. Only
    trainable weights enter checkpoints: with LoRA the adapters, and the base is loaded again on resuming.

    Args:
        drafter: the model that is trained.
        loss: per-step loss; `MarginDiscountedCE()` when not given.
        optimizer: learning rate, its schedule, weight decay.
        target: a model to run in the training step; a trace is read when not given.
        validation: which metrics are reported.
        chunk_tokens: steps whose logits exist at once; chosen by vocabulary and device when not given, 0 for
            all of them.
        step_weights: how much each step counts; all alike when not given.
    """

    def __init__(
        self,
        drafter: Drafter,
        loss: Loss | None = None,
        optimizer: OptimizerSettings = OptimizerSettings(),  # noqa: B008, frozen
        target: TargetSettings | None = None,
        validation: ValidationSettings = ValidationSettings(),  # noqa: B008, frozen
        chunk_tokens: int | None = None,
        step_weights: StepWeights | None = None,
    ) -> None:
        super().__init__()
        self.drafter = drafter
        self.loss = loss or MarginDiscountedCE()
        self.optimizer_settings, self.validation_settings = optimizer, validation
        whole = chunk_tokens == 0 or not hasattr(type(drafter), "head_weight")
        self.chunked = None if whole else Chunked(self.loss, chunk_tokens=chunk_tokens)
        self.step_weights = step_weights
        self._nll = Chunked(HardCE(), "none", chunk_tokens or None)
        # A plain object: the frozen target is no submodule, so it is in no checkpoint and no wrapper.
        self.online = None if target is None else Online(target)
        self._sums: ValidationSums | None = None

    # ---- steps

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        self.loss.at(self.global_step / max(self.trainer.max_steps, 1))

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        steps = batch.steps()
        hidden, target = self._hidden(batch, steps), self._target(batch, steps)
        weight = self._step_weight(batch, hidden, target)
        total = self._mean_count(len(steps) if weight is None else weight.sum())
        if self.chunked is not None:
            loss = self.chunked(
                hidden, self.drafter.head_weight, target, step_weight=weight, denominator=total
            )
        else:
            per_step = self.loss(self.drafter.head(hidden), target[:])
            loss = reduce(per_step, weight=weight, denominator=total)
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.log_dict({"train/loss_nats": loss, "train/lr": rate}, batch_size=1)
        return loss

    def on_validation_epoch_start(self) -> None:
        self._sums = ValidationSums(self.validation_settings, self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        assert self._sums is not None
        steps = batch.steps()
        hidden, target = self._hidden(batch, steps), self._target(batch, steps)
        hits = torch.zeros(batch.loss_mask.numel(), dtype=torch.bool, device=steps.device)
        size = max(1, _ENTRIES_PER_CHUNK // self.drafter.vocab_size)
        for start in range(0, len(steps), size):
            rows = slice(start, start + size)
            seen = target[rows]
            logits = self.drafter.head(hidden[rows]).float()
            hits[steps[rows]] = self._sums.add_steps(logits, seen.head, seen.logp)
        segments = torch.where(batch.loss_mask, batch.document_ids, -1)
        self._sums.add_rounds(hits.view_as(batch.loss_mask), segments)

    def on_validation_epoch_end(self) -> None:
        assert self._sums is not None
        metrics = self._sums.metrics(lambda sums: self.trainer.strategy.reduce(sums, reduce_op="sum"))
        self.log_dict({f"val/{name}": value for name, value in metrics.items()}, batch_size=1, sync_dist=True)
        self._sums = None

    # The test split reports the same numbers, under the same names.
    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()

    def configure_optimizers(self) -> Any:
        return self.optimizer_settings.build(self, self.trainer.max_steps)

    @torch.no_grad()
    def _step_weight(
        self, batch: Batch, hidden: Float[Tensor, "N H"], target: TargetBatch | OnlineTarget
    ) -> Float[Tensor, " N"] | None:
        if self.step_weights is None:
            return None
        nll = None
        if self.step_weights.needs_nll and self.chunked is not None:
            nll = self._nll(hidden, self.drafter.head_weight, target)
        elif self.step_weights.needs_nll:
            nll = HardCE()(self.drafter.head(hidden), target[:])
        return self.step_weights(target, batch.loss_mask, batch.document_ids, nll)

    def _mean_count(self, steps: int | Tensor) -> Tensor | None:
        """Counted steps (their weight) per rank: averaged gradients weigh the global batch's steps alike."""
        if self.trainer.world_size == 1:
            return None
        count = torch.as_tensor(steps, dtype=torch.float32, device=self.device)
        return self.trainer.strategy.reduce(count, reduce_op="mean")

    # ---- both models at the counted steps

    def _hidden(self, batch: Batch, steps: Int[Tensor, " N"]) -> Float[Tensor, "N H"]:
        hidden = self.drafter.hidden(batch.input_ids, batch.position_ids, batch.document_ids)
        return hidden.flatten(0, 1)[steps]

    def _target(self, batch: Batch, steps: Int[Tensor, " N"]) -> TargetBatch | OnlineTarget:
        labels = next_tokens(batch.input_ids, batch.document_ids).flatten()[steps]
        if self.online is not None:
            return replace(self.online.at(batch, steps), next_ids=labels)
        if batch.head is None:
            raise ValueError("the batches hold no head; give model.target, or data with recorded traces")
        return TargetBatch(batch.head[batch.loss_mask], next_ids=labels)

    # ---- set-up and checkpoints

    def setup(self, stage: str) -> None:
        """Fits the drafter to the target's vocabulary; refuses another one, or another tokenizer."""
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        fit_to_target(self.drafter, self.online, getattr(self.trainer, "datamodule", None), seed)
        if stage == "fit":
            self.drafter.train()  # a pretrained network arrives in eval mode, which Lightning would keep
        if self.online is not None:
            self.online.to(self.trainer.strategy.root_device)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state, frozen = checkpoint["state_dict"], self._frozen()
        checkpoint["state_dict"] = {name: value for name, value in state.items() if name not in frozen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        frozen = self._frozen()
        if missing := self.state_dict().keys() - frozen - checkpoint["state_dict"].keys():
            raise ValueError(
                f"the checkpoint lacks {len(missing)} of the drafter's trained weights, {min(missing)} for "
                "one; it was trained with another drafter or another LoRA setting"
            )
        self.strict_loading = not frozen

    def _frozen(self) -> set[str]:
        named = self.named_parameters(
            remove_duplicate=False
        )  # a tied head is saved with its embedding or not
        return {name for name, parameter in named if not parameter.requires_grad}
