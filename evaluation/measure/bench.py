"""Speculative decoding compared with plain decoding by the same loop on the same prompts.

Every prompt is decoded by every method before the next prompt starts, and the order rotates by one from
prompt to prompt, so that a slow minute of the machine affects all methods. Speed-ups are paired by prompt and
include the prefill. Texts are compared token for token; where one differs, the target's lead there tells a
numerical tie from a fault.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from certdraft.decoding import DecodeResult, TargetRunner, Tree, TreeBuilder, decode, device_name, greedy
from certdraft.evaluation.measure.acceptance_lengths import Lengths, fresh, members, ranks_of
from certdraft.evaluation.measure.statistics import compare_ratios, pooled_ratio
from certdraft.evaluation.measure.trace_reading import Document, DrafterFeatures, TargetFeatures, features_for

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_TIE_ULPS = 4  # rounding steps of a logit within which passes of other shapes may order tokens otherwise


@dataclass
class Timings:
    """One method over the prompts, in order; seconds are wall clock and include the prefill."""

    seconds: list[float] = field(default_factory=list)
    tokens: list[int] = field(default_factory=list)
    draft_s: float = 0.0
    verify_s: float = 0.0
    host_s: float = 0.0
    prefill_s: float = 0.0
    fallbacks: int = 0
    differing: list[dict[str, Any]] = field(default_factory=list)
    lengths: Lengths = field(default_factory=Lengths)


@dataclass
class Benchmark:
    """Timings of all methods, and whether their texts are the target's own greedy texts.

    Attributes:
        plain: the target alone.
        methods: (drafter, builder) → timings.
        device: where the target ran.
        changed: where a live greedy text first leaves the recorded one (another dtype or kernel), see
            `difference`.
    """

    plain: Timings
    methods: dict[tuple[str, str], Timings]
    device: str
    changed: list[dict[str, Any]] = field(default_factory=list)

    @property
    def lossless(self) -> bool:
        """Whether every text equals the target's greedy text, token for token."""
        return not any(t.differing for t in self.methods.values())

    def summary(self, seed: int = 0) -> dict[str, Any]:
        """The JSON form."""
        return {
            "device": self.device,
            "prompts": len(self.plain.seconds),
            "changed_texts": len(self.changed),
            "changed": self.changed,
            "lossless": self.lossless,
            "plain_tokens_per_s": vars(pooled_ratio(self.plain.tokens, self.plain.seconds, seed=seed)),
            "methods": [
                {"drafter": drafter, "builder": builder, **self._method(timings, seed)}
                for (drafter, builder), timings in self.methods.items()
            ],
        }

    def _method(self, t: Timings, seed: int) -> dict[str, Any]:
        total, lengths = sum(t.seconds), t.lengths.summary(seed)
        return {
            **lengths,
            "groups": [
                {**row, **self._group(t, at, seed)}
                for row, at in zip(lengths["groups"], members(t.lengths.groups).values(), strict=True)
            ],
            "equal_texts": len(t.seconds) - len(t.differing),
            "differing": t.differing,
            "tokens_per_s": vars(pooled_ratio(t.tokens, t.seconds, seed=seed)),
            "speedup": vars(
                compare_ratios(
                    (t.tokens, t.seconds), (self.plain.tokens, self.plain.seconds), "ratio", seed=seed
                )
            ),
            "share": {k: getattr(t, f"{k}_s") / total for k in ("draft", "verify", "host", "prefill")},
            "fallbacks": t.fallbacks,
        }

    def _group(self, t: Timings, at: Sequence[int], seed: int) -> dict[str, Any]:
        method, plain = ((np.array(x.tokens)[at], np.array(x.seconds)[at]) for x in (t, self.plain))
        return {
            "tokens_per_s": vars(pooled_ratio(*method, seed=seed)),
            "speedup": vars(compare_ratios(method, plain, "ratio", seed=seed)),
        }


def benchmark(
    target: PreTrainedModel,
    drafters: Mapping[str, Any],
    documents: Sequence[Document],
    builders: Mapping[str, TreeBuilder],
    *,
    top_m: int = 4,
    tie_gap: float = 1e-3,
    warmup: int = 1,
    features: Mapping[str, DrafterFeatures | None] | None = None,
    progress: Callable[[], None] = lambda: None,
) -> Benchmark:
    """Decode every prompt plainly and with every drafter and builder, and compare.

    Args:
        target: causal LM in eval mode.
        drafters: name → drafter on the target's device.
        documents: prompts; each is continued for as many tokens as its recorded text has.
        builders: label → tree builder.
        top_m: see `Lengths.add`.
        tie_gap: see `Lengths.add`.
        warmup: prompts decoded once by every method before timing starts.
        features: what each drafter reads of the target, from `features_for`; computed here if None.
        progress: called after each decoding.

    Returns:
        Timings, rounds and comparisons.
    """
    plain = Timings()
    methods = {(d, b): Timings() for d in drafters for b in builders}
    features = features_for(drafters, target) if features is None else features
    runners = {
        name: given.runner if isinstance(given, TargetFeatures) else TargetRunner(target)
        for name, given in features.items()
    }
    alone = TargetRunner(target)
    made = {(d, b): fresh(builders[b]) for d, b in methods}
    found = Benchmark(plain, methods, device_name(alone.device))
    order: list[tuple[str, str] | None] = [None, *methods]

    def run(key: tuple[str, str] | None, prompt: list[int], tokens: int) -> _Decoded:
        if key is None:
            return _run(alone, None, None, prompt, tokens)
        return _run(runners[key[0]], drafters[key[0]], made[key], prompt, tokens)

    for document in documents[:warmup]:
        for key in order:
            run(key, document.prompt, min(8, len(document.text)))
    made.update({key: fresh(builder) for key, builder in made.items()})  # the warm-up changed their state
    for index, document in enumerate(documents):
        turn = index % len(order)
        results: dict[tuple[str, str] | None, _Decoded] = {}
        for key in order[turn:] + order[:turn]:
            results[key] = run(key, document.prompt, len(document.text))
            progress()
        reference, seconds, _ = results[None]
        plain.seconds.append(seconds)
        plain.tokens.append(len(reference))
        if reference != document.text:
            case = difference(alone, document.prompt, reference, document.text, tie_gap)
            found.changed.append({"prompt": index, **case})
        for key, timings in methods.items():
            tokens, seconds, result = results[key]
            assert result is not None
            timings.seconds.append(seconds)
            timings.tokens.append(len(tokens))
            timings.draft_s += sum(r.draft_s for r in result.rounds)
            timings.verify_s += sum(r.verify_s for r in result.rounds)
            timings.host_s += sum(r.host_s for r in result.rounds)
            timings.prefill_s += result.prefill_s
            timings.fallbacks += result.fallbacks
            if tokens != reference:
                timings.differing.append(
                    {"prompt": index, **difference(alone, document.prompt, reference, tokens, tie_gap)}
                )
            ranks = _ranks(drafters[key[0]], document, tokens, features[key[0]])
            lead = document.lead if tokens == document.text else [float("inf")] * len(tokens)
            timings.lengths.add(result.rounds, ranks, lead, top_m, tie_gap, document.groups)
    return found


_Decoded = tuple[list[int], float, DecodeResult | None]


def _run(
    runner: TargetRunner,
    drafter: Any,
    builder: TreeBuilder | None,
    prompt: list[int],
    max_new_tokens: int,
) -> _Decoded:
    """Tokens, wall-clock seconds, and the rounds; without a builder it is plain decoding."""
    _wait(runner)
    start = time.perf_counter()
    result = None
    if builder is None:
        tokens = greedy(runner, prompt, max_new_tokens)
    else:
        result = decode(runner, drafter, prompt, builder, max_new_tokens=max_new_tokens)
        tokens = result.tokens
    _wait(runner)
    return tokens, time.perf_counter() - start, result


def _wait(runner: TargetRunner) -> None:
    if runner.device.type == "cuda":
        torch.cuda.synchronize(runner.device)


def _ranks(
    drafter: Any, document: Document, tokens: list[int], features: DrafterFeatures | None
) -> list[int]:
    along = None
    if features is not None and drafter.kind == "conditional":
        along = features.along([*document.prompt, *tokens[:-1]], document.index)
    return ranks_of(drafter, document.prompt, tokens, along)


@torch.inference_mode()
def difference(
    target: TargetRunner, prompt: list[int], reference: list[int], tokens: list[int], tie_gap: float
) -> dict[str, Any]:
    """Return where a text differs from the target's greedy text, and whether that is a numerical tie.

    Args:
        target: recomputes its logits at the first token that differs.
        prompt: token ids in front of both texts.
        reference: the target's greedy text.
        tokens: the decoded text.
        tie_gap: nats that are a tie in any dtype.

    Returns:
        token (position in the text), expected and got (ids; None behind a text's end), target_lead (nats by
        which the target prefers the expected token), tie_width (nats) and tie (the lead is within it).
    """
    pairs = zip(reference, tokens, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(reference), len(tokens)))
    found: dict[str, Any] = {
        "token": at,
        "expected": reference[at] if at < len(reference) else None,
        "got": tokens[at] if at < len(tokens) else None,
        "target_lead": None,
        "tie_width": None,
        "tie": False,
    }
    if at < min(len(reference), len(tokens)):
        before = [*prompt, *reference[:at]]
        logits = target.verify(target.start(before[:-1]), Tree.root_only(before[-1]))[0]
        lead = float(logits[reference[at]] - logits[tokens[at]])
        width = max(tie_gap, tie_width(float(logits.abs().max()), target.model.dtype))
        found |= {"target_lead": lead, "tie_width": width, "tie": lead <= width}
    return found


def tie_width(logit: float, dtype: torch.dtype) -> float:
    """Nats within which two logits of this size are equal up to rounding: 4 units in the last place.

    Examples:
        >>> tie_width(20.0, torch.bfloat16), tie_width(20.0, torch.float32) < 1e-4
        (0.5, True)
    """
    return _TIE_ULPS * torch.finfo(dtype).eps * 2.0 ** math.floor(math.log2(max(logit, 1e-30)))
