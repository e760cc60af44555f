"""ArbiterModule: an arbitration policy, trained on whether the answer was right.

Two phases under one optimiser. *Branch labels*: both branches of a mismatch are finished, and the policy
learns which one leads to a right answer. *Group-relative REINFORCE*: several texts of a problem are drawn,
and each decision is made more or less likely by its text's reward relative to the others. Target and drafter
are frozen; only the policy's few hundred weights are trained and saved. The reward is verifiable; the group
baseline is that of GRPO (arXiv 2402.03300) without clipping, since every text is used once.

Letters: P problems · G texts a problem · R = P·G texts · N decisions · F features.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import pytorch_lightning as pl
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from certdraft.arbitration import (
    ArbiterPolicy,
    ArbitrationEnv,
    ArbitrationSettings,
    Lockstep,
    Policy,
    ProblemBatch,
    Sandbox,
    VerifiedTexts,
    always,
    branch_labels,
    never,
)
from certdraft.data import eos_ids_of, load_tokenizer
from certdraft.drafters import CausalDrafter
from certdraft.train import Online, OptimizerSettings, TargetSettings, fit_to_target


@dataclass(frozen=True)
class RewardSettings:
    """Reward of a text: 1 if it is right, plus terms for speed and intervention.

    Args:
        speed: weight of (tokens per target pass) / (depth + 1); small, so that being right leads.
        override_cost: cost of an override rate of 1; small, it breaks ties in favour of the target.
        entropy: weight of the policy's entropy per decision, nats, added to what is maximised.
    """

    speed: float = 0.0
    override_cost: float = 0.02
    entropy: float = 0.003


class ArbiterModule(pl.LightningModule):
    """Trains an arbitration policy for a frozen pair of target and drafter.

    Args:
        drafter: the frozen drafter, a causal one (`pretrained` names its folder).
        target: the frozen target: "embedded", a local folder, or a hub name.
        target_dtype: dtype of the target's weights; logits are fp32 whatever it is.
        policy: what is trained.
        texts: how texts are written.
        copies: texts per problem in a step, G ≥ 2.
        label_steps: steps on branch labels before REINFORCE begins.
        reward: what a text is worth.
        optimizer: learning rate and its schedule.
        sandbox: limits on programs that the verifier runs.
        export_dir: folder that the trained policy is written to, besides `policy/` in the run's folder.
    """

    def __init__(
        self,
        drafter: CausalDrafter,
        target: str = "embedded",
        target_dtype: Literal["float32", "bfloat16", "float16"] = "float32",
        policy: ArbiterPolicy | None = None,
        texts: ArbitrationSettings = ArbitrationSettings(),  # noqa: B008, frozen
        copies: int = 8,
        label_steps: int = 40,
        reward: RewardSettings = RewardSettings(),
        optimizer: OptimizerSettings = OptimizerSettings(lr=1e-2, warmup_steps=5),  # noqa: B008, frozen
        sandbox: Sandbox = Sandbox(),  # noqa: B008, frozen
        export_dir: str | None = None,
    ) -> None:
        super().__init__()
        if copies < 2:
            raise ValueError(f"copies is {copies}; a group needs at least 2 texts to compare")
        self.policy = policy or ArbiterPolicy()
        self.texts, self.copies, self.label_steps = texts, copies, label_steps
        self.reward, self.optimizer_settings, self.sandbox = reward, optimizer, sandbox
        self.export_dir = export_dir
        # Frozen models are no submodules: they are in no checkpoint, no wrapper and no optimiser.
        self._frozen = _Frozen(Online(TargetSettings(target, dtype=target_dtype)), drafter)
        self._env: ArbitrationEnv | None = None
        self._sums: dict[str, Tensor] = {}

    # ---- steps

    def training_step(self, batch: ProblemBatch, batch_idx: int) -> Tensor:
        env = self._ready()
        if not bool(self.policy.measured):
            strict = env.write(batch.problems, never)
            self.policy.standardise(strict.rollouts.features.to(self.device))
        if self.global_step < self.label_steps:
            loss = self._label_loss(env, batch)
        else:
            loss = self._reinforce_loss(env, batch)
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"], batch_size=1)
        return loss

    def _label_loss(self, env: ArbitrationEnv, batch: ProblemBatch) -> Tensor:
        features, labels = branch_labels(env, batch.problems, self.policy, self.copies)
        odds = self.policy(features.to(self.device))
        wanted = labels.to(self.device, odds.dtype)
        if not len(wanted):
            return self._no_signal()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(odds, wanted)
        right = ((odds > 0) == (wanted > 0)).float().mean()
        self.log_dict(
            {"train/loss_nats": loss, "train/labels": float(len(wanted)), "train/label_accuracy": right},
            batch_size=1,
        )
        return loss

    def _reinforce_loss(self, env: ArbitrationEnv, batch: ProblemBatch) -> Tensor:
        drawn = env.write(batch.problems, self.policy, copies=self.copies, threshold=None)
        rewards = text_rewards(drawn, self.reward, self.texts.depth)
        advantages = group_advantages(rewards.view(-1, self.copies)).flatten()
        rollouts = drawn.rollouts
        self.log_dict(
            {
                "train/reward": rewards.mean(),
                "train/accuracy": drawn.right.float().mean(),
                "train/override_rate": rollouts.taken.float().mean() if len(rollouts.taken) else 0.0,
                "train/groups_with_signal": (advantages != 0).float().mean(),
            },
            batch_size=1,
        )
        if not len(rollouts.taken):
            return self._no_signal()
        odds = self.policy(rollouts.features.to(self.device))
        row, taken = rollouts.row.to(self.device), rollouts.taken.to(self.device)
        return reinforce_loss(odds, taken, row, advantages.to(self.device), self.reward.entropy)

    def _no_signal(self) -> Tensor:
        return torch.stack([parameter.sum() for parameter in self.policy.parameters()]).sum() * 0.0

    # ---- validation: the policy as it would decode, beside both models alone

    def on_validation_epoch_start(self) -> None:
        self._sums = {}

    def validation_step(self, batch: ProblemBatch, batch_idx: int) -> None:
        env = self._ready()
        arms: dict[str, Policy] = {"": self.policy, "target_": never, "drafter_": always}
        for name, policy in arms.items():
            verified = env.write(batch.problems, policy)
            counts: dict[str, int | Tensor] = {
                "texts": len(verified.right), "right": verified.right.sum(),
                "tokens": verified.num_tokens.sum(), "passes": verified.rollouts.passes.sum(),
                "overrides": verified.rollouts.overrides.sum(),
                "mismatches": verified.rollouts.mismatches.sum(),
            }  # fmt: skip
            for key, count in counts.items():
                value = torch.as_tensor(float(count), device=self.device)
                self._sums[name + key] = self._sums.get(name + key, torch.zeros_like(value)) + value

    def on_validation_epoch_end(self) -> None:
        total = {k: self.trainer.strategy.reduce(v, reduce_op="sum") for k, v in self._sums.items()}
        if not total:
            return
        metrics = {
            "accuracy": total["right"] / total["texts"],
            "target_accuracy": total["target_right"] / total["target_texts"],
            "drafter_accuracy": total["drafter_right"] / total["drafter_texts"],
            "override_rate": total["overrides"] / total["mismatches"].clamp_min(1),
            "tau": total["tokens"] / total["passes"],
            "target_tau": total["target_tokens"] / total["target_passes"],
        }
        self.log_dict({f"val/{name}": value for name, value in metrics.items()}, batch_size=1)

    def on_test_epoch_start(self) -> None:
        self.on_validation_epoch_start()

    def test_step(self, batch: ProblemBatch, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx)

    def on_test_epoch_end(self) -> None:
        self.on_validation_epoch_end()

    # ---- set-up

    def configure_optimizers(self) -> Any:
        return self.optimizer_settings.build(self, self.trainer.max_steps)

    def setup(self, stage: str) -> None:
        """Raise if the drafter has another vocabulary than the target; move both to the device."""
        frozen = self._frozen
        fit_to_target(frozen.drafter, frozen.target, None)
        frozen.drafter.eval().requires_grad_(False)
        device = self.trainer.strategy.root_device
        frozen.target.to(device)
        frozen.drafter.to(device)

    def on_fit_end(self) -> None:
        """Write the policy as `load_policy` reads it."""
        if not self.trainer.is_global_zero:
            return
        facts = {
            "target": self._frozen.target.settings.name,
            "drafter": str(self._frozen.drafter.pretrained),
            "target_dtype": self._frozen.target.settings.dtype,
            "drafter_dtype": str(self._frozen.drafter.model.dtype).removeprefix("torch."),
            "texts": asdict(self.texts),
            "steps": self.trainer.global_step,
        }
        for folder in (Path(self.trainer.default_root_dir) / "policy", self.export_dir):
            if folder is not None:
                self.policy.save(folder, facts)

    def _ready(self) -> ArbitrationEnv:
        if self._env is None:
            frozen = self._frozen
            tokenizer = load_tokenizer(frozen.target.settings.name)
            models = Lockstep(frozen.target.model), Lockstep(frozen.drafter.model)
            eos = sorted(eos_ids_of(frozen.target.model, tokenizer))
            self._env = ArbitrationEnv(*models, tokenizer, self.texts, self.sandbox, eos)
        return self._env


class _Frozen:
    """Target and drafter, not registered as submodules."""

    def __init__(self, target: Online, drafter: CausalDrafter) -> None:
        self.target, self.drafter = target, drafter


def text_rewards(verified: VerifiedTexts, reward: RewardSettings, depth: int) -> Float[Tensor, " R"]:
    """Return [right] + speed · (tokens / passes) / (depth + 1) − override_cost · overrides / mismatches."""
    rollouts = verified.rollouts
    per_pass = verified.num_tokens / rollouts.passes.cpu()
    rate = rollouts.overrides.cpu() / rollouts.mismatches.cpu().clamp_min(1)
    return verified.right.float() + reward.speed * per_pass / (depth + 1) - reward.override_cost * rate


def group_advantages(rewards: Float[Tensor, "P G"]) -> Float[Tensor, "P G"]:
    """Return (R − mean) / (std + 1e-4) within each group; 0 in a group of equal rewards.

    Examples:
        >>> group_advantages(torch.tensor([[1.0, 1.0], [1.0, 0.0]])).round(decimals=2).tolist()
        [[0.0, 0.0], [1.0, -1.0]]
    """
    centred = rewards - rewards.mean(-1, keepdim=True)
    centred = torch.where(rewards.amax(-1, keepdim=True) == rewards.amin(-1, keepdim=True), 0.0, centred)
    return centred / (rewards.std(-1, keepdim=True, correction=0) + 1e-4)


def reinforce_loss(
    log_odds: Float[Tensor, " N"],
    taken: Bool[Tensor, " N"],
    row: Int[Tensor, " N"],
    advantages: Float[Tensor, " R"],
    entropy: float = 0.0,
) -> Float[Tensor, ""]:
    """Return −Σ A log π(a) per text with an advantage, minus the entropy bonus per decision.

    Its gradient is an unbiased estimate of −∂E[A]/∂θ for advantages that do not depend on the text's own
    decisions except through its reward.

    Args:
        log_odds: of taking the draft token, differentiable.
        taken: what was decided.
        row: text of each decision.
        advantages: of each text.
        entropy: weight of the mean entropy of a decision, nats.
    """
    sign = torch.where(taken, 1.0, -1.0)
    logp = torch.nn.functional.logsigmoid(sign * log_odds)
    texts = (advantages != 0).sum().clamp_min(1)
    loss = -(advantages[row] * logp).sum() / texts
    if entropy:
        p = log_odds.sigmoid()
        uncertainty = torch.nn.functional.softplus(log_odds) - p * log_odds
        loss = loss - entropy * uncertainty.mean()
    return loss
