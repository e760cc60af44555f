"""What an inference server counts about itself, read from its /metrics page (Prometheus text).

| | vLLM | SGLang |
|---|---|---|
| tokens written | `vllm:generation_tokens` | `sglang:generation_tokens` |
| prompt tokens read from a cache | `vllm:prompt_tokens_cached` | `sglang:cached_tokens` |
| rounds with a draft | `vllm:spec_decode_num_drafts` | `sglang:spec_verify_calls` |
| draft tokens, accepted ones | `vllm:spec_decode_num_draft_tokens`, `…_num_accepted_tokens` | – |
| accepted ones by position | `vllm:spec_decode_num_accepted_tokens_per_pos` | – |

Only counters are used, whose differences belong to a stretch of time; SGLang's gauges of acceptance are means
over its own intervals.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

_NAMES = {
    "vllm": {
        "generated": "vllm:generation_tokens_total",
        "cached": "vllm:prompt_tokens_cached_total",
        "rounds": "vllm:spec_decode_num_drafts_total",
        "drafted": "vllm:spec_decode_num_draft_tokens_total",
        "accepted": "vllm:spec_decode_num_accepted_tokens_total",
    },
    "sglang": {
        "generated": "sglang:generation_tokens_total",
        "cached": "sglang:cached_tokens_total",
        "rounds": "sglang:spec_verify_calls_total",
    },
}
_BY_POSITION = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
_OLDER_CACHED = "vllm:prefix_cache_hits_total"  # before vLLM counted cached prompt tokens by themselves
_LINE = re.compile(r"^([A-Za-z_:][\w:]*)(?:\{(.*)\})?\s+(\S+)", re.M)
_POSITION = re.compile(r'\bposition="(\d+)"')


class NoCounters(ValueError):
    """A page without the counters of an engine that is known here."""


@dataclass(frozen=True)
class Counters:
    """Counters of a server, or their growth over a stretch of time; None where the engine has none.

    Attributes:
        engine: "vllm" or "sglang".
        generated: tokens written.
        cached: prompt tokens that a cache held.
        rounds: target passes over a draft.
        drafted: draft tokens verified.
        accepted: of these.
        by_position: rounds that accepted their draft up to this position, from the first on.
    """

    engine: str
    generated: int = 0
    cached: int | None = None
    rounds: int | None = None
    drafted: int | None = None
    accepted: int | None = None
    by_position: tuple[int, ...] = ()

    @property
    def tau(self) -> float | None:
        """Tokens per target pass, bonus included; None without rounds.

        An engine also counts what it accepts beyond the end of a text, so this is slightly more than the
        tokens that reach the client.
        """
        if not self.rounds:
            return None
        if self.accepted is None:
            return self.generated / self.rounds
        return 1 + self.accepted / self.rounds

    def since(self, before: Counters) -> Counters:
        """Return the growth from `before` to these.

        Raises:
            ValueError: a counter fell, as it does when the server is started again.
        """
        grown: dict[str, Any] = {"engine": self.engine}
        for name in _counted():
            now, then = getattr(self, name), getattr(before, name)
            grown[name] = None if now is None else now - (then or 0)
        pairs = zip(self.by_position, before.by_position, strict=False)
        grown["by_position"] = tuple(now - then for now, then in pairs)
        fell = min([0, *grown["by_position"], *(grown[name] or 0 for name in _counted())]) < 0
        if fell or len(self.by_position) != len(before.by_position) or self.engine != before.engine:
            raise ValueError("the engine's counters fell: the server was started again in the meantime")
        return Counters(**grown)


def total(parts: Sequence[Counters]) -> Counters:
    """Return the sum of several stretches of one engine.

    Examples:
        >>> total([Counters("vllm", 4, 0, 2, 8, 2, (2, 0)), Counters("vllm", 2, 0, 1, 4, 1, (1, 0))]).tau
        2.0
    """
    sums: dict[str, Any] = {"engine": parts[0].engine}
    for name in _counted():
        values = [getattr(part, name) for part in parts]
        sums[name] = None if None in values else sum(values)
    sums["by_position"] = tuple(map(sum, zip(*(part.by_position for part in parts), strict=True)))
    return Counters(**sums)


def read_counters(page: str) -> Counters:
    """Return the counters on a /metrics page, summed over the engines of one server.

    Args:
        page: in Prometheus' text format.

    Raises:
        NoCounters: neither vLLM's nor SGLang's are on it.

    Examples:
        >>> read_counters('vllm:generation_tokens_total{engine="0"} 44.0').generated
        44
    """
    sums: dict[str, float] = {}
    positions: dict[int, float] = {}
    for name, labels, value in _LINE.findall(page):
        if name.startswith(("vllm:", "sglang:")) and name.endswith("_total"):
            sums[name] = sums.get(name, 0.0) + float(value)
            if name == _BY_POSITION and (found := _POSITION.search(labels)):
                positions[int(found[1])] = positions.get(int(found[1]), 0.0) + float(value)
    engine = next((name for name, known in _NAMES.items() if known["generated"] in sums), None)
    if engine is None:
        raise NoCounters("no counters of vLLM or SGLang")
    found_values = {key: _whole(sums.get(name)) for key, name in _NAMES[engine].items()}
    if engine == "vllm" and found_values["cached"] is None:
        found_values["cached"] = _whole(sums.get(_OLDER_CACHED))
    by_position = tuple(int(positions[at]) for at in sorted(positions))
    return Counters(engine, by_position=by_position, **found_values)  # type: ignore[arg-type]


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def _counted() -> list[str]:
    return [field.name for field in fields(Counters) if field.name not in ("engine", "by_position")]
