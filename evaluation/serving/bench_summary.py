"""The numbers of a benchmark in the engine, from its passes: speed, acceptance, and whether to believe them.

Axis letters: S repetitions · N prompts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from certdraft.evaluation.measure.acceptance_lengths import Lengths
from certdraft.evaluation.measure.statistics import Interval, compare_ratios, pooled_ratio
from certdraft.evaluation.serving.engine_counters import total
from certdraft.evaluation.serving.own_loop import OwnLoop
from certdraft.evaluation.serving.served_passes import Pass
from certdraft.evaluation.serving.served_requests import Answer, first_difference

SCHEMA = "certdraft.bench/1"
DRIFT = 0.1  # change of tokens/s from the first repetition to the last that is said
_MERGED = 0.02  # share of parts that may have arrived together before they no longer stand for rounds
Passes = Mapping[tuple[str, int], Sequence[Pass]]  # (arm, requests in flight) → repetitions
Floats = NDArray[np.float64]


def summarise(passes: Passes, own: OwnLoop | None = None, seed: int = 0) -> dict[str, Any]:
    """Return the content of bench.json, without what it was measured on.

    Args:
        passes: of one or both arms, the same prompts in each.
        own: our loop on the texts of the arm with the drafter at its smallest load.
        seed: of the bootstrap.
    """
    loads = sorted({requests for _, requests in passes})
    levels = [_level(passes, requests, seed) for requests in loads]
    data: dict[str, Any] = {"schema": SCHEMA, "levels": levels, "own_loop": None}
    if own is not None:
        whole = levels[0]["tau"] is not None
        data["own_loop"] = _own(own.lengths, passes["drafter", loads[0]], whole, seed)
        for text in (text for row in levels if row["texts"] for text in row["texts"]["differing"]):
            text |= own.differences.get((text["prompt"], text["at"]), {})
    data["break_even"] = break_even([(row["requests"], row["speedup"]) for row in levels])
    data["checks"] = checks(data)
    data["warnings"] = [*_losses(levels), *(c["says"] for c in data["checks"] if c["passed"] is False)]
    return data


def _level(passes: Passes, requests: int, seed: int) -> dict[str, Any]:
    runs = {arm: passes[arm, requests] for arm in ("drafter", "plain") if (arm, requests) in passes}
    row: dict[str, Any] = {"requests": requests, "drafter": None, "plain": None, "speedup": None}
    row |= {arm: _speeds(found, seed) for arm, found in runs.items()}
    drafted = runs["drafter"]
    counters = total([run.counters for run in drafted])
    parts, rest = _rounds(drafted)
    row["tau_engine"] = counters.tau
    row["rounds"] = counters.rounds
    row["accepted_by_position"] = [n / counters.rounds for n in counters.by_position if counters.rounds]
    # Parts that arrived together are fewer than the rounds that the engine counted.
    whole = bool(counters.rounds) and abs(parts.sum() / counters.rounds - 1) <= _MERGED
    row["tau"] = vars(pooled_ratio(rest, parts, seed=seed)) if whole and parts.sum() else None
    row["texts"] = None
    if "plain" in runs:
        pairs = [(_columns(runs[arm], "tokens"), _columns(runs[arm], "seconds")) for arm in runs]
        row["speedup"] = vars(compare_ratios(pairs[0], pairs[1], "ratio", seed=seed))
        row["texts"] = _texts(drafted[0].answers, runs["plain"][0].answers)
    return row


def _columns(runs: Sequence[Pass], name: str) -> Floats:
    """One number of every answer, [S, N]."""
    return np.array([[float(getattr(answer, name)) for answer in run.answers] for run in runs])


def _rounds(runs: Sequence[Pass]) -> tuple[Floats, Floats]:
    """Parts and tokens behind the first token of every prompt, [N], over all repetitions."""
    parts = sum(np.array([float(len(a.times) - 1) for a in run.answers]) for run in runs)
    rest = sum(np.array([float(a.tokens) - a.sizes[0] for a in run.answers]) for run in runs)
    return np.asarray(parts), np.asarray(rest)


def _speeds(runs: Sequence[Pass], seed: int) -> dict[str, Any]:
    answers = [answer for run in runs for answer in run.answers]
    gaps = np.concatenate([between_tokens(answer) for answer in answers])
    first = [answer.times[0] for answer in answers]
    speeds = [run.tokens / run.wall_s for run in runs]
    return {
        "tokens_per_s": sum(run.tokens for run in runs) / sum(run.wall_s for run in runs),
        "tokens_per_s_each": speeds,
        "request_tokens_per_s": vars(
            pooled_ratio(_columns(runs, "tokens"), _columns(runs, "seconds"), seed=seed)
        ),
        "between_tokens_ms": _quantiles(gaps),
        "first_token_ms": _quantiles(first),
        "tokens": sum(run.tokens for run in runs),
        "counted_tokens": sum(run.counters.generated for run in runs),
        "cached_prompt_tokens": _sum([run.counters.cached for run in runs]),
        "drift": speeds[-1] / speeds[0] - 1 if len(speeds) > 1 else None,
        "changed_texts": sum(
            a.said != b.said for run in runs[1:] for a, b in zip(run.answers, runs[0].answers, strict=True)
        ),
    }


def between_tokens(answer: Answer) -> Floats:
    """Seconds in front of every token behind the first part; a part's wait is shared by its tokens.

    Examples:
        >>> a = Answer(0, [], [5, 6, 7], "", 3, [0.5, 0.9], [1.0, 2.0], 1.0)
        >>> between_tokens(a).round(3).tolist()
        [0.2, 0.2]
    """
    sizes = np.array(answer.sizes[1:])
    each = np.diff(answer.times) / sizes
    return np.repeat(each, np.maximum(1, sizes.round()).astype(int))


def _quantiles(seconds: Sequence[float] | Floats) -> dict[str, float | None]:
    if not len(seconds):
        return {"p50": None, "p99": None}
    return {f"p{q}": 1000 * float(np.quantile(seconds, q / 100)) for q in (50, 99)}


def _sum(values: Sequence[int | None]) -> int | None:
    return None if None in values else sum(value or 0 for value in values)


def _texts(with_drafter: Sequence[Answer], plain: Sequence[Answer]) -> dict[str, Any]:
    differing = []
    for first, second in zip(with_drafter, plain, strict=True):
        if first.said != second.said:
            at = first_difference(first.said, second.said)
            differing.append({"prompt": first.prompt, "at": at, "tokens": [first.tokens, second.tokens]})
    return {
        "prompts": len(plain),
        "equal": len(plain) - len(differing),
        "equal_prompts": sum(a.prompt_ids == b.prompt_ids for a, b in zip(with_drafter, plain, strict=True)),
        "equal_token_counts": sum(a.tokens == b.tokens for a, b in zip(with_drafter, plain, strict=True)),
        "unit": "token" if plain[0].ids else "character",
        "differing": differing,
    }


def _own(own: Lengths, served: Sequence[Pass], whole: bool, seed: int) -> dict[str, Any]:
    """Our loop's τ; where parts stand for rounds, also the server's less ours, paired by prompt."""
    tokens, passes = own.counts()
    difference = None
    if whole:
        kept = [index for index, answer in enumerate(served[0].answers) if len(answer.ids) > 1]
        parts, rest = (column[kept] for column in _rounds(served))
        difference = compare_ratios((rest, parts), (tokens, passes), "difference", seed=seed)
    return {
        "tau": vars(pooled_ratio(tokens, passes, seed=seed)),
        "accepted_by_position": [accepted / own.rejections["rounds"] for accepted in own.accepted],
        "served_minus_own": None if difference is None else vars(difference),
        "agrees": None if difference is None else not difference.excludes(0.0),
    }


def break_even(speedups: Sequence[tuple[int, Mapping[str, Any] | None]]) -> float | None:
    """Return the load at which the speed-up falls to 1, on a line between the logarithms of two loads.

    Args:
        speedups: (requests in flight, interval), loads ascending.

    Returns:
        None where every speed-up is above 1, 0 where the first one is not.

    Examples:
        >>> break_even([(1, {"value": 1.5}), (2, {"value": 1.25}), (8, {"value": 0.75})])
        4.0
    """
    known = [(load, row["value"]) for load, row in speedups if row is not None]
    if known and known[0][1] <= 1:
        return 0.0
    for (load, value), (next_load, next_value) in zip(known, known[1:], strict=False):
        if next_value <= 1:
            share = (value - 1) / (value - next_value)
            return float(round(math.exp(math.log(load) + share * math.log(next_load / load)), 6))
    return None


def _losses(levels: Sequence[Mapping[str, Any]]) -> list[str]:
    """A plain sentence for every load at which the drafter costs more than it gives."""
    found = []
    for row in levels:
        if row["speedup"] is not None and row["speedup"]["value"] < 1:
            speedup = Interval(**row["speedup"])
            sure = "costs more than it gives" if speedup.excludes(1.0) else "is not shown to help"
            found.append(
                f"at {row['requests']} requests the drafter {sure}: speed-up {speedup.value:.2f} "
                f"[{speedup.low:.2f}, {speedup.high:.2f}]"
            )
    return found


def checks(data: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return what was checked: name, passed (None: could not be checked) and a sentence."""
    levels = data["levels"]
    arms = [
        (f"{row['requests']} requests, {_ARM[arm]}", row[arm]) for row in levels for arm in _ARM if row[arm]
    ]
    found = [
        _same(levels, "same prompts", "equal_prompts", "prompts were read as other token ids"),
        _same(levels, "same texts", "equal", f"texts differ with and without the drafter{_ties(levels)}"),
        _same(levels, "same token counts", "equal_token_counts", "answers are of another length"),
        _listed(
            "same texts every time",
            [f"{label}: {row['changed_texts']}" for label, row in arms if row["changed_texts"]],
            "texts changed from one repetition to another, so the server is not deterministic at this load",
            None if all(row["drift"] is None for _, row in arms) else True,
        ),
        _listed(
            "no other clients",
            [
                f"{label}: {row['counted_tokens']} counted, {row['tokens']} received"
                for label, row in arms
                if row["counted_tokens"] != row["tokens"]
            ],
            "the engine counted other tokens than were received, so another client uses this server",
        ),
        _listed(
            "no cache hits",
            [
                f"{label}: {row['cached_prompt_tokens']} tokens"
                for label, row in arms
                if row["cached_prompt_tokens"]
            ],
            "prompt tokens came from a prefix cache; start the server without it",
            None if any(row["cached_prompt_tokens"] is None for _, row in arms) else True,
        ),
        _listed(
            "no drift",
            [
                f"{label}: {100 * row['drift']:+.0f} %"
                for label, row in arms
                if row["drift"] is not None and abs(row["drift"]) > DRIFT
            ],
            "tokens/s changed from the first repetition to the last; something else uses the machine, or it "
            "was not warm",
            None if all(row["drift"] is None for _, row in arms) else True,
        ),
    ]
    if own := data["own_loop"]:
        apart = own["served_minus_own"]
        found.append(
            _listed(
                "our loop's τ",
                [f"{apart['value']:+.3f} [{apart['low']:+.3f}, {apart['high']:+.3f}]"]
                if own["agrees"] is False
                else [],
                "the served τ differs from our loop's on the same texts; the export may be read wrongly",
                own["agrees"],
            )
        )
    return found


_ARM = {"drafter": "with the drafter", "plain": "without"}


def _same(levels: Sequence[Mapping[str, Any]], name: str, key: str, says: str) -> dict[str, Any]:
    known = [row for row in levels if row["texts"] is not None]
    counts = [(row["requests"], row["texts"]["prompts"], row["texts"][key]) for row in known]
    apart = [f"{load} requests: {total - equal} of {total}" for load, total, equal in counts if equal < total]
    return _listed(name, apart, says, True if known else None)


def _ties(levels: Sequence[Mapping[str, Any]]) -> str:
    """How many of the texts that differ do so where the target is tied, as far as our loop looked."""
    texts = [text for row in levels if row["texts"] for text in row["texts"]["differing"] if "tie" in text]
    if not texts:
        return ""
    tied = sum(text["tie"] for text in texts)
    return f", {tied} of {len(texts)} where the target's logits are tied up to rounding"


def _listed(name: str, found: Sequence[str], says: str, clean: bool | None = True) -> dict[str, Any]:
    if found:
        return {"check": name, "passed": False, "says": f"{says} ({'; '.join(found)})"}
    return {"check": name, "passed": clean, "says": "" if clean else "could not be checked"}
