"""A server's answer as a row of a trace, checked step by step.

Letters: P prompt tokens · T tokens of a document · K head entries · V vocabulary.
"""

from __future__ import annotations

import math

import numpy as np
from jaxtyping import Float32, Int32
from numpy import ndarray

from certdraft.data.corpus.chat import Prompt
from certdraft.data.record.generation import Generation, TargetError
from certdraft.data.record.server.http_server import ServerError
from certdraft.data.record.server.server_protocol import Answer, Entries
from certdraft.data.trace.recorded_row import RecordedRow, first_learned, with_steps

_MASS_SLACK = 1e-2  # fp16 or bf16 log-probabilities sum to 1 within this
TIE = "exact tie of the two most probable tokens (logits rounded to bf16?)"


def wants_prompt_heads(prompt: Prompt, settings: Generation) -> bool:
    """Whether steps inside the prompt are learned, so that their heads are needed."""
    return first_learned(prompt, settings) < len(prompt.ids)


def row_of(
    answer: Answer, prompt: Prompt, settings: Generation, num_kept: int, vocab_size: int, eos: frozenset[int]
) -> RecordedRow:
    """One document. Steps that a server does not tell, and nobody learns, hold a uniform placeholder.

    Args:
        answer: what the server said.
        prompt: what it was asked.
        settings: what is learned.
        num_kept: K.
        vocab_size: V.
        eos: ids that end a text.

    Returns:
        A row whose entropies are NaN: they are of the whole vocabulary, of which a server shows K tokens.

    Raises:
        ServerError: other token ids than asked, no greedy text, a head too short, something other than
            log-probabilities.
        TargetError: NaN among them, naming row and position.
    """
    given = prompt.ids.tolist()
    _check_answer(answer, prompt, settings, eos)
    written = [] if settings.teacher_forced else answer.ids
    ids = given + written
    steps: list[Entries | None] = [None] * len(ids)
    if answer.prompt_heads is not None:
        steps[: len(given) - 1] = answer.prompt_heads
    for number, entries in enumerate(answer.heads[: len(ids) - len(given) + 1]):
        if len(given) - 1 + number < len(ids):
            steps[len(given) - 1 + number] = entries
    top_ids = np.tile(np.arange(num_kept, dtype=np.int32), (len(ids), 1))
    top_logp = np.full((len(ids), num_kept), -math.log(vocab_size), np.float64)
    for step, head in enumerate(steps):
        if head is not None:
            chosen = ids[step + 1] if len(given) - 1 <= step < len(ids) - 1 else None
            where = f"{prompt.where}, after token {step} of the document"
            top_ids[step], top_logp[step] = _head(head, chosen, num_kept, vocab_size, where)
    with np.errstate(over="ignore", invalid="ignore"):
        gap = (top_logp[:, :1] - top_logp).astype(np.float16)
    if settings.teacher_forced:
        finish = "given"
    else:
        finish = "eos" if written[-1] in eos else "length"
    whole = RecordedRow(
        np.asarray(ids, np.int32),
        np.zeros(len(ids), np.bool_),
        top_ids,
        gap,
        np.maximum(-top_logp[:, 0], 0.0).astype(np.float32),
        np.full(len(ids), np.nan, np.float32),
        finish=finish,  # type: ignore[arg-type]
        where=prompt.where,
    )
    row = with_steps(whole, prompt, settings)
    ties = num_kept > 1 and bool((row.top_gap[row.loss_mask, 1] == 0).any())
    return RecordedRow(**vars(row) | {"notes": (TIE,)}) if ties else row


def _check_answer(answer: Answer, prompt: Prompt, settings: Generation, eos: frozenset[int]) -> None:
    where, given = prompt.where, prompt.ids.tolist()
    if answer.prompt_ids is not None and list(answer.prompt_ids) != given:
        raise ServerError(
            f"{where}: the server worked on other token ids ({_shown(answer.prompt_ids)}) than it was sent "
            f"({_shown(given)}); it changes prompts, so it cannot record a trace"
        )
    if len(answer.heads) != len(answer.ids) or not answer.ids:
        raise ServerError(
            f"{where}: the server sent {len(answer.ids)} tokens but the alternatives of {len(answer.heads)}"
        )
    if answer.prompt_heads is not None and len(answer.prompt_heads) != len(given) - 1:
        raise ServerError(
            f"{where}: the server sent alternatives for {len(answer.prompt_heads)} of {len(given) - 1} steps "
            "inside the prompt; switch its prefix caching off"
        )
    if settings.teacher_forced:
        return
    for number, token in enumerate(answer.ids[:-1]):
        if token in eos:
            raise ServerError(
                f"{where}: the server wrote on after the end-of-text id {token} (token {number} of "
                f"{len(answer.ids)}); switch ignore_eos off"
            )
    if answer.stopped and answer.ids[-1] not in eos:
        raise ServerError(
            f"{where}: the server stopped after id {answer.ids[-1]}, which ends no text for this tokenizer "
            f"({sorted(eos)} do); it must return the end-of-text token, and use no stop strings of its own"
        )


def _head(
    entries: Entries, chosen: int | None, num_kept: int, vocab_size: int, where: str
) -> tuple[Int32[ndarray, " K"], Float32[ndarray, " K"]]:
    """Ids and log-probabilities of the K most probable tokens, the chosen one first among equals."""
    if any(math.isnan(logp) or logp == math.inf for logp in entries.values()):
        raise TargetError(
            f"{where}: the server's log-probabilities hold NaN or +inf; nothing of this shard was written. "
            "Check the checkpoint that it serves"
        )
    if len(entries) < num_kept:
        raise ServerError(
            f"{where}: the server gives {len(entries)} of {num_kept} alternatives; raise its limit (vLLM: "
            f"--max-logprobs {num_kept}) or record with num_kept={len(entries)}"
        )
    wrong = [token for token in entries if not 0 <= token < vocab_size]
    if wrong:
        raise ServerError(
            f"{where}: the server names token id {wrong[0]}, the target has {vocab_size}; it serves another "
            "model than `target` names"
        )
    best = sorted(entries.items(), key=lambda entry: (-entry[1], entry[0] != chosen, entry[0]))[:num_kept]
    if chosen is not None and best[0][0] != chosen:
        raise ServerError(
            f"{where}: the server wrote token {chosen} although {best[0][0]} is more probable; it samples or "
            "penalises. Start it without sampling defaults (vLLM: --generation-config vllm)"
        )
    logp = np.asarray([value for _, value in best])
    if np.exp(logp).sum() > 1 + _MASS_SLACK:
        raise ServerError(
            f"{where}: what the server calls log-probabilities sum to {np.exp(logp).sum():.3g}; it sends raw "
            "logits, or tempered ones (vLLM: --logprobs-mode raw_logprobs)"
        )
    return np.asarray([token for token, _ in best], np.int32), logp


def _shown(ids: list[int]) -> str:
    return " ".join(map(str, ids[:6])) + (" …" if len(ids) > 6 else "")
