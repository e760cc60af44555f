"""Rotary frequencies from their papers' formulas, one at a time; nothing here comes from the package."""

from __future__ import annotations

import math
from typing import Any

LINEAR = {"rope_type": "linear", "factor": 3.0}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 40}


def frequencies(theta: float, size: int, scaling: dict[str, Any] | None) -> tuple[list[float], float]:
    """Angle per position of each pair of a head's numbers, and what cosine and sine are multiplied by."""
    plain = [theta ** (-2 * i / size) for i in range(size // 2)]
    kind = (scaling or {}).get("rope_type", "default")
    if scaling is None or kind == "default":
        return plain, 1.0
    factor = scaling["factor"]
    if kind == "linear":
        return [f / factor for f in plain], 1.0
    trained = scaling["original_max_position_embeddings"]
    if kind == "llama3":
        low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
        found = []
        for f in plain:
            turns = trained * f / (2 * math.pi)
            share = min(max((turns - low) / (high - low), 0.0), 1.0)
            found.append(share * f + (1 - share) * f / factor)
        return found, 1.0
    assert kind == "yarn"

    def pair(turns: float) -> float:
        return size * math.log(trained / (turns * 2 * math.pi)) / (2 * math.log(theta))

    first = max(math.floor(pair(scaling.get("beta_fast", 32))), 0)
    last = min(math.ceil(pair(scaling.get("beta_slow", 1))), size - 1)
    last += 0.001 if first == last else 0
    shares = [min(max((i - first) / (last - first), 0.0), 1.0) for i in range(size // 2)]
    scale = scaling.get("attention_factor", 0.1 * math.log(factor) + 1)
    return [s * f / factor + (1 - s) * f for s, f in zip(shares, plain, strict=True)], scale
