"""Requests for a greedy continuation with the top-k log-probabilities of every position, and answers as rows.

`completions` is OpenAI's /v1/completions with vLLM's additions: prompts and answers as token ids, and
`prompt_logprobs`. `sglang` is SGLang's /generate, because its /v1/completions names alternatives by their
text only, which does not identify a token.

Letters: P prompt tokens · G generated tokens · T tokens of a document · K top-k entries · V vocabulary.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
from jaxtyping import Float64, Int32, UInt16
from numpy import ndarray

from certdraft.data.corpus.chat import Prompt
from certdraft.data.record.generation import TargetError
from certdraft.data.record.learned_positions import Generation, first_learned, with_loss_mask
from certdraft.data.record.server.http_server import ServerError
from certdraft.data.trace.recorded_row import Finish, RecordedRow

Entries = dict[int, float]  # log-probability of some tokens, nats
_MASS_SLACK = 1e-2  # fp16 or bf16 log-probabilities sum to 1 within this
TIE = "exact tie of the two most probable tokens (logits rounded to bf16?)"


@dataclass(frozen=True)
class Answer:
    """A server's answer, in one shape.

    Args:
        prompt_ids: the prompt as the server tokenised it, P tokens; None when it does not return it.
        ids: G generated tokens.
        heads: the distribution that each of them was taken from.
        prompt_heads: the same for every prompt token but the first, P − 1 of them; None when not asked for.
        stopped: it ended by itself rather than at the limit.
        features: path of the file with features, as the server gives it.
    """

    prompt_ids: list[int] | None
    ids: list[int]
    heads: list[Entries]
    prompt_heads: list[Entries] | None
    stopped: bool
    features: Any = None


@dataclass(frozen=True)
class Request:
    """A greedy continuation to ask for.

    Args:
        prompt: token ids, or text for the server to tokenise.
        max_tokens: longest continuation, at least 1.
        num_kept: K.
        eos: ids that end a text.
        inside: also return the top-k entries inside the prompt.
        name: with features, which the server then leaves in a file whose name holds this one.
    """

    prompt: list[int] | str
    max_tokens: int
    num_kept: int
    eos: list[int]
    inside: bool
    name: str | None = None


class Api(Protocol):
    """One kind of server: the body of its requests, and how its answers are read.

    `read` raises a ServerError where something that is needed is missing, and TypeError, ValueError,
    LookupError or AttributeError for an answer of another shape.
    """

    path: str

    def body(self, request: Request) -> dict[str, Any]: ...

    def read(self, reply: Any, inside: bool) -> Answer: ...


@dataclass(frozen=True)
class Completions:
    """/v1/completions with vLLM's additions; `model` is the server's name for the target."""

    model: str
    path = "/v1/completions"

    def body(self, request: Request) -> dict[str, Any]:
        """Penalties are named because vLLM takes defaults from the model's folder."""
        body: dict[str, Any] = {
            "model": self.model, "prompt": request.prompt, "max_tokens": request.max_tokens,
            "temperature": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            "logprobs": request.num_kept, "stop_token_ids": request.eos, "add_special_tokens": False,
            "skip_special_tokens": False, "return_token_ids": True, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        if request.inside:
            body["prompt_logprobs"] = request.num_kept
        if request.name is not None:
            wanted = {"include_output_tokens": True}
            body |= {"request_id": request.name, "kv_transfer_params": wanted}
        return body

    def read(self, reply: Any, inside: bool) -> Answer:
        choice = _get(reply, "choices")[0]
        logprobs = _get(choice, "logprobs")
        heads = [
            {_id_of_name(name): float(logp) for name, logp in (entries or {}).items()}
            for entries in _get(logprobs, "top_logprobs")
        ]
        ids, prompt_heads = choice.get("token_ids"), None
        if ids is None:
            ids = [_id_of_name(name) for name in _get(logprobs, "tokens")]
        if inside:
            prompt_heads = [
                {int(token): float(_get(entry, "logprob")) for token, entry in step.items()}
                for step in _get(choice, "prompt_logprobs")[1:]
            ]
        given = choice.get("prompt_token_ids")
        stopped = choice.get("finish_reason") == "stop"
        file = (reply.get("kv_transfer_params") or {}).get("hidden_states_path")
        return Answer(None if given is None else _ids(given), _ids(ids), heads, prompt_heads, stopped, file)


class SGLang:
    """SGLang's /generate. Entries are triples: log-probability, id, text."""

    path = "/generate"

    def body(self, request: Request) -> dict[str, Any]:
        sampling = {
            "temperature": 0.0, "max_new_tokens": request.max_tokens, "stop_token_ids": request.eos,
            "repetition_penalty": 1.0, "skip_special_tokens": False, "no_stop_trim": True,
        }  # fmt: skip
        is_text = isinstance(request.prompt, str)
        return {
            "text" if is_text else "input_ids": request.prompt, "sampling_params": sampling,
            "return_logprob": True, "top_logprobs_num": request.num_kept,
            "logprob_start_len": 0 if request.inside or is_text else -1, "return_text_in_logprobs": False,
        }  # fmt: skip

    def read(self, reply: Any, inside: bool) -> Answer:
        meta = _get(reply, "meta_info")
        heads = [_triples(step) for step in _get(meta, "output_top_logprobs")]
        ids = _ids([triple[1] for triple in _get(meta, "output_token_logprobs")])
        given = _ids([triple[1] for triple in meta.get("input_token_logprobs") or []]) if inside else None
        prompt_heads = [_triples(step) for step in _get(meta, "input_top_logprobs")[1:]] if inside else None
        reason = meta.get("finish_reason")
        stopped = (reason.get("type") if isinstance(reason, dict) else reason) == "stop"
        return Answer(given, ids, heads, prompt_heads, stopped)


def _get(content: Any, key: str) -> Any:
    value = content.get(key) if isinstance(content, dict) else None
    if value is None:
        raise ServerError(
            f"the server's answer lacks `{key}`, which a trace needs; use vLLM, another server that honours "
            "its return_token_ids, return_tokens_as_token_ids and prompt_logprobs, or SGLang with "
            "server.api=sglang"
        )
    return value


def _ids(values: Any) -> list[int]:
    wrong = [value for value in values if type(value) is not int]
    if wrong:
        raise TypeError(f"{wrong[0]!r} among the token ids")
    return list(values)


def _id_of_name(name: str) -> int:
    """The id in "token_id:123"."""
    kind, _, number = name.partition(":")
    if kind != "token_id" or not number.isdigit():
        raise ServerError(
            f"the server names tokens by their text ({name!r}), and two tokens can have one text; it must "
            "honour return_tokens_as_token_ids (vLLM does; for SGLang give server.api=sglang)"
        )
    return int(number)


def _triples(step: Any) -> Entries:
    return {int(token): float(logp) for logp, token, *_ in step or []}


# ---- answers as rows


def wants_prompt_heads(prompt: Prompt, settings: Generation) -> bool:
    """Whether positions inside the prompt are learned, so that their top-k entries are needed."""
    return first_learned(prompt, settings) < len(prompt.ids)


def row_of(
    answer: Answer,
    prompt: Prompt,
    settings: Generation,
    num_kept: int,
    vocab_size: int,
    eos: frozenset[int],
    hidden: UInt16[ndarray, "T L H"] | None = None,
) -> RecordedRow:
    """One document. Positions outside the loss mask that a server does not return hold a uniform placeholder.

    Args:
        answer: to this prompt.
        prompt: that was sent.
        settings: which positions are learned.
        num_kept: K.
        vocab_size: V.
        eos: ids that end a text.
        hidden: features of its tokens, bits of bf16 numbers.

    Returns:
        A row whose entropies are NaN: they are of the whole vocabulary, of which a server returns K tokens.

    Raises:
        ServerError: other token ids than sent, text that is not greedy, too few entries, something other than
            log-probabilities.
        TargetError: NaN among them, naming row and position.
    """
    given = prompt.ids.tolist()
    _check_answer(answer, prompt, settings, eos)
    written = [] if settings.teacher_forced else answer.ids
    ids = given + written
    heads: list[Entries | None] = [None] * len(ids)
    if answer.prompt_heads is not None:
        heads[: len(given) - 1] = answer.prompt_heads
    for position, entries in enumerate(answer.heads, len(given) - 1):
        if position < len(ids):
            heads[position] = entries
    top_ids = np.tile(np.arange(num_kept, dtype=np.int32), (len(ids), 1))
    top_logp = np.full((len(ids), num_kept), -math.log(vocab_size), np.float64)
    for position, head in enumerate(heads):
        if head is not None:
            chosen = ids[position + 1] if len(given) - 1 <= position < len(ids) - 1 else None
            where = f"{prompt.where}, after token {position} of the document"
            top_ids[position], top_logp[position] = _top(head, chosen, num_kept, vocab_size, where)
    with np.errstate(over="ignore"):  # a gap above 65504 nats is probability zero in any dtype
        gap = (top_logp[:, :1] - top_logp).astype(np.float16)
    finish: Finish = "given" if settings.teacher_forced else "eos" if written[-1] in eos else "length"
    whole = RecordedRow(
        np.asarray(ids, np.int32),
        np.zeros(len(ids), np.bool_),
        top_ids,
        gap,
        np.maximum(-top_logp[:, 0], 0.0).astype(np.float32),
        np.full(len(ids), np.nan, np.float32),
        finish=finish,
        where=prompt.where,
        hidden=hidden,
    )
    row = with_loss_mask(whole, prompt, settings)
    ties = num_kept > 1 and bool((row.top_gap[row.loss_mask, 1] == 0).any())
    return replace(row, notes=(TIE,)) if ties else row


def _check_answer(answer: Answer, prompt: Prompt, settings: Generation, eos: frozenset[int]) -> None:
    where, given = prompt.where, prompt.ids.tolist()
    if answer.prompt_ids is not None and answer.prompt_ids != given:
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
            f"{where}: the server stopped after id {answer.ids[-1]}, which does not end a text for this "
            f"tokenizer ({sorted(eos)} do); it must return the end-of-text token, and use no stop strings of "
            "its own"
        )


def _top(
    entries: Entries, chosen: int | None, num_kept: int, vocab_size: int, where: str
) -> tuple[Int32[ndarray, " K"], Float64[ndarray, " K"]]:
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
    if best[0][1] == -math.inf:
        raise ServerError(
            f"{where}: every log-probability that the server sent is -inf, so none of the tokens could have "
            "been chosen; check the checkpoint and the logits processors of the server"
        )
    if chosen is not None and best[0][0] != chosen:
        raise ServerError(
            f"{where}: the server wrote token {chosen} although {best[0][0]} is more probable; it samples or "
            "penalises. Start it without sampling defaults (vLLM: --generation-config vllm)"
        )
    logp = np.asarray([value for _, value in best])
    if np.exp(np.minimum(logp, 700.0)).sum() > 1 + _MASS_SLACK:
        raise ServerError(
            f"{where}: the server's log-probabilities sum to {np.exp(np.minimum(logp, 700.0)).sum():.3g}; it "
            "sends raw logits, or tempered ones (vLLM: --logprobs-mode raw_logprobs)"
        )
    return np.asarray([token for token, _ in best], np.int32), logp


def _shown(ids: list[int]) -> str:
    return " ".join(map(str, ids[:6])) + (" …" if len(ids) > 6 else "")
