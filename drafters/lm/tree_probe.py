"""A numeric check that a model decodes token trees, or chains, as it reads plain text, run once per model.

Configs of new architectures state their windows, logit scales and position tricks under new names; numbers
show them all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakSet

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from certdraft.drafters.lm.cached_lm import CachedLM

_PARENTS = (-1, 0, 0, 1, 1, 2, -1, 6)
_PATHS = ((0, 1, 3), (0, 1, 4), (0, 2, 5), (6, 7))  # of the leaves
_DEPTH = 3
_MAX_PREFIX = 16
_TOLERANCE = {torch.float64: 1e-5, torch.float32: 2e-3}  # relative; 16-bit floats round differently by shape
_TOLERANCE_16_BIT = 0.1

_checked: WeakSet[nn.Module] = WeakSet()


@torch.no_grad()
def check_decoding(lm: CachedLM) -> None:
    """Compare the logits of a small tree with those of plain passes, unless the model was checked before.

    A model that reads tokens in order is compared on chains, of which some tokens are taken back.

    Models on the meta device, in training mode, or too small for the tree are not probed.

    Raises:
        ValueError: the logits differ, or the model cannot be run this way at all; names its class.
    """
    model, limit = lm.model, lm.facts.context_limit
    if model in _checked or model.training or lm.device.type == "meta":
        return
    _checked.add(model)
    prefix = min(_MAX_PREFIX, (limit or _MAX_PREFIX + _DEPTH) - _DEPTH)
    if prefix < 1:
        return
    tokens = (torch.arange(prefix + len(_PARENTS)) * 7 + 1) % lm.vocab_size
    text, nodes = tokens[:prefix], tokens[prefix:]
    rows = torch.zeros(len(_PATHS), prefix + _DEPTH, dtype=torch.long)
    for row, path in zip(rows, _PATHS, strict=True):
        row[: prefix + len(path)] = torch.cat([text, nodes[list(path)]])
    try:
        if lm.facts.recurrent:
            tree, rows = _chains(lm, text, nodes)
        else:
            tree = lm.extend(lm.prefill(text, room=1), nodes, _PARENTS)
        plain = model(input_ids=rows.to(lm.device), use_cache=False).logits.float()
    except (RuntimeError, TypeError, AttributeError, IndexError, KeyError, ValueError) as error:
        _checked.discard(model)
        raise ValueError(
            f"{lm.facts.name} cannot decode {_shapes(lm)}: {type(error).__name__}: {error}. Use a causal LM "
            "whose layers attend to all previous tokens, such as Qwen3 or Llama."
        ) from error
    if lm.facts.recurrent:
        expected = plain[0, -len(tree) :]
    else:
        places = [_place(node) for node in range(len(_PARENTS))]
        expected = torch.stack([plain[row, prefix + depth] for row, depth in places])
    errors = _relative_errors(tree, expected)
    # In 16 bits a router's near-tie sends one node to other experts; a wrong mask shows at most nodes.
    error_ = float(errors.max() if lm.dtype in _TOLERANCE else errors.median())
    if error_ > _TOLERANCE.get(lm.dtype, _TOLERANCE_16_BIT):
        _checked.discard(model)
        raise ValueError(
            f"{lm.facts.name} does not decode {_shapes(lm)} as it reads plain text: logits differ by "
            f"{100 * error_:.1f} %. Its attention, its positions or its logits follow rules that certdraft "
            "does not know, so nothing decoded with it would be lossless. Use another model, such as Qwen3 "
            "or Llama."
        )


def _chains(lm: CachedLM, text: Tensor, nodes: Tensor) -> tuple[Tensor, Tensor]:
    """Logits after the last nodes of a text decoded in three rounds, and that text [1, T].

    Of the first round everything is kept, of the second one token of three; the third reads on from there.
    """
    cache = lm.prefill(text, room=1)
    lm.extend(cache, nodes[:2])
    cache.keep([0, 1])
    lm.extend(cache, nodes[2:5])
    cache.keep([0])
    logits = lm.extend(cache, nodes[5:])
    return logits, torch.cat([text, nodes[:3], nodes[5:]])[None]


def _shapes(lm: CachedLM) -> str:
    return "chains" if lm.facts.recurrent else "token trees"


def _place(node: int) -> tuple[int, int]:
    """Row and depth of a node among the leaves' paths."""
    return next((row, path.index(node)) for row, path in enumerate(_PATHS) if node in path)


def _relative_errors(found: Tensor, expected: Tensor) -> Tensor:
    """Norm of the difference over the norm of the centred logits, by node; NaN where they are not finite."""
    spread = (expected - expected.mean(-1, keepdim=True)).norm(dim=-1)
    return (found - expected).norm(dim=-1) / spread.clamp_min(1e-30)
