"""AdamW, or Muon for the matrices, with a warm-up and a decay that ends with the run."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from certdraft.support import has_bfloat16_products


@dataclass(frozen=True)
class OptimizerSettings:
    """The optimiser and its learning-rate schedule.

    Args:
        method: "adamw" for every weight, or "muon" for the matrices inside the layers and AdamW for the rest
            (embeddings, the output head, norms, biases). Muon's updates are scaled to the size of AdamW's, so
            that one learning rate serves both.
        lr: peak learning rate.
        warmup_steps: optimiser steps of linear warm-up from 0.
        schedule: shape of the decay from the peak to `final_lr` over the rest of `trainer.max_steps`.
        final_lr: learning rate at the end, as a fraction of the peak.
        weight_decay: of matrices; vectors (norms, biases) and embeddings are not decayed.
        betas: of AdamW.
        eps: of AdamW.
        momentum: of Muon.
    """

    method: Literal["adamw", "muon"] = "adamw"
    lr: float = 1e-3
    warmup_steps: int = 50
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    final_lr: float = 0.0
    weight_decay: float = 0.0
    betas: tuple[float, float] = (0.9, 0.95)
    eps: float = 1e-8
    momentum: float = 0.95

    def factor(self, step: int, max_steps: int) -> float:
        """Learning rate of an optimiser step as a fraction of the peak, in [0, 1].

        Args:
            step: counts from 0.
            max_steps: length of the run.

        Examples:
            >>> settings = OptimizerSettings(warmup_steps=10, schedule="linear")
            >>> [round(settings.factor(step, 110), 2) for step in (0, 9, 10, 60, 110)]
            [0.1, 1.0, 1.0, 0.5, 0.0]
        """
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        if self.schedule == "constant":
            return 1.0
        done = min(1.0, (step - self.warmup_steps) / max(1, max_steps - self.warmup_steps))
        left = 1.0 - done if self.schedule == "linear" else 0.5 * (1.0 + math.cos(math.pi * done))
        return self.final_lr + (1.0 - self.final_lr) * left

    def build(self, module: nn.Module, max_steps: int, fused: bool = False) -> dict[str, Any]:
        """The return value of `configure_optimizers` for the trainable parameters of a module.

        Raises:
            ValueError: the run has no length, nothing is trainable, trainable weights are not fp32, or Muon
                is asked for sharded ones.
        """
        check_steps(max_steps)
        embeddings = {id(p) for m in module.modules() if isinstance(m, nn.Embedding) for p in m.parameters()}
        trainable = [p for p in module.parameters() if p.requires_grad]
        if not trainable:
            raise ValueError("the drafter has no trainable parameter; check its LoRA target modules")
        half = [n for n, p in module.named_parameters() if p.requires_grad and p.dtype.itemsize < 4]
        if half:
            raise ValueError(
                f"{len(half)} trainable weights are in half precision, {half[0]} for one: AdamW's updates "
                "are smaller than their rounding, so weights near 1, as of norms, would never move. Leave "
                "the drafter's dtype at float32 and set trainer.precision: bf16-mixed, which is as fast"
            )
        matrices = [p for p in trainable if p.ndim >= 2 and id(p) not in embeddings]
        others = [p for p in trainable if p.ndim < 2 or id(p) in embeddings]
        kept = {"params": others, "weight_decay": 0.0}
        adamw: dict[str, Any] = {"lr": self.lr, "betas": self.betas, "eps": self.eps, "fused": fused or None}
        optimizer: torch.optim.Optimizer
        if self.method == "muon":
            heads = {id(p) for m in module.modules() for p in _head_of(m)}
            inner = [p for p in matrices if p.ndim == 2 and id(p) not in heads]
            if any(isinstance(p, DTensor) for p in inner):
                raise ValueError("optimizer.method muon needs whole matrices; a sharded drafter takes adamw")
            outer = [p for p in matrices if p.ndim != 2 or id(p) in heads]
            rest = [{"params": outer, "weight_decay": self.weight_decay}, kept]
            parts: list[torch.optim.Optimizer] = []
            if inner:
                parts.append(
                    Muon(
                        inner, lr=self.lr, weight_decay=self.weight_decay, momentum=self.momentum,
                        adjust_lr_fn="match_rms_adamw",
                    )
                )  # fmt: skip
            if filled := _filled(rest):
                parts.append(torch.optim.AdamW(filled, **adamw))
            optimizer = MuonAdamW(*parts)
        else:
            optimizer = torch.optim.AdamW(
                _filled([{"params": matrices, "weight_decay": self.weight_decay}, kept]), **adamw
            )
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: self.factor(step, max_steps))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


class Muon(torch.optim.Muon):
    """torch's Muon, whose Newton-Schulz iteration runs in fp32 on a CPU without bfloat16 instructions.

    There it would take several times as long as the rest of a step. The choice depends on the CPU alone, so a
    resumed run repeats the same bits.
    """

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One update of all parameters with a gradient."""
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        if all(has_bfloat16_products(p.device) for p in params):
            return super().step(closure)
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    self._update(param, group)
        return loss

    def _update(self, param: Tensor, group: dict[str, Any]) -> None:
        state, momentum = self.state[param], group["momentum"]
        assert param.grad is not None
        if not state:
            state["momentum_buffer"] = torch.zeros_like(param.grad)
        buffer = state["momentum_buffer"]
        buffer.lerp_(param.grad, 1 - momentum)
        update = param.grad.lerp(buffer, momentum) if group["nesterov"] else buffer
        update = orthogonalised(update, group["ns_coefficients"], group["ns_steps"], group["eps"])
        assert group["adjust_lr_fn"] == "match_rms_adamw"
        param.mul_(1 - group["lr"] * group["weight_decay"])
        param.add_(update, alpha=-group["lr"] * 0.2 * math.sqrt(max(param.shape)))


def orthogonalised(
    matrix: Float[Tensor, "m n"], coefficients: tuple[float, float, float], steps: int, eps: float
) -> Float[Tensor, "m n"]:
    """Return a matrix with the same singular vectors and singular values near 1, by Newton-Schulz.

    Args:
        matrix: with at most the rank of its smaller side.
        coefficients: a, b, c of the step X <- a X + (b G + c G²) X with G = X Xᵀ.
        steps: of the iteration.
        eps: least norm that it is divided by.

    Source: https://kellerjordan.github.io/posts/muon.
    """
    a, b, c = coefficients
    wide = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix
    x = wide / wide.norm().clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.T
        x = torch.addmm(x, torch.addmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.T if matrix.shape[0] > matrix.shape[1] else x


class MuonAdamW(torch.optim.Optimizer):
    """Two optimisers that look like one to a scheduler and to a checkpoint: they share its groups and state.

    Args:
        parts: optimisers of different parameters.
    """

    def __init__(self, *parts: torch.optim.Optimizer) -> None:
        self.parts = parts
        self._sizes = [len(part.param_groups) for part in parts]
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def _share(self) -> None:
        groups = iter(self.param_groups)
        for part, size in zip(self.parts, self._sizes, strict=True):
            part.param_groups = list(islice(groups, size))
            part.state = self.state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        super().load_state_dict(state_dict)
        self._share()

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Run every part; a closure is called once, before them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for part in self.parts:
            part.step()
        return loss


def _filled(groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [group for group in groups if group["params"]]


def _head_of(module: nn.Module) -> list[nn.Parameter]:
    """Weights of a module's `lm_head`, which Muon leaves to AdamW."""
    head = getattr(module, "lm_head", None)
    return list(head.parameters()) if isinstance(head, nn.Module) else []


def check_steps(max_steps: int) -> None:
    """Raise ValueError for a run without a length."""
    if max_steps <= 0:
        raise ValueError("trainer.max_steps is not set; the learning-rate schedule ends there")


def check_precision(precision: str) -> None:
    """Refuse a `trainer.precision` under which weights are not kept in fp32.

    Raises:
        ValueError: bf16-true or 16-true.
    """
    if precision in ("bf16-true", "16-true"):
        raise ValueError(
            f"trainer.precision is {precision}: most updates of half-precision weights are rounded away. Use "
            "bf16-mixed (or 16-mixed), which keeps fp32 weights"
        )


def gradient_norm(parameters: Iterable[nn.Parameter]) -> Float[Tensor, ""]:
    """The 2-norm of all gradients together, of sharded parameters over all their shards."""
    norm = torch.nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
    return norm.full_tensor() if hasattr(norm, "full_tensor") else norm
