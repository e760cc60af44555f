"""The table of collaborative arbitration: a policy beside both models, its baselines and its ceiling.

Every arm answers the same problems in the same window. Baselines get the override rate of the policy, matched
on problems that are not measured, so that what differs is where they override and not how often.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from scipy.stats import binomtest
from torch import Tensor

from certdraft.arbitration import LogRatio, Policy, Problem, RandomArbitration, TypicalAcceptance
from certdraft.arbitration.environment import ArbitrationEnv, VerifiedTexts, always, never
from certdraft.evaluation import Interval, Table, compare_ratios, pooled_ratio


@dataclass(frozen=True)
class Arm:
    """What one way of deciding did on each of P problems.

    Attributes:
        right: verdicts.
        tokens: new tokens.
        passes: target passes.
        overrides: draft tokens taken at mismatches.
        mismatches: decisions.
        beneficial: overrides without which the answer would have been wrong, the policy deciding the rest.
        harmful: overrides without which it would have been right.
        neutral: overrides that change nothing.
    """

    right: Bool[Tensor, " P"]
    tokens: Int[Tensor, " P"]
    passes: Int[Tensor, " P"]
    overrides: Int[Tensor, " P"]
    mismatches: Int[Tensor, " P"]
    beneficial: int | None = None
    harmful: int | None = None
    neutral: int | None = None


@dataclass(frozen=True)
class ArbitrationResult:
    """One run's arms on the test problems, and the ceilings.

    Attributes:
        arms: name → what it did; "target", "drafter", "policy" and the baselines at its override rate.
        any_path: problems that some path of decisions answers rightly.
        paths_cut: problems whose paths were not all tried.
        agreement: share of the policy's decisions that took the right branch, where just one branch is right.
        labels: decisions that share is computed from.
        families: of the problems.
    """

    arms: dict[str, Arm]
    any_path: Bool[Tensor, " P"]
    paths_cut: int
    agreement: float | None
    labels: int
    families: list[str]


def measure_arbitration(
    env: ArbitrationEnv,
    policy: Policy,
    test: Sequence[Problem],
    matching: Sequence[Problem],
    *,
    threshold: float = 0.5,
    max_paths: int = 256,
    seed: int = 0,
) -> ArbitrationResult:
    """All arms on the test problems.

    Args:
        env: writes and verifies texts.
        policy: the trained one.
        test: problems that are measured.
        matching: other problems, on which the baselines' numbers are chosen.
        threshold: of the policy.
        max_paths: per problem, for the ceiling.
        seed: of random arbitration.

    Raises:
        ValueError: no problems to measure or to match on.
    """
    if not test or not matching:
        raise ValueError(f"{len(test)} test and {len(matching)} matching problems; both must be given")
    verified = env.write(test, policy, threshold=threshold)
    effects, agreement, labels = _counterfactuals(env, policy, test, verified)
    arms = {
        "target": _arm(env.write(test, never)),
        "drafter": _arm(env.write(test, always)),
        "policy": _arm(verified, effects),
    }
    rate = override_rate(env.write(matching, policy, threshold=threshold))
    for name, baseline in matched_baselines(env, matching, rate, seed).items():
        arms[name] = _arm(env.write(test, baseline))
    known = torch.stack([arm.right for arm in arms.values()]).any(0)  # every arm went along some path
    right, cut = env.any_path(test, max_paths, known)
    return ArbitrationResult(arms, right, cut, agreement, labels, [problem.family for problem in test])


def override_rate(verified: VerifiedTexts) -> float:
    """Overrides ÷ mismatches, pooled; 0 where there is no mismatch."""
    return float(verified.rollouts.overrides.sum()) / max(1, int(verified.rollouts.mismatches.sum()))


def matched_baselines(
    env: ArbitrationEnv, problems: Sequence[Problem], rate: float, seed: int = 0
) -> dict[str, Policy]:
    """Log-ratio threshold, typical acceptance and a coin whose override rate on these problems is `rate`.

    Args:
        env: writes texts.
        problems: not the ones that will be measured.
        rate: overrides ÷ mismatches to be met.
        seed: of the coin.
    """
    makers: dict[str, tuple[Callable[[float], Policy], float, float]] = {
        "log-ratio threshold": (LogRatio, 0.0, 25.0),
        "typical acceptance": (lambda log: TypicalAcceptance(math.exp(-log)), -10.0, 25.0),
        "random": (lambda share: RandomArbitration(share, seed), 0.0, 1.0),
    }
    found: dict[str, Policy] = {}
    for name, (make, low, high) in makers.items():
        for _ in range(10):  # the rate grows with the number
            middle = (low + high) / 2
            if override_rate(env.write(problems, make(middle))) < rate:
                low = middle
            else:
                high = middle
        found[name] = make((low + high) / 2 if rate else low)
    return found


def summarise(results: Sequence[ArbitrationResult], confidence: float = 0.95) -> dict[str, Any]:
    """Numbers of the table over several seeds, with paired tests against the target alone.

    Args:
        results: one per seed, each on as many problems.
        confidence: of the intervals; crossed over seeds and problems where there are several seeds.

    Returns:
        Plain data: per arm accuracy, gain over target and drafter, τ, its ratio to the target's, passes per
        answer and override numbers; the ceilings; per-seed values.
    """

    def stack(pick: Callable[[ArbitrationResult], Tensor]) -> Float[np.ndarray, "S P"]:
        return np.stack([pick(result).double().numpy() for result in results])

    ones = np.ones((len(results), len(results[0].families)))
    target_right = stack(lambda r: r.arms["target"].right)
    drafter_right = stack(lambda r: r.arms["drafter"].right)
    ceiling = stack(lambda r: r.any_path)
    table: dict[str, Any] = {}
    for name in results[0].arms:

        def column(field: str, name: str = name) -> Float[np.ndarray, "S P"]:
            return stack(lambda r: getattr(r.arms[name], field))

        verdicts = column("right")
        tau = column("tokens"), column("passes")
        target_tau = (
            stack(lambda r: r.arms["target"].tokens), stack(lambda r: r.arms["target"].passes)
        )  # fmt: skip
        row: dict[str, Any] = {
            "accuracy": _interval(pooled_ratio(verdicts, ones, confidence=confidence)),
            "accuracy per seed": verdicts.mean(-1).round(4).tolist(),
            "tau": _interval(pooled_ratio(*tau, confidence=confidence)),
            "passes per answer": round(float(column("passes").mean()), 3),
            "override rate": round(
                float(column("overrides").sum() / max(1.0, column("mismatches").sum())), 4
            ),
            "overrides per answer": round(float(column("overrides").mean()), 3),
        }
        if name != "target":
            row["gain over target"] = _interval(
                compare_ratios((verdicts, ones), (target_right, ones), confidence=confidence)
            )
            row["McNemar p against target, per seed"] = [
                mcnemar(a, b) for a, b in zip(verdicts, target_right, strict=True)
            ]
            row["tau against target"] = _interval(
                compare_ratios(tau, target_tau, "ratio", confidence=confidence)
            )
        if name not in ("target", "drafter"):
            row["gain over drafter"] = _interval(
                compare_ratios((verdicts, ones), (drafter_right, ones), confidence=confidence)
            )
            room = ceiling.mean(-1) - target_right.mean(-1)
            closed = (verdicts.mean(-1) - target_right.mean(-1)) / np.where(room > 0, room, np.nan)
            row["share of the gap to any path"] = _round(float(np.mean(closed)))
            row["share of the gap per seed"] = [_round(float(share)) for share in closed]
        if results[0].arms[name].beneficial is not None:
            for effect in ("beneficial", "harmful", "neutral"):
                row[f"{effect} overrides"] = sum(getattr(result.arms[name], effect) for result in results)
        table[name] = row
    either = np.maximum(target_right, drafter_right)
    families = np.array([result.families for result in results])  # [S, P]
    right = {
        "target": target_right, "drafter": drafter_right, "policy": stack(lambda r: r.arms["policy"].right)
    }  # fmt: skip
    return {
        "seeds": len(results),
        "problems per seed": ones.shape[1],
        "arms": table,
        "either model right": round(float(either.mean()), 4),
        "any path right": _interval(pooled_ratio(ceiling, ones, confidence=confidence)),
        "problems with paths not tried": sum(result.paths_cut for result in results),
        "agreement with the right branch": [_round(result.agreement) for result in results],
        "branch labels": [result.labels for result in results],
        "accuracy by family": {
            family: {name: round(float(right[name][families == family].mean()), 4) for name in right}
            for family in sorted(set(families.flat))
        },
    }


def mcnemar(first: Sequence[float], second: Sequence[float]) -> float:
    """Exact two-sided p of McNemar's test on paired verdicts; 1 where they never differ.

    Examples:
        >>> mcnemar([1, 1, 1, 1, 1, 1, 0], [0, 0, 0, 0, 0, 0, 0])
        0.03125
    """
    a, b = np.asarray(first, dtype=bool), np.asarray(second, dtype=bool)
    better, worse = int((a & ~b).sum()), int((~a & b).sum())
    return float(binomtest(better, better + worse).pvalue) if better + worse else 1.0


def arbitration_table(summary: dict[str, Any]) -> Table:
    """Return the arms of a summary as a table, one row each, and the ceilings."""
    rows = []
    for name, row in summary["arms"].items():
        gain = row.get("gain over target")
        shown = f"{gain['value']:+.3f} [{gain['low']:+.3f}, {gain['high']:+.3f}]" if gain else ""
        numbers = (
            f"{row['override rate']:.3f}",
            f"{row['tau']['value']:.2f}",
            f"{row['passes per answer']:.2f}",
        )
        rows.append([name, f"{row['accuracy']['value']:.3f}", shown, *numbers])
    for name, share in (
        ("either model", summary["either model right"]),
        ("any path", summary["any path right"]["value"]),
    ):
        rows.append([name, f"{share:.3f}", "", "", "", ""])
    columns = ["arm", "accuracy", "gain over target", "override rate", "τ", "passes/answer"]
    return Table("Accuracy and speed of each arm", columns, rows)


def _counterfactuals(
    env: ArbitrationEnv, policy: Policy, problems: Sequence[Problem], verified: VerifiedTexts
) -> tuple[tuple[int, int, int], float | None, int]:
    """Effects of the overrides made, and how often a decision took the right branch where one is."""
    rollouts = verified.rollouts
    which = list(zip(rollouts.row.tolist(), rollouts.index.tolist(), strict=True))
    flipped = env.flips(problems, verified, policy, which)
    made = verified.right[rollouts.row.cpu()]
    taken = rollouts.taken.cpu()
    beneficial, harmful = int((taken & made & ~flipped).sum()), int((taken & ~made & flipped).sum())
    told = made != flipped
    agreement = float(made[told].float().mean()) if bool(told.any()) else None
    return (beneficial, harmful, int(taken.sum()) - beneficial - harmful), agreement, int(told.sum())


def _arm(verified: VerifiedTexts, effects: tuple[int, int, int] | None = None) -> Arm:
    rollouts = verified.rollouts
    counts = (rollouts.passes.cpu(), rollouts.overrides.cpu(), rollouts.mismatches.cpu())
    return Arm(verified.right, verified.num_tokens, *counts, *(effects or ()))


def _interval(interval: Interval) -> dict[str, float]:
    return {name: round(getattr(interval, name), 4) for name in ("value", "low", "high")}


def _round(value: float | None) -> float | None:
    return None if value is None or math.isnan(value) else round(value, 4)
