"""Memory, disk and time by formula. Every number is an estimate; none is a measurement.

Sources of the formulas:
- states of the optimiser: ZeRO, arXiv 1910.02054, section 3.1 (16 bytes a parameter with mixed-precision
  Adam); Lightning's bf16-mixed keeps fp32 weights, gradients and two moments, and casts the weights to bf16;
- activations: what autograd saves in transformers' Qwen3 layer under bf16 autocast, counted with saved-tensor
  hooks: 26 H + 15 query + 10 key-value + 8 intermediate bytes a token and layer; checkpointed, 4 H;
- arithmetic: 2 FLOP a parameter and token forward, 4 backward, PaLM, arXiv 2204.02311, appendix B; attention
  adds 4 · query FLOP a token and visible token and layer forward;
- time: FLOP over peak times a utilisation that is assumed (MFU); in greedy decoding bytes over bandwidth.

Letters: H hidden · V vocabulary.
"""

from __future__ import annotations

import os
import timeit
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch

from certdraft.train.plan.model_sizes import ModelSizes

GB = 1e9
_SIDE = 1024  # of the square matrices that are multiplied to measure a CPU
_BYTES = 1 << 27  # copied to measure its bandwidth, more than any cache holds


@dataclass(frozen=True)
class Device:
    """One accelerator, by its data sheet: memory, dense bf16 peak, bandwidth of its memory.

    `kind` is torch's name of it; `overhead_gb` is taken by what is neither weights nor data.
    """

    memory_gb: float
    bf16_tflops: float
    bandwidth_gb_s: float
    kind: Literal["cuda", "cpu"] = "cuda"
    overhead_gb: float = 2.5
    overhead: str = "CUDA context, fragmentation"


DEVICES = {  # vendors' data sheets, dense bf16
    "a100-80gb": Device(80, 312, 2039),
    "h100": Device(80, 989, 3350),
    "h200": Device(141, 989, 4800),
    "b200": Device(180, 2250, 8000),
}


def state_bytes(trained: int, frozen: int, precision: str, frozen_bytes: int = 4) -> float:
    """Weights, gradients and AdamW moments of parameters with a gradient, and weights of those without.

    Weights, gradients and moments are fp32; `precision` is Lightning's name: "32-true", "bf16-mixed", …
    """
    cast = 2 if precision.endswith("mixed") else 0
    return trained * (16 + cast) + frozen * (frozen_bytes + (cast if frozen_bytes > 2 else 0))


def activation_bytes(sizes: ModelSizes, tokens: int, checkpointing: bool) -> float:
    """Tensors that autograd keeps for a batch of `tokens` under bf16 autocast."""
    layer = 26 * sizes.hidden + 15 * sizes.query + 10 * sizes.key_value + 8 * sizes.intermediate
    if checkpointing:  # the input of every layer, and one layer at a time in full
        return tokens * (sizes.layers * 4 * sizes.hidden + layer)
    return tokens * sizes.layers * layer


def loss_bytes(sizes: ModelSizes, chunk_tokens: int, counted: int) -> float:
    """Logits and gradient of one chunk, fp32 gradient of the lm_head, hidden states in the loss mask."""
    return (
        8 * chunk_tokens * sizes.vocabulary + 4 * sizes.vocabulary * sizes.hidden + 8 * counted * sizes.hidden
    )


def batch_bytes(tokens: int, num_kept: int, feature_values: int) -> float:
    """A batch on the device: ids as int64 and gaps as fp32, masks, additive attention mask aside."""
    return tokens * (12 * num_kept + 2 * feature_values + 40)


def mask_bytes(rows: int, seq_len: int) -> float:
    """The additive attention mask of packed rows, fp32, and the comparison it is made from."""
    return rows * seq_len**2 * 6


def step_flop(
    sizes: ModelSizes, tokens: int, counted: float, seq_len: int, trained: int, checkpointing: bool
) -> float:
    """Forward and backward over a batch of `tokens`, of which `counted` are in the loss mask.

    The lm_head works on those only; documents are taken to fill half a row; parameters that are not `trained`
    need no weight gradient; with `checkpointing` the forward pass of the layers is done twice.
    """
    forward = 2 * sizes.body * tokens + attention_flop(sizes, tokens, seq_len / 2)
    share = trained / max(sizes.parameters, 1)
    backward = forward * (1 + min(share, 1.0))
    head = 2 * sizes.hidden * sizes.vocabulary * counted
    return forward * (2 if checkpointing else 1) + backward + head * (2 + min(share, 1.0))


def attention_flop(sizes: ModelSizes, tokens: float, context: float) -> float:
    """Scores and their use, causal: each token sees half of its document."""
    return 4 * sizes.layers * sizes.query * tokens * context / 2


def cache_bytes(sizes: ModelSizes, rows: int, length: int) -> float:
    """Keys and values of a bf16 cache."""
    return 2 * 2 * sizes.layers * sizes.key_value * rows * length


def decode_step_s(sizes: ModelSizes, rows: int, length: float, device: Device, mfu: float) -> float:
    """One greedy step of a batch: reading weights and cache, or the arithmetic, whichever is slower."""
    read = 2 * sizes.parameters + cache_bytes(sizes, rows, int(length))
    return max(
        read / (device.bandwidth_gb_s * GB * 0.7),
        2 * sizes.active * rows / (device.bf16_tflops * 1e12 * mfu),
    )


def record_bytes(sizes: ModelSizes, rows: int, length: int, features: int, device: Device) -> float:
    """Recording `rows` texts of `length` tokens at once; one layer of the longest prefill included."""
    work = rows * length * (10 * sizes.hidden + 4 * sizes.intermediate + 2 * features)
    return (
        2 * sizes.parameters
        + cache_bytes(sizes, rows, length)
        + work
        + (1 << 27) * 3
        + device.overhead_gb * GB
    )


def record_batch_s(
    sizes: ModelSizes, rows: int, prompt: int, answer: int, device: Device, mfu: float, overhead_s: float
) -> float:
    """Prefill of a batch of prompts and its greedy answers."""
    read = 2 * sizes.active * prompt * rows + attention_flop(sizes, prompt * rows, prompt)
    each = decode_step_s(sizes, rows, prompt + answer / 2, device, mfu) + overhead_s
    return read / (device.bf16_tflops * 1e12 * mfu) + answer * each


def all_reduce_s(trained: int, world: int, link_gb_s: float) -> float:
    """fp32 gradients once around a ring of `world` devices: 2 (N − 1)/N of their bytes over one link."""
    return 2 * (world - 1) / world * 4 * trained / (link_gb_s * GB)


def measured_cpu(precision: str) -> Device:
    """The CPU of this machine: its memory read, its speed measured in half a second.

    Measured are one matrix product in the dtype that `precision` multiplies in, and one copy.
    """
    dtype = torch.bfloat16 if precision.startswith("bf16") else torch.float32
    factor = torch.randn(_SIDE, _SIDE).to(dtype)
    product_s = _best(lambda: factor @ factor)
    source = torch.zeros(_BYTES, dtype=torch.uint8)
    target = torch.empty_like(source)
    copy_s = _best(lambda: target.copy_(source))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return Device(
        memory_gb=memory / GB,
        bf16_tflops=2 * _SIDE**3 / product_s / 1e12,
        bandwidth_gb_s=2 * _BYTES / copy_s / GB,
        kind="cpu",
        overhead_gb=0.8,
        overhead="Python, libraries, fragmentation",
    )


def _best(work: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest of some calls; the first one, which warms up, is not counted."""
    return min(timeit.repeat(work, number=1, repeat=repeats + 1)[1:])
