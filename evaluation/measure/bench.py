"""Real speculative decoding against plain decoding by the same loop on the same prompts.

Every prompt is decoded by every method before the next prompt starts, and the order turns by one from prompt
to prompt: a slow minute of the machine touches all methods alike. Speed-ups are paired by prompt. Prefill
counts on both sides. Texts are compared token for token.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from certdraft.decoding import DecodeResult, TargetRunner, TreeBuilder, decode, device_name, greedy
from certdraft.evaluation.measure.acceptance_lengths import Lengths, fresh, members, ranks_of
from certdraft.evaluation.measure.document_features import features_for
from certdraft.evaluation.measure.statistics import compare_ratios, pooled_ratio
from certdraft.evaluation.measure.trace_reading import Document

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PLAIN = "plain decoding"


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
    """What was decoded, how long it took, and whether it is the target's own text.

    Attributes:
        plain: the target alone.
        methods: (drafter, builder) → timings.
        device: where the target ran.
        changed_texts: prompts whose live greedy text is not the recorded one (another dtype or kernel).
    """

    plain: Timings
    methods: dict[tuple[str, str], Timings]
    device: str
    changed_texts: int = 0

    @property
    def lossless(self) -> bool:
        """Every text equal to the target's greedy text, token for token."""
        return not any(t.differing for t in self.methods.values())

    def summary(self, seed: int = 0) -> dict[str, Any]:
        """The JSON form."""
        return {
            "device": self.device,
            "prompts": len(self.plain.seconds),
            "changed_texts": self.changed_texts,
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
            "share": {
                "draft": t.draft_s / total,
                "verify": t.verify_s / total,
                "host": t.host_s / total,
                "prefill": t.prefill_s / total,
            },
            "fallbacks": t.fallbacks,
        }

    def _group(self, t: Timings, at: Sequence[int], seed: int) -> dict[str, Any]:
        mine, plain = ((np.array(x.tokens)[at], np.array(x.seconds)[at]) for x in (t, self.plain))
        return {
            "tokens_per_s": vars(pooled_ratio(*mine, seed=seed)),
            "speedup": vars(compare_ratios(mine, plain, "ratio", seed=seed)),
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
        warmup: prompts decoded once by every method before the clock counts.
        progress: called after each decoding.

    Returns:
        Timings, rounds and comparisons.
    """
    plain = Timings()
    methods = {(d, b): Timings() for d in drafters for b in builders}
    features = {name: features_for(drafter, target) for name, drafter in drafters.items()}
    runners = {name: found.runner if found else TargetRunner(target) for name, found in features.items()}
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
    made.update({key: fresh(builder) for key, builder in made.items()})  # the warm-up taught them something
    for index, document in enumerate(documents):
        turn = index % len(order)
        results: dict[tuple[str, str] | None, _Decoded] = {}
        for key in order[turn:] + order[:turn]:
            results[key] = run(key, document.prompt, len(document.text))
            progress()
        reference, seconds, _ = results[None]
        plain.seconds.append(seconds)
        plain.tokens.append(len(reference))
        found.changed_texts += reference != document.text
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
                timings.differing.append(_difference(index, reference, tokens, document))
            ranks = ranks_of(drafters[key[0]], document.prompt, tokens, features[key[0]])
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


def _difference(index: int, reference: list[int], tokens: list[int], document: Document) -> dict[str, Any]:
    """Where a text leaves the target's greedy text, and how close the call was there."""
    pairs = zip(reference, tokens, strict=False)
    at = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(reference), len(tokens)))
    return {
        "prompt": index,
        "token": at,
        "expected": reference[at] if at < len(reference) else None,
        "got": tokens[at] if at < len(tokens) else None,
        "target_lead": document.lead[at] if reference[: at + 1] == document.text[: at + 1] else None,
    }
