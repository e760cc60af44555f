"""Rotary positions: their frequencies, plain or scaled, and how a config.json states them.

Scaled ones are those that transformers computes and engines serve: linear, llama3 and yarn. transformers
itself makes the frequencies, so that they are its own to the last bit; what is done with them is here.

Letters: R rows, T tokens, D head size.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

_TRAINED = "original_max_position_embeddings"
# Keys of each kind of scaling: those it needs, and those it may have.
_SCALINGS: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    "linear": (frozenset({"factor"}), frozenset()),
    "llama3": (frozenset({"factor", "low_freq_factor", "high_freq_factor", _TRAINED}), frozenset()),
    "yarn": (
        frozenset({"factor", _TRAINED}),
        frozenset("attention_factor beta_fast beta_slow mscale mscale_all_dim truncate".split()),
    ),
}


def checked_scaling(
    scaling: Mapping[str, Any] | None, max_positions: int, where: str
) -> dict[str, Any] | None:
    """Return a scaling with all that it needs, or None where positions are not scaled.

    Args:
        scaling: keys of transformers' `rope_parameters`, without `rope_theta`.
        max_positions: what it was trained at where it does not say, as in transformers.
        where: for messages.

    Raises:
        ValueError: a kind other than linear, llama3 and yarn, or keys missing, unknown or no numbers.

    Examples:
        >>> checked_scaling({"type": "linear", "factor": 2.0}, 128, "here")
        {'rope_type': 'linear', 'factor': 2.0}
    """
    keys = {key: value for key, value in (scaling or {}).items() if value is not None}
    kind = keys.pop("rope_type", keys.pop("type", "default"))
    keys.pop("type", None)
    if keys.pop("partial_rotary_factor", 1.0) != 1.0:
        raise ValueError(
            f"{where} rotates a part of each head (partial_rotary_factor); that is not computed."
        )
    if kind == "default" and not keys:
        return None
    if kind not in _SCALINGS:
        raise ValueError(
            f"{where} scales its rotary positions by {kind!r} ({', '.join(sorted(map(str, keys)))}); only "
            f"{', '.join(_SCALINGS)} are computed."
        )
    needed, optional = _SCALINGS[kind]
    if _TRAINED in needed:
        keys.setdefault(_TRAINED, max_positions)
    missing, unknown = sorted(needed - keys.keys()), sorted(keys.keys() - needed - optional)
    odd = sorted(key for key, value in keys.items() if not isinstance(value, int | float))
    if missing or unknown or odd:
        raise ValueError(
            f"{where}: rotary positions of kind {kind}: missing {missing}, unknown {unknown}, no numbers "
            f"{odd}."
        )
    return {"rope_type": kind, **keys}


def read_rope(config: Mapping[str, Any], where: str) -> tuple[float, dict[str, Any] | None]:
    """Return base and scaling of a config.json, old names or new.

    Raises:
        ValueError: no base, two of them, two different scalings, or one that is not computed.
    """
    modern, legacy = config.get("rope_parameters") or {}, config.get("rope_scaling") or {}
    if any(isinstance(value, Mapping) for value in (*modern.values(), *legacy.values())):
        raise ValueError(f"{where} has rotary positions for each kind of layer; one for all is computed.")
    positions = config["max_position_embeddings"]
    scalings = [
        checked_scaling({key: section[key] for key in section if key != "rope_theta"}, positions, where)
        for section in (modern, legacy)
        if section
    ]
    if any(scaling != scalings[0] for scaling in scalings):
        raise ValueError(
            f"{where}: rope_parameters and rope_scaling scale rotary positions differently ({modern}, "
            f"{legacy}); readers would disagree. Find out which is right and remove the other."
        )
    bases = (config.get("rope_theta"), modern.get("rope_theta"), legacy.get("rope_theta"))
    found = {value for value in bases if value is not None}
    if len(found) != 1:
        raise ValueError(f"{where}: needs one rope_theta, or the same one twice; found {sorted(found)}.")
    return float(found.pop()), scalings[0] if scalings else None


def rope_to_json(theta: float, scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    """The keys of a config.json, for readers of old names and of new ones."""
    return {
        "rope_theta": theta,
        "rope_scaling": dict(scaling) if scaling else None,
        "rope_parameters": {"rope_type": "default", **(scaling or {}), "rope_theta": theta},
    }


class Rotary(nn.Module):
    """Rotary position embedding, halves rotated against each other as in Llama; angles in fp32.

    Args:
        head_dim: D.
        theta: base of the frequencies.
        scaling: as `checked_scaling` returns it.
        max_positions: positions it may be used at.
    """

    frequencies: Tensor

    def __init__(
        self, head_dim: int, theta: float, scaling: Mapping[str, Any] | None, max_positions: int
    ) -> None:
        super().__init__()
        rope = rope_to_json(theta, scaling)["rope_parameters"]
        config = LlamaConfig(
            hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim, rope_parameters=rope,
            max_position_embeddings=max_positions,
        )  # fmt: skip
        with torch.device("cpu"):  # even where a network is made without numbers
            theirs = LlamaRotaryEmbedding(config)
        self.register_buffer("frequencies", theirs.inv_freq.float(), persistent=False)  # see Drafter._apply
        self.scale = float(theirs.attention_scaling)  # of both cosine and sine

    def forward(
        self, x: Float[Tensor, "R heads T D"], positions: Int[Tensor, "R T"]
    ) -> Float[Tensor, "R heads T D"]:
        with torch.autocast(x.device.type, enabled=False):
            angles = positions.float()[:, None, :, None] * self.frequencies  # [R, 1, T, D/2]
            cos, sin = (angles.cos() * self.scale).to(x.dtype), (angles.sin() * self.scale).to(x.dtype)
        low, high = x.chunk(2, -1)
        return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)
