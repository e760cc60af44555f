"""The transformer layer of drafters that read target features, in the parts that both kinds share.

Parameter names are those of the published checkpoints, so reading and writing one is a copy. Attention comes
in two forms: `grouped_attention` for training (grouped_attention.py), where many short groups of
queries share a context, and plain SDPA over a cache for decoding.

Letters: R rows, T context tokens, A groups, Q queries of a group, M keys of a group's own, D head size,
H hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.nn import functional

from certdraft.drafters.features.rotary import Rotary

Size = TypeVar("Size", int, float)
KeysValues = tuple[Tensor, Tensor]  # [R, key-value heads, T, D] each


@dataclass(frozen=True)
class LayerSizes:
    """Sizes of one decoder layer. A size left open is the target's own.

    Args:
        hidden_size: H; must be the target's, whose embeddings are read.
        intermediate_size: of the MLP.
        num_attention_heads: query heads.
        num_key_value_heads: key and value heads.
        head_dim: D.
        rms_norm_eps: of every norm.
        rope_theta: base of the rotary frequencies.
        max_position_embeddings: positions it may be used at.
        rope_scaling: how rotary positions are stretched, in transformers' keys, such as {"rope_type": "yarn",
            "factor": 4.0, "original_max_position_embeddings": 32768}; None: not, whatever the target does.
    """

    hidden_size: int | None = None
    intermediate_size: int | None = None
    num_attention_heads: int | None = None
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    rms_norm_eps: float | None = None
    rope_theta: float | None = None
    max_position_embeddings: int | None = None
    rope_scaling: dict[str, Any] | None = None


def known(size: Size | None) -> Size:
    """Return a size that was completed from the target's."""
    assert size is not None
    return size


class RMSNorm(nn.Module):
    """x / rms(x) · weight, computed in fp32 and returned in the dtype of x."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Float[Tensor, "*step H"]) -> Float[Tensor, "*step H"]:
        wide = x.float()
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * scaled.to(x.dtype)


class MLP(nn.Module):
    """down(silu(gate(x)) · up(x))."""

    def __init__(self, hidden: int, intermediate: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(hidden, intermediate, bias=False)
        self.up_proj = nn.Linear(hidden, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, hidden, bias=False)

    def forward(self, x: Float[Tensor, "*step H"]) -> Float[Tensor, "*step H"]:
        down: Tensor = self.down_proj(functional.silu(self.gate_proj(x)) * self.up_proj(x))
        return down


class Attention(nn.Module):
    """Projections of grouped-query attention; masks are up to the caller.

    Args:
        sizes: complete.
        in_features: width of what queries, keys and values are made from.
        qk_norm: normalise queries and keys per head, as Qwen3 does.
    """

    def __init__(self, sizes: LayerSizes, in_features: int, qk_norm: bool) -> None:
        super().__init__()
        heads, groups = known(sizes.num_attention_heads), known(sizes.num_key_value_heads)
        head_dim, eps = known(sizes.head_dim), known(sizes.rms_norm_eps)
        self.head_dim, positions = head_dim, known(sizes.max_position_embeddings)
        self.rotary = Rotary(head_dim, known(sizes.rope_theta), sizes.rope_scaling, positions)
        self.q_proj = nn.Linear(in_features, heads * head_dim, bias=False)
        self.k_proj = nn.Linear(in_features, groups * head_dim, bias=False)
        self.v_proj = nn.Linear(in_features, groups * head_dim, bias=False)
        self.o_proj = nn.Linear(heads * head_dim, known(sizes.hidden_size), bias=False)
        self.q_norm: nn.Module = RMSNorm(head_dim, eps) if qk_norm else nn.Identity()
        self.k_norm: nn.Module = RMSNorm(head_dim, eps) if qk_norm else nn.Identity()

    def queries(
        self, x: Float[Tensor, "R T I"], positions: Int[Tensor, "R T"]
    ) -> Float[Tensor, "R heads T D"]:
        """Normalised and rotated."""
        return self._rotated(self.q_norm(self._split(self.q_proj(x))), positions)

    def keys_values(self, x: Float[Tensor, "R T I"], positions: Int[Tensor, "R T"]) -> KeysValues:
        """Keys normalised and rotated, values as they are."""
        keys = self._rotated(self.k_norm(self._split(self.k_proj(x))), positions)
        return keys, self._split(self.v_proj(x))

    def output(self, mixed: Float[Tensor, "R heads T D"]) -> Float[Tensor, "R T H"]:
        """Output projection of the heads, in the residual stream."""
        out: Tensor = self.o_proj(mixed.transpose(1, 2).flatten(2))
        return out

    def _rotated(self, x: Tensor, positions: Tensor) -> Tensor:
        out: Tensor = self.rotary(x, positions)
        return out

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)


class DecoderLayer(nn.Module):
    """Norms, attention and MLP of one layer; what attention reads is up to each kind.

    Args:
        sizes: complete.
        in_features: width of what queries, keys and values are made from.
        qk_norm: as in `Attention`.
    """

    def __init__(self, sizes: LayerSizes, in_features: int, qk_norm: bool) -> None:
        super().__init__()
        hidden, eps = known(sizes.hidden_size), known(sizes.rms_norm_eps)
        self.input_layernorm = RMSNorm(hidden, eps)
        self.post_attention_layernorm = RMSNorm(hidden, eps)
        self.self_attn = Attention(sizes, in_features, qk_norm)
        self.mlp = MLP(hidden, known(sizes.intermediate_size))

    def finish(
        self, x: Float[Tensor, "R T H"], mixed: Float[Tensor, "R heads T D"]
    ) -> Float[Tensor, "R T H"]:
        """The layer's output, un-normed, given the residual stream and the output of its heads."""
        x = x + self.self_attn.output(mixed)
        out: Tensor = x + self.mlp(self.post_attention_layernorm(x))
        return out


def cached_attention(
    queries: Float[Tensor, "R heads Q D"],
    keys: Float[Tensor, "R groups T D"],
    values: Float[Tensor, "R groups T D"],
    mask: Float[Tensor, "R 1 Q T"] | None,
    causal: bool = False,
) -> Float[Tensor, "R heads Q D"]:
    """Attention of the last Q tokens to a cache that holds them already.

    Args:
        queries: of the new tokens.
        keys: of all tokens.
        values: of all tokens.
        mask: additive; None: see everything, or with `causal` everything up to itself.
        causal: the new tokens are a chain.
    """
    num, total = queries.shape[2], keys.shape[2]
    if mask is None and causal and num > 1:
        hidden = torch.ones(num, total, dtype=torch.bool, device=queries.device).triu(total - num + 1)
        mask = torch.zeros(num, total, dtype=queries.dtype, device=queries.device)
        mask = mask.masked_fill_(hidden, torch.finfo(queries.dtype).min)
    return functional.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
