"""Pre-training of a small target from scratch, as of the embedded one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch import Tensor

from certdraft.support import open_to_readers
from certdraft.train.optim import OptimizerSettings


class TargetModule(pl.LightningModule):
    """Next-token cross-entropy on a fresh Qwen3-architecture model.

    Learning rate: linear warm-up, then linear decay to zero at `trainer.max_steps`.

    Args:
        config: keys of `transformers.Qwen3Config`; a `vocab_size` above the tokenizer's leaves spare rows.
        lr: peak learning rate.
        warmup_steps: optimiser steps of linear warm-up.
        weight_decay: of matrices; norms and embeddings are not decayed.
        betas: of AdamW.
        export_dir: folder that the trained model and the data's tokenizer are written to, as transformers
            loads them.
    """

    def __init__(
        self,
        config: dict[str, Any],
        lr: float = 3e-3,
        warmup_steps: int = 100,
        weight_decay: float = 0.1,
        betas: tuple[float, float] = (0.9, 0.95),
        export_dir: str | None = None,
    ) -> None:
        super().__init__()
        from transformers import Qwen3Config, Qwen3ForCausalLM

        self.save_hyperparameters()
        self.model = Qwen3ForCausalLM(Qwen3Config(**config))
        self.optimizer_settings = OptimizerSettings(
            lr=lr, warmup_steps=warmup_steps, schedule="linear", weight_decay=weight_decay, betas=betas
        )
        self.export_dir = export_dir

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.model(input_ids=input_ids, use_cache=False).logits

    def _loss(self, batch: list[Tensor]) -> Tensor:
        ids, labels = batch[0], batch[-1]  # labels where some tokens are not learned (−100), else the ids
        logits = self(ids)[:, :-1]
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels[:, 1:].flatten())

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        loss = self._loss(batch)
        self.log("train/loss_nats", loss, prog_bar=True)
        return loss

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val/loss_nats", self._loss(batch), prog_bar=True, batch_size=len(batch[0]))

    def test_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("test/loss_nats", self._loss(batch), batch_size=len(batch[0]))

    def configure_optimizers(self) -> Any:
        return self.optimizer_settings.build(self, self.trainer.max_steps, fused=True)

    def on_fit_end(self) -> None:
        """Write `export_dir`."""
        if self.export_dir is None or not self.trainer.is_global_zero:
            return
        datamodule: Any = getattr(self.trainer, "datamodule", None)
        folder = Path(self.export_dir)
        self.model.save_pretrained(folder)
        datamodule.tokenizer().save_pretrained(folder)
        open_to_readers(folder)
