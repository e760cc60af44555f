"""Our loop beside a server: its acceptance on the served texts, and the target where two of them differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from certdraft.data import load_target, load_tokenizer, tokenizer_fingerprint
from certdraft.decoding import Chain, TargetRunner
from certdraft.evaluation.loading import TargetVocabulary, load_checked, pick_device
from certdraft.evaluation.measure.acceptance_lengths import Lengths, replay_lengths
from certdraft.evaluation.measure.bench import difference
from certdraft.evaluation.measure.trace_reading import Document, features_for
from certdraft.evaluation.serving.served_requests import Answer, first_difference

_TIE_GAP = 1e-3  # nats


@dataclass(frozen=True)
class OwnLoop:
    """Results of our loop on a server's texts.

    Attributes:
        lengths: rounds of chains of the server's draft length, by answer.
        differences: (prompt, first token that differs) → see `difference`; whether the target is tied there.
    """

    lengths: Lengths
    differences: dict[tuple[int, int], dict[str, Any]]


def replay_served(
    answers: Sequence[Answer],
    pairs: Sequence[tuple[Answer, Answer]],
    target: str,
    drafter: str,
    draft_length: int,
    *,
    revision: str | None = None,
    dtype: str = "bfloat16",
    device: str = "auto",
    progress: Callable[[], None] = lambda: None,
) -> OwnLoop:
    """Replay a server's greedy texts with the drafter, and look at the target where two of them differ.

    Engines let the target write the first token without a draft, so the rounds begin behind it.

    Args:
        answers: with token ids; those of a single token have no round and are left out.
        pairs: answers to one prompt without the drafter and with it, which differ.
        target: "embedded", a folder or a hub name.
        drafter: exported folder or hub name.
        draft_length: of the chains.
        revision: hub revision of the target.
        dtype: of target and drafter.
        device: "auto", "cpu", "cuda:0" and so on.
        progress: called after each text.

    Raises:
        ValueError: a drafter of another tokenizer, an answer without token ids, or none of two tokens.
        FileNotFoundError: no such target or drafter.
    """
    if any(not (answer.ids and answer.prompt_ids) for answer in answers):
        raise ValueError("the server sends no token ids, so its texts cannot be replayed")
    documents = [
        Document([*a.prompt_ids, a.ids[0]], a.ids[1:], [float("inf")] * (len(a.ids) - 1))
        for a in answers
        if len(a.ids) > 1
    ]
    if not documents:
        raise ValueError("no answer is longer than one token; raise --max_new_tokens")
    place = pick_device(device)
    model = load_target(target, revision=revision, dtype=getattr(torch, dtype), device=place)
    fingerprint = tokenizer_fingerprint(load_tokenizer(target, revision=revision))
    vocabulary = TargetVocabulary(target, model.get_output_embeddings().weight.shape[0], fingerprint)
    loaded: dict[str, Any] = {"drafter": load_checked(drafter, vocabulary, place, dtype, model)}
    if (longest := loaded["drafter"].max_draft_length) is not None:  # engines make blocks of what they draft
        config = loaded["drafter"].config
        loaded["drafter"].config = replace(config, block_size=config.block_size - longest + draft_length)
    features = features_for(loaded, model)["drafter"]
    builders = {"chain": Chain(draft_length)}
    found = replay_lengths(loaded["drafter"], documents, builders, features=features, progress=progress)
    differences: dict[tuple[int, int], dict[str, Any]] = {}
    runner = TargetRunner(model)
    for plain, drafted in pairs:
        key = plain.prompt, first_difference(plain.ids, drafted.ids)
        if key not in differences:
            differences[key] = difference(runner, plain.prompt_ids, plain.ids, drafted.ids, _TIE_GAP)
    return OwnLoop(found["chain"], differences)
