"""Attention through flex_attention block masks: what CUDA runs in place of masks of T x T numbers.

A block mask lists the 128 x 128 blocks in which any query sees any key; the others cost nothing, and inside a
block visibility is computed, not read. Each function has a twin that runs anywhere (`grouped_attention`,
torch's scaled_dot_product_attention), and is tested against it in value and gradient.

Letters: R rows, T tokens of a row, A groups, Q queries of a group, N key-value heads, D head size.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, create_block_mask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

ATTENTION = "sdpa_or_block_mask"


def document_block_mask(document_ids: Int[Tensor, "R T"]) -> BlockMask:
    """Causal attention within documents of packed rows: block mask of [R, 1, T, T].

    Padding (−1) sees earlier padding and itself, so no softmax is empty.
    """

    def visible(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (query >= key) & (document_ids[row, query] == document_ids[row, key])

    rows, num = document_ids.shape
    return create_block_mask(visible, rows, None, num, num, device=document_ids.device)


def grouped_flex_attention(
    queries: Float[Tensor, "R heads A Q D"],
    context: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor] | None,
    visible: Bool[Tensor, "R A T"],
    first: Int[Tensor, "R A Q"] | None = None,
    own_visible: Bool[Tensor, "Q M"] | None = None,
) -> Float[Tensor, "R heads A Q D"]:
    """`grouped_attention` with one flex_attention call; same arguments and result.

    Keys are those of the context, then those of the groups, group after group.
    """
    num_rows, _, num_groups, num_queries, _ = queries.shape
    keys, values, sees = joined_keys(context, own, visible, num_queries, first, own_visible)
    mask = create_block_mask(
        sees, num_rows, None, num_groups * num_queries, keys.shape[2], device=queries.device
    )
    device = queries.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else queries.dtype
    q, k, v = (part.to(dtype) for part in (queries.flatten(2, 3), keys, values))
    mixed: Tensor = _flex(device)(q, k, v, block_mask=mask, enable_gqa=True)
    return mixed.unflatten(2, (num_groups, num_queries))


def joined_keys(
    context: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor] | None,
    visible: Bool[Tensor, "R A T"],
    num_queries: int,
    first: Int[Tensor, "R A Q"] | None = None,
    own_visible: Bool[Tensor, "Q M"] | None = None,
) -> tuple[Float[Tensor, "R N S D"], Float[Tensor, "R N S D"], Callable[..., Tensor]]:
    """Keys and values of context and groups on one axis, and which query sees which key of it.

    Returns:
        Keys, values, and the mask function (row, head, query, key) → bool, where query counts A·Q queries,
        group after group.
    """
    keys, values = context
    num_context = keys.shape[2]
    num_own = 0 if own is None else own[0].shape[3]
    if own is not None:
        keys = torch.cat([keys, own[0].flatten(2, 3)], 2)
        values = torch.cat([values, own[1].flatten(2, 3)], 2)

    def sees(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        group = query // num_queries
        shared = visible[row, group, key.clamp(max=num_context - 1)] & (key < num_context)
        if first is not None:
            shared = shared & (key >= first[row, group, query % num_queries])
        if not num_own:
            return shared
        mine = (key >= num_context) & ((key - num_context) // num_own == group)
        if own_visible is not None:
            mine = mine & own_visible[query % num_queries, (key - num_context) % num_own]
        return shared | mine

    return keys, values, sees


def use_block_masks(model: PreTrainedModel) -> None:
    """Let a transformers model take block masks too: those go through flex_attention, others to sdpa."""
    if ATTENTION not in ALL_ATTENTION_FUNCTIONS:
        AttentionInterface.register(ATTENTION, _attend)
        AttentionMaskInterface.register(ATTENTION, sdpa_mask)
    model.set_attn_implementation(ATTENTION)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **options: Any
) -> tuple[Tensor, Tensor | None]:
    if not isinstance(attention_mask, BlockMask):
        sdpa: Any = ALL_ATTENTION_FUNCTIONS["sdpa"]
        return sdpa(module, query, key, value, attention_mask, **options)
    mixed: Tensor = _flex(query.device.type)(
        query, key, value, block_mask=attention_mask, scale=options.get("scaling"), enable_gqa=True
    )
    return mixed.transpose(1, 2).contiguous(), None


@functools.cache
def _flex(device: str) -> Any:
    """flex_attention, compiled where its kernels are; uncompiled it is a readable reference."""
    return torch.compile(flex_attention, dynamic=True) if device == "cuda" else flex_attention
