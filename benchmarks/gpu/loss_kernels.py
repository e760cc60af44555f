"""Losses at the size of a real vocabulary, beside bare matrix products and other implementations."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from work import Meter, Size

from certdraft.losses import Chunked, ForwardKL, HardCE, Mixture, OnlineTarget


def run_kernels(size: Size, folder: Path, meter: Meter) -> dict[str, Any]:
    """Time chunked losses of an online target beside the bare matrix products and other implementations."""
    vocab, width = size.target["vocab_size"], size.target["hidden_size"]
    dtype = torch.bfloat16 if meter.cuda else torch.float32
    make: dict[str, Any] = {"device": meter.device, "dtype": dtype}
    weight = torch.randn(vocab, width, **make).mul_(width**-0.5).requires_grad_()
    target_weight = torch.randn(vocab, width, **make).mul_(width**-0.5)
    hidden, target_hidden = (torch.randn(size.loss_steps, width, **make) for _ in range(2))
    hidden.requires_grad_()
    target = OnlineTarget(target_hidden, target_weight, k=8)

    def bare() -> None:
        """Logits of both models, and both gradients of the drafter's: four products."""
        with torch.no_grad():
            for start in range(0, size.loss_steps, 512):
                part = hidden[start : start + 512]
                logits = part @ weight.t()
                target_hidden[start : start + 512] @ target_weight.t()
                logits.t() @ part
                logits @ weight

    def run(loss: Chunked) -> Callable[[], None]:
        def step() -> None:
            loss(hidden, weight, target).backward()
            hidden.grad = weight.grad = None

        return step

    losses = {
        "hard-ce": HardCE(),
        "forward-kl": ForwardKL(),
        "ce+kl": Mixture([HardCE(), ForwardKL()], [0.5, 0.5]),
    }
    base = meter.seconds(bare, size.repeats)
    found: dict[str, Any] = {"bare_products_ms": 1e3 * base}

    def timed(step: Callable[[], None]) -> dict[str, Any]:
        seconds = meter.seconds(step, size.repeats)
        return {"ms": 1e3 * seconds, "of_bare": seconds / base, "peak_gib": meter.peak_gib(step)}

    for name, loss in losses.items():
        found[name] = timed(run(Chunked(loss))) | {"readable": timed(run(Chunked(loss, backend="torch")))}
    if importlib.util.find_spec("liger_kernel") is None:
        return found | {"liger forward-kl": "skipped: liger-kernel is not installed"}
    from liger_kernel.chunked_loss import LigerFusedLinearJSDLoss

    liger = LigerFusedLinearJSDLoss(
        weight_hard_loss=0.0, weight_soft_loss=1.0, beta=0.0, compiled=meter.cuda, chunk_size=1024
    )
    labels = torch.zeros(size.loss_steps, dtype=torch.long, device=meter.device)

    def theirs() -> None:
        liger(hidden, weight, target_hidden, target_weight, labels).backward()
        hidden.grad = weight.grad = None

    return found | {"liger forward-kl": timed(theirs)}
