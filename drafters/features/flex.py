"""Attention through flex_attention block masks: what CUDA runs in place of masks of T x T numbers.

A block mask lists the 128 x 128 blocks in which queries see keys; the others cost nothing, and inside a block
visibility is computed, not read. Each function has a twin that runs anywhere (`grouped_attention`, torch's
scaled_dot_product_attention), and is tested against it in value and gradient.

Letters: R rows, A groups, Q queries of a group or of a row, S keys, N key-value heads,
D head size.
"""

from __future__ import annotations

import functools
from types import FunctionType
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn.attention.flex_attention import BlockMask, flex_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from certdraft.drafters.features.visible_spans import VisibleSpans

ATTENTION = "sdpa_or_block_mask"

_BACKENDS = {"cuda": "inductor"}  # of torch.compile, where block masks are used
_MOST_GRAPHS = 64  # of one caller: gradients or none, one row or more, types, sizes equal by accident


def takes_block_masks(device: torch.device) -> bool:
    """Whether training on this device goes through block masks."""
    return device.type in _BACKENDS


def grouped_flex_attention(
    queries: Float[Tensor, "R heads A Q D"],
    context: tuple[Tensor, Tensor],
    own: tuple[Tensor, Tensor] | None,
    visible: VisibleSpans,
    caller: str = "",
) -> Float[Tensor, "R heads A Q D"]:
    """`grouped_attention` with one flex_attention call; same arguments and result."""
    num_groups, num_queries = queries.shape[2:4]
    num_own = 0 if own is None else own[0].shape[3]
    mask = visible.block_mask(num_queries, context[0].shape[2], num_own)
    mixed = _flex(caller, queries.flatten(2, 3), *joined(context, own), mask)
    return mixed.unflatten(2, (num_groups, num_queries))


def joined(
    context: tuple[Tensor, Tensor], own: tuple[Tensor, Tensor] | None
) -> tuple[Float[Tensor, "R N S D"], Float[Tensor, "R N S D"]]:
    """Keys and values on one axis: those of the context, then those of the groups, group after group."""
    keys, values = context
    if own is not None:
        keys = torch.cat([keys, own[0].flatten(2, 3)], 2)
        values = torch.cat([values, own[1].flatten(2, 3)], 2)
    return keys, values


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
    mixed = _flex(type(module).__name__, query, key, value, attention_mask, options.get("scaling"))
    return mixed.transpose(1, 2).contiguous(), None


@torch.compiler.disable  # type: ignore[untyped-decorator]
def _flex(
    caller: str,
    query: Float[Tensor, "R heads Q D"],
    key: Float[Tensor, "R N S D"],
    value: Float[Tensor, "R N S D"],
    mask: BlockMask,
    scale: float | None = None,
) -> Float[Tensor, "R heads Q D"]:
    """flex_attention in one type: under autocast, norms leave queries and keys wider than values.

    Apart from a layer that is compiled itself, whose fallback to uncompiled code would hold all scores.

    Raises:
        FailOnRecompileLimitHit: more graphs than `_MOST_GRAPHS`; uncompiled code is no way out.
    """
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    query, key, value = (part.to(dtype) for part in (query, key, value))
    if device not in _BACKENDS:  # uncompiled it is a readable reference
        return _call(query, key, value, mask, scale)
    # A scale that is a number of the graph, not an input of it, is what the kernels take.
    with torch._dynamo.config.patch(recompile_limit=_MOST_GRAPHS, specialize_float=True):
        mixed: Tensor = _compiled(caller, _BACKENDS[device])(query, key, value, mask, scale)
    return mixed


def _call(query: Tensor, key: Tensor, value: Tensor, mask: BlockMask, scale: float | None) -> Tensor:
    mixed: Tensor = flex_attention(query, key, value, block_mask=mask, scale=scale, enable_gqa=True)
    return mixed


@functools.cache
def _compiled(caller: str, backend: str) -> Any:
    """`_call` compiled for one caller: graphs are counted by code object, so each caller has a copy of it.

    With fullgraph, torch raises at the limit of graphs where it would go on uncompiled, with all scores held.
    """
    code = _call.__code__.replace(co_name=f"flex_attention_{caller}")
    copy = FunctionType(code, _call.__globals__)
    return torch.compile(copy, backend=backend, fullgraph=True, dynamic=True)
