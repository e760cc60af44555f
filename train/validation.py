"""Validation metrics of a drafter as sums over token positions, which batches and ranks add up."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy.typing import NDArray
from torch import Tensor

from certdraft.certificates import coarse_kl, coarse_radius, kl_divergence_logp, margin, num_tail_above
from certdraft.losses import TargetBatch
from certdraft.train.restricted_target import DraftVocabulary

_BUILT_IN = re.compile(r"(low_margin_)?coverage@\d+|certified@\d+|kl_nats|tau_expected|step")


class ValidationMetric(ABC):
    """One number a validation, the mean of a value that every token position has.

    A subclass goes into `validation.extra` of `DrafterModule`, in Python or by `class_path` in YAML. It is
    logged as `val/NAME` (`test/NAME`), so `checkpoint.monitor` can follow it, and is printed on model cards.

    Attributes:
        name: what it is logged as; letters, digits and `_@.-` only.
    """

    name: str

    @abstractmethod
    def __call__(
        self, logits: Float[Tensor, "N V"], target: TargetBatch
    ) -> Float[Tensor, " N"] | Bool[Tensor, " N"]:
        """Return the value at each token position; NaN leaves a position out of the mean.

        Args:
            logits: the drafter's, fp32, at the first draft position.
            target: the target there: top-k logits in `head`, and `logp` over the vocabulary when it is run.
        """


@dataclass(frozen=True)
class ValidationSettings:
    """Which metrics validation reports.

    Args:
        widths: m of every coverage@m, the share of positions whose greedy token is in the drafter's top-m.
        low_margin: positions with a target margin below this also have their own coverage.
        certified_width: m for the certified fraction and the low-margin coverage.
        depth: draft tokens a round of the chain whose acceptance length is expected.
        extra: metrics of your own, reported beside these.

    Raises:
        ValueError: a count below 1; an extra metric without a name, or with one that is taken.
    """

    widths: tuple[int, ...] = (1, 2, 4, 8)
    low_margin: float = 0.1
    certified_width: int = 4
    depth: int = 4
    extra: Sequence[ValidationMetric] = ()

    def __post_init__(self) -> None:
        if self.depth < 1 or min(self.widths, default=0) < 1 or self.certified_width < 1:
            raise ValueError("validation: depth, widths and certified_width count tokens; give 1 or more")
        names = [getattr(metric, "name", "") for metric in self.extra]
        for place, name in enumerate(names):
            if not re.fullmatch(r"[\w@.-]+", name):
                raise ValueError(
                    f"validation.extra: {type(self.extra[place]).__name__} has the name {name!r}; set `name` "
                    "to what it is logged as, of letters, digits and _@.-"
                )
            if _BUILT_IN.fullmatch(name) or name in names[:place]:
                raise ValueError(f"validation.extra: the name {name!r} is taken; give another one")


class ValidationSums:
    """Sums of one validation epoch.

    Args:
        settings: what to count.
        device: where the sums live.
    """

    def __init__(self, settings: ValidationSettings, device: torch.device | str = "cpu") -> None:
        self.settings = settings
        widths = (f"covered@{m}" for m in settings.widths)
        self.names = ("steps", *widths, "low", "low_covered", "certified", "kl", "tokens", "rounds")
        for metric in settings.extra:
            self.names += (f"sum {metric.name}", f"count {metric.name}")
        # float64 counts to 2^53; MPS has no float64
        dtype = torch.float32 if torch.device(device).type == "mps" else torch.float64
        self.sums = torch.zeros(len(self.names), dtype=dtype, device=device)

    def add_steps(
        self,
        logits: Float[Tensor, "N V"],
        target: TargetBatch,
        vocabulary: DraftVocabulary | None = None,
    ) -> Bool[Tensor, " N"]:
        """Add some token positions.

        Args:
            logits: the drafter's, fp32.
            target: the target's distributions there; without the full one KL is that of head and one bucket.
            vocabulary: the drafter's; KL is then to the target renormalised over it, since to the target
                itself it is infinite. Everything else is of the whole vocabulary.

        Returns:
            Whether the target's greedy token is the drafter's first choice; a tie is a miss.

        Raises:
            ValueError: the drafter's logits hold NaN, or an extra metric has not one value a position.
        """
        head, logp = target.head, target.logp
        m, logq = self.settings.certified_width, logits.log_softmax(-1)
        if bool(torch.isnan(logq).any()):
            raise ValueError("the drafter's logits hold NaN: training has diverged; lower the learning rate")
        own = logq.gather(-1, head.greedy.unsqueeze(-1))
        rank = (logq >= own).sum(-1)  # the greedy token counts itself
        low = margin(head) < self.settings.low_margin
        coarse = coarse_kl(head, logq)
        radius = coarse_radius(head, m, tail_above=num_tail_above(head, logq))
        kl = coarse if logp is None else kl_divergence_logp(logp, logq)
        if vocabulary is not None:
            kl = vocabulary.kl(head, logits)
        values = {f"covered@{width}": rank <= width for width in self.settings.widths}
        values |= {
            "steps": torch.ones_like(low),
            "low": low,
            "low_covered": low & (rank <= m),
            "certified": coarse < radius,
            "kl": kl,
        }
        for metric in self.settings.extra:
            values |= _summands(metric, logits, target)
        for name, value in values.items():
            self.sums[self.names.index(name)] += value.sum()
        return rank == 1

    def add_rounds(self, hits: Bool[Tensor, "R T D"], segments: Int[Tensor, "R T"]) -> None:
        """Add the rounds of a chain along the trace.

        Args:
            hits: whether the draft at each depth of the round from each step is the target's greedy token.
                One depth: the drafter's first choice does not depend on the round it is in.
            segments: document of every position in the loss mask, −1 elsewhere; each run of equal numbers is
                one text.
        """
        tokens = rounds = 0
        for hit, segment in zip(hits.cpu().numpy(), segments.cpu().numpy(), strict=True):
            for stretch in np.split(np.arange(len(segment)), np.flatnonzero(np.diff(segment)) + 1):
                if segment[stretch[0]] >= 0:
                    tokens += len(stretch)
                    if hit.shape[1] == 1:
                        rounds += chain_rounds(hit[stretch, 0], self.settings.depth)
                    else:
                        rounds += path_rounds(hit[stretch, : self.settings.depth])
        self.sums[self.names.index("tokens")] += tokens
        self.sums[self.names.index("rounds")] += rounds

    def metrics(self, total: Callable[[Tensor], Tensor] = lambda sums: sums) -> dict[str, float]:
        """Metrics of everything that was added.

        Args:
            total: adds the sums of all ranks.

        Returns:
            `coverage@m`, `low_margin_coverage@m` and `certified@m` in [0, 1], `kl_nats` (of the head and one
            bucket when the target is a trace), `tau_expected` ≥ 1, and the extra metrics. Empty when no
            step was added.
        """
        sums = dict(zip(self.names, total(self.sums).tolist(), strict=True))
        if not sums["steps"]:
            return {}
        m, steps = self.settings.certified_width, sums["steps"]
        values = {f"coverage@{width}": sums[f"covered@{width}"] / steps for width in self.settings.widths}
        if sums["low"]:
            values[f"low_margin_coverage@{m}"] = sums["low_covered"] / sums["low"]
        values[f"certified@{m}"] = sums["certified"] / steps
        values["kl_nats"] = sums["kl"] / steps
        values["tau_expected"] = sums["tokens"] / max(sums["rounds"], 1)
        for metric in self.settings.extra:
            if sums[f"count {metric.name}"]:
                values[metric.name] = sums[f"sum {metric.name}"] / sums[f"count {metric.name}"]
        return values


def _summands(metric: ValidationMetric, logits: Tensor, target: TargetBatch) -> dict[str, Tensor]:
    """The values of a metric of the user's, and which positions have one."""
    found = metric(logits, target)
    if found.shape != logits.shape[:1]:
        raise ValueError(
            f"validation metric {metric.name} ({type(metric).__name__}) returned "
            f"shape {list(found.shape)} for {len(logits)} token positions; return one value for each, "
            "and NaN for those that do not count"
        )
    found = found.double() if found.device.type != "mps" else found.float()
    known = ~found.isnan()
    return {f"sum {metric.name}": found.nan_to_num(nan=0.0), f"count {metric.name}": known}


def chain_rounds(hits: NDArray[np.bool_], depth: int) -> int:
    """Target passes a chain drafter needs for a stretch of greedy text.

    Each round commits the accepted draft tokens, at most `depth`, and the target's own next token.

    Args:
        hits: [T] whether the drafter's first choice at each step is the target's greedy token.
        depth: draft tokens a round.

    Examples:
        >>> chain_rounds(np.array([True, True, False, True, False]), depth=4)  # 2 accepted + 1, then 1 + 1
        2
    """
    misses = np.flatnonzero(~hits)
    rounds = done = 0
    while done < len(hits):
        at = np.searchsorted(misses, done)
        run = (misses[at] if at < len(misses) else len(hits)) - done
        done += min(int(run), depth) + 1
        rounds += 1
    return rounds


def path_rounds(hits: NDArray[np.bool_]) -> int:
    """`chain_rounds` of a drafter whose drafts depend on where their round began.

    Args:
        hits: [T, D] whether the draft at each depth of the round from each step is the greedy token.

    Examples:
        >>> path_rounds(np.array([[True, False], [True, True], [False, True]]))  # 1 accepted + 1, then 0 + 1
        2
    """
    accepted = hits.cumprod(-1).sum(-1)
    rounds = done = 0
    while done < len(hits):
        done += int(accepted[done]) + 1
        rounds += 1
    return rounds


def first_choice(logits: Float[Tensor, "N V"], greedy: Int[Tensor, " N"]) -> Bool[Tensor, " N"]:
    """Whether the target's greedy token is the drafter's first choice; a tie is a miss."""
    own = logits.gather(-1, greedy.unsqueeze(-1))
    return (logits >= own).sum(-1) == 1
