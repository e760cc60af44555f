"""DrafterModule: a drafter, a target and a loss under the Lightning Trainer.

Axis letters: H hidden · N draft positions in the loss mask · V vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytorch_lightning as pl
import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from certdraft.certificates import StrictGreedy, radius
from certdraft.data import Batch
from certdraft.drafters import Drafter, Paths
from certdraft.losses import (
    LK,
    Chunked,
    Loss,
    OnlineTarget,
    StepWeights,
    TargetBatch,
    reduce,
)
from certdraft.train.accumulation import Accumulation
from certdraft.train.default_loss import Decoder, default_loss
from certdraft.train.drafter_setup import fit_to_target
from certdraft.train.on_policy import OnPolicySettings, Rounds, check_on_policy, write_rounds
from certdraft.train.optim import OptimizerSettings, check_precision, gradient_norm
from certdraft.train.restricted_target import DraftVocabulary
from certdraft.train.sharding import shard
from certdraft.train.target_outputs import Online, TargetOutputs, TargetSettings, recorded
from certdraft.train.validation import ValidationSettings, ValidationSums, first_choice

_ENTRIES_PER_CHUNK = {"cpu": 1 << 23, "cuda": 1 << 27}  # of validation logits held at once
_AVOIDABLE = 0.1  # nats: a rejection with a KL radius above it counts as avoidable


class DrafterModule(pl.LightningModule):
    """Train a drafter on the distributions of a target.

    The target is a trace (its top-k logits come with every batch) or a model run beside the drafter. Only
    trainable weights enter checkpoints: with LoRA the adapters, and the base is loaded again on resuming.

    Args:
        drafter: the model that is trained.
        loss: loss per token position; when not given the one for `decoder`.
        optimizer: learning rate, its schedule, weight decay.
        target: a model to run in the training step; a trace is read when not given.
        validation: which metrics are reported.
        chunk_tokens: token positions whose logits exist at once; chosen by vocabulary and device when not
            given, 0 for all of them.
        step_weights: weight of each token position; all equal when not given.
        on_policy: let the drafter write ends of documents itself; the running target judges them. None: all
            text is the data's.
        decoder: what the drafter is trained for: "chain", "best-first" trees of a node budget, "m-ary" trees
            of a fixed width, or "sampling"; it chooses the loss where none is given (`default_loss`). None:
            "chain".

    Raises:
        ValueError: another decoder; `on_policy` with a drafter that reads hidden states, or without a
            running target.
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
        on_policy: OnPolicySettings | None = None,
        decoder: Decoder | None = None,
    ) -> None:
        super().__init__()
        if on_policy is not None:
            check_on_policy(drafter, target)
        self.drafter = drafter
        chosen = default_loss(decoder or "chain", drafter)  # refuses another decoder
        self.loss = loss or chosen
        self.decoder = None if loss else decoder or "chain"
        self.unread_decoder = decoder if loss else None
        self.optimizer_settings, self.validation_settings = optimizer, validation
        whole = chunk_tokens == 0 or not hasattr(type(drafter), "head_weight")
        self.chunked = None if whole else Chunked(self.loss, chunk_tokens=chunk_tokens)
        self.step_weights, self.on_policy = step_weights, on_policy
        self._nll = Chunked((step_weights or StepWeights()).nll_loss, "none", chunk_tokens or None)
        self._overlap = Chunked(LK("alpha"), "none", chunk_tokens or None)
        # A plain object, not a submodule: the frozen target is in no checkpoint and no wrapper.
        self.online = None if target is None else Online(target)
        self.vocabulary: DraftVocabulary | None = None
        self._layers: Sequence[int] = ()  # whose outputs the trace holds
        self._sums: ValidationSums | None = None
        self._accumulation = Accumulation()
        self._gradients_checked = False

    # ---- training

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        progress = self.global_step / max(self.trainer.max_steps, 1)
        self.loss.at(progress)
        self.drafter.at(progress)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        batch, rounds = self._with_rounds(batch)
        paths, outputs = self._paths(batch)
        hidden, steps = paths.hidden[paths.mask], paths.steps[paths.mask]
        target = outputs.at(steps, paths.depths if self.drafter.taps else None)
        if rounds is not None:
            target = replace(target, rejected=self._rejected(rounds, outputs)[steps])
        weight: Any = self.drafter.head_weight if self.chunked is not None or self.vocabulary else None
        if self.vocabulary is not None:
            target = self.vocabulary.target(target)
        step_weight = self._step_weight(batch, paths, hidden, weight, target)
        total = self._mean_count(len(hidden) if step_weight is None else step_weight.sum())
        several = self.trainer.world_size > 1
        if self.chunked is not None:
            loss = self.chunked(hidden, weight, target, step_weight=step_weight, denominator=total)
        else:
            per_step = self.loss(self._logits(hidden, weight, target), target[:])
            loss = reduce(per_step, weight=step_weight, denominator=total)
        logged = {"train/loss_nats": loss}
        if self.drafter.confidence_weight:
            sure = self._confidence_loss(hidden, weight, target, step_weight, total)
            logged["train/confidence_nats"] = sure
            loss = loss + self.drafter.confidence_weight * sure
        if self._is_logged():
            logged["train/lr"] = self.trainer.optimizers[0].param_groups[0]["lr"]
            self.log_dict(logged, batch_size=1, sync_dist=several)
        return self._accumulation.scaled(loss, total, self.trainer.accumulate_grad_batches)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        self._accumulation.settle(self.parameters(), self.trainer.accumulate_grad_batches)
        self.loss.settle()
        if not self._gradients_checked:
            self._gradients_checked = True
            self._check_gradients()
        if self._is_logged():
            self.log("train/grad_norm", gradient_norm(self.parameters()), batch_size=1)

    def _with_rounds(self, batch: Batch) -> tuple[Batch, Rounds | None]:
        """The batch with rounds that the drafter writes, in the share of the micro-batches that has them."""
        if self.on_policy is None or float(torch.rand(())) >= self.on_policy.share:
            return batch, None
        return write_rounds(self.drafter, batch, self.on_policy.depth)

    def _rejected(self, rounds: Rounds, outputs: TargetOutputs) -> Int[Tensor, " N"]:
        judged = outputs.at(rounds.steps.flatten())[:]
        rejected = rounds.rejected(judged.greedy.view_as(rounds.steps), outputs.batch.input_ids.numel())
        if self._is_logged() and len(rounds.steps):
            first = rejected[rounds.steps.flatten()] == 0
            certain = radius(judged.head, StrictGreedy()) > _AVOIDABLE
            logged = {
                "train/round_accepted": (rejected[rounds.steps] < 0).sum(-1).float().mean(),
                "train/avoidable_rejections": (first & certain).sum() / first.sum().clamp(min=1),
            }
            self.log_dict(logged, batch_size=1, sync_dist=self.trainer.world_size > 1)
        return rejected

    def _is_logged(self) -> bool:
        """Whether this step is written: a log call costs milliseconds."""
        return (self.global_step + 1) % max(getattr(self.trainer, "log_every_n_steps", 1), 1) == 0

    def on_train_start(self) -> None:
        self._accumulation.forget()
        self._multiply_fp32("high")

    def configure_optimizers(self) -> Any:
        fused = self.device.type == "cuda" and self.trainer.precision != "16-mixed"
        return self.optimizer_settings.build(self, self.trainer.max_steps, fused=fused)

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip here, because Lightning refuses to clip for a fused optimiser under any mixed precision."""
        if not gradient_clip_val:
            return
        value = gradient_clip_algorithm == "value"
        clip = torch.nn.utils.clip_grad_value_ if value else torch.nn.utils.clip_grad_norm_
        clip(self.parameters(), gradient_clip_val)

    def _check_gradients(self) -> None:
        named = self.named_parameters()
        idle = [name for name, weight in named if weight.requires_grad and weight.grad is None]
        if idle:
            raise ValueError(
                f"{len(idle)} trainable weights get no gradient, {idle[0]} for one: the loss does not depend "
                "on them, so they would never move. Freeze them; a LoRA adapter, take its module out of "
                "lora.target_modules (the loss reads the weight of lm_head without its adapter)"
            )

    def _multiply_fp32(self, precision: str) -> None:
        """fp32 matrix products on CUDA: TF32 while training, full precision where metrics are computed."""
        if self.device.type == "cuda":
            torch.set_float32_matmul_precision(precision)

    # ---- validation and test

    def on_validation_epoch_start(self) -> None:
        self._multiply_fp32("highest")
        self._sums = ValidationSums(self.validation_settings, self.device)

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        assert self._sums is not None
        batch = replace(batch, loss_mask=self.drafter.validation_mask(batch.input_ids, batch.loss_mask))
        paths, outputs = self._paths(batch, depth=self.validation_settings.depth, every=True)
        hits = torch.zeros(paths.mask.shape, dtype=torch.bool, device=self.device)
        entries = _ENTRIES_PER_CHUNK.get(self.device.type, _ENTRIES_PER_CHUNK["cpu"])
        size = max(1, entries // self.drafter.vocab_size)
        for depth, inside in enumerate(paths.mask.T):
            for index in inside.nonzero().squeeze(-1).split(size):
                target = outputs.at(paths.steps[index, depth])[:]
                logits = self.drafter.head(paths.hidden[index, depth])
                if depth == 0:
                    hits[index, 0] = self._sums.add_steps(logits, target, self.vocabulary)
                else:
                    hits[index, depth] = first_choice(logits, target.greedy)
        counted = torch.zeros(*batch.loss_mask.shape, hits.shape[1], dtype=torch.bool, device=self.device)
        counted.flatten(0, 1)[paths.steps[:, 0]] = hits
        segments = torch.where(batch.loss_mask, batch.document_ids, -1)
        self._sums.add_rounds(counted, segments)

    def on_validation_epoch_end(self) -> None:
        self._log_sums("val")

    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()

    def test_step(self, batch: Batch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self._log_sums("test")

    def _log_sums(self, split: str) -> None:
        assert self._sums is not None
        metrics = self._sums.metrics(lambda sums: self.trainer.strategy.reduce(sums, reduce_op="sum"))
        values = {f"{split}/{name}": value for name, value in metrics.items()}
        self.log_dict(values, batch_size=1, sync_dist=True)
        self._sums = None
        self._multiply_fp32("high")

    # ---- drafter and target at the positions of the loss mask

    @torch.no_grad()
    def _step_weight(
        self,
        batch: Batch,
        paths: Paths,
        hidden: Float[Tensor, "N H"],
        weight: Float[Tensor, "V H"] | None,
        target: TargetBatch | OnlineTarget,
    ) -> Float[Tensor, " N"] | None:
        if self.step_weights is None:
            return None
        nll = self._values(self._nll, hidden, weight, target) if self.step_weights.needs_nll else None
        if not self.drafter.taps:
            return self.step_weights(target, batch.loss_mask, batch.document_ids, nll)
        return self.step_weights.on_drafts(target, paths.mask, nll)  # these drafters have their own paths

    def _values(
        self, loss: Chunked, hidden: Tensor, weight: Tensor | None, target: TargetBatch | OnlineTarget
    ) -> Float[Tensor, " N"]:
        """A loss at every draft token."""
        if weight is not None:
            values: Tensor = loss(hidden, weight, target)
            return values
        return loss.loss(self._logits(hidden, weight, target), target[:])

    def _confidence_loss(
        self,
        hidden: Float[Tensor, "N H"],
        weight: Float[Tensor, "V H"] | None,
        target: TargetBatch | OnlineTarget,
        step_weight: Float[Tensor, " N"] | None,
        total: Tensor,
    ) -> Tensor:
        """Cross-entropy of the drafter's confidence with Σ min(p, q), the acceptance rate of its tokens."""
        with torch.no_grad():
            accepted = self._values(self._overlap, hidden, weight, target).neg().exp().clamp(0.0, 1.0)
        odds = self.drafter.confidence(hidden)
        per_step = binary_cross_entropy_with_logits(odds, accepted.to(odds.dtype), reduction="none")
        return reduce(per_step, weight=step_weight, denominator=total)

    def _logits(
        self, hidden: Tensor, weight: Tensor | None, target: TargetBatch | OnlineTarget
    ) -> Float[Tensor, "N V"]:
        if self.vocabulary is None or weight is None:
            return self.drafter.head(hidden)
        logits = hidden @ weight.T
        return target.pad(logits) if isinstance(target, TargetBatch) else logits

    def _mean_count(self, steps: int | Tensor) -> Tensor:
        """Mean count (weight) of token positions over ranks: normalises by the global count."""
        if isinstance(steps, Tensor):
            count = steps.detach().float().clone()
        else:  # filled on the device: a copy from the host would wait for it
            count = torch.full((), float(steps), device=self.device)
        if self.trainer.world_size > 1:
            # `strategy.reduce` waits at a barrier first, in every micro-batch
            torch.distributed.all_reduce(count)
            count /= self.trainer.world_size
        return count

    def _paths(
        self, batch: Batch, depth: int | None = None, every: bool = False
    ) -> tuple[Paths, TargetOutputs]:
        """The drafter's rounds along a batch, and the target's outputs for it."""
        taps = self.drafter.taps
        outputs = (
            recorded(batch, taps, self._layers) if self.online is None else self.online.read(batch, taps)
        )
        paths = self.drafter.paths(
            batch.input_ids,
            batch.position_ids,
            batch.document_ids,
            batch.loss_mask,
            outputs.features,
            depth,
            every,
        )
        if self.vocabulary is not None and not every:
            # What the drafter cannot propose is always rejected: the round ends there.
            held = torch.zeros_like(paths.mask)
            steps = paths.steps[paths.mask]
            held[paths.mask] = self.vocabulary.proposable(outputs.at(steps), steps)
            paths = paths._replace(mask=held.cumprod(-1).bool())
        return paths, outputs

    # ---- set-up and checkpoints

    def setup(self, stage: str) -> None:
        """Build the drafter for the target; refuse another vocabulary or tokenizer, and half precision."""
        self._matmul_precision = torch.get_float32_matmul_precision()
        check_precision(str(self.trainer.precision))
        seed = int(os.environ.get("PL_GLOBAL_SEED", "0"))
        datamodule = getattr(self.trainer, "datamodule", None)
        fit_to_target(self.drafter, self.online, datamodule, seed)
        self._layers = getattr(getattr(datamodule, "meta", None), "feature_layers", ())
        ids = self.drafter.draft_ids
        if ids is not None:
            root = self.trainer.strategy.root_device
            self.vocabulary = DraftVocabulary(ids.to(root), self.drafter.vocab_size)
        if stage == "fit":
            self.drafter.train()  # a pretrained network arrives in eval mode, which Lightning would keep
        if self.online is not None:
            self.online.to(self.trainer.strategy.root_device)

    def teardown(self, stage: str) -> None:
        """Multiply fp32 matrices as before the run: what is recorded or decoded next is not for TF32."""
        torch.set_float32_matmul_precision(self._matmul_precision)

    def configure_model(self) -> None:
        """Shard the drafter under `ModelParallelStrategy` (FSDP2)."""
        if self.device_mesh is not None:
            shard(self.drafter, self.device_mesh, str(self.trainer.precision))

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        state, frozen = checkpoint["state_dict"], self._frozen()
        checkpoint["state_dict"] = {name: value for name, value in state.items() if name not in frozen}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        frozen = self._frozen()
        if "state_dict" not in checkpoint:  # sharded: the strategy reads each device's part itself
            return
        own, saved = self.state_dict(), checkpoint["state_dict"]
        for name in [name for name in {*own, *saved} if not name.startswith("drafter.")]:
            if name not in own:  # of another loss
                del saved[name]
            elif name not in saved:
                saved[name] = own[name]
        if missing := own.keys() - frozen - saved.keys():
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
