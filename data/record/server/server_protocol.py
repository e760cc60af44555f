"""Two ways to ask a server for a greedy continuation with the head of every step, and to read its answer.

`completions` is OpenAI's /v1/completions with vLLM's additions: prompts and answers as token ids, and
`prompt_logprobs`. `sglang` is SGLang's /generate, because its /v1/completions names alternatives by their
text only, which does not say which token was meant.

Letters: P prompt tokens · G generated tokens · K head entries.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from certdraft.data.record.server.http_server import ServerError

Entries = dict[int, float]  # log-probability of some tokens, nats


@dataclass(frozen=True)
class Answer:
    """What a server said.

    Args:
        prompt_ids: the prompt as the server understood it, P tokens; None when it does not say.
        ids: G generated tokens.
        heads: the distribution that each of them was taken from.
        prompt_heads: the same for every prompt token but the first, P − 1 of them; None when not asked for.
        stopped: it ended by itself rather than at the limit.
    """

    prompt_ids: list[int] | None
    ids: list[int]
    heads: list[Entries]
    prompt_heads: list[Entries] | None
    stopped: bool


class Api(Protocol):
    """One way to ask."""

    path: str

    def body(
        self, prompt: Sequence[int] | str, max_tokens: int, num_kept: int, eos: Sequence[int], inside: bool
    ) -> dict[str, Any]:
        """A request.

        Args:
            prompt: token ids, or text that the server shall tokenise.
            max_tokens: longest continuation, at least 1.
            num_kept: K.
            eos: ids that end a text.
            inside: also give the heads inside the prompt.
        """
        ...

    def read(self, reply: Any, inside: bool) -> Answer:
        """The answer.

        Raises:
            ServerError: something that is needed is missing.
        """
        ...


class Completions:
    """/v1/completions as vLLM speaks it.

    Args:
        model: the server's name for the target.
    """

    path = "/v1/completions"

    def __init__(self, model: str) -> None:
        self.model = model

    def body(
        self, prompt: Sequence[int] | str, max_tokens: int, num_kept: int, eos: Sequence[int], inside: bool
    ) -> dict[str, Any]:
        """See `Api.body`. Penalties are named because vLLM takes defaults from the model's folder."""
        asked: dict[str, Any] = {
            "model": self.model, "prompt": prompt if isinstance(prompt, str) else list(prompt),
            "max_tokens": max_tokens, "temperature": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0,
            "frequency_penalty": 0.0, "logprobs": num_kept, "stop_token_ids": list(eos),
            "add_special_tokens": False, "skip_special_tokens": False,
            "return_token_ids": True, "return_tokens_as_token_ids": True,
        }  # fmt: skip
        return asked | {"prompt_logprobs": num_kept} if inside else asked

    def read(self, reply: Any, inside: bool) -> Answer:
        """See `Api.read`."""
        choice = _get(reply, "choices")[0]
        logprobs = _get(choice, "logprobs")
        heads = [_named_ids(entries) for entries in _get(logprobs, "top_logprobs")]
        ids = choice.get("token_ids")
        if ids is None:
            ids = [_id_of_name(name) for name in _get(logprobs, "tokens")]
        prompt_heads = None
        if inside:
            steps = _get(choice, "prompt_logprobs")
            prompt_heads = [
                {int(token): float(_get(entry, "logprob")) for token, entry in step.items()}
                for step in steps[1:]
            ]
        return Answer(
            choice.get("prompt_token_ids"), ids, heads, prompt_heads, choice.get("finish_reason") == "stop"
        )


class SGLang:
    """SGLang's /generate. Entries are triples: log-probability, id, text."""

    path = "/generate"

    def body(
        self, prompt: Sequence[int] | str, max_tokens: int, num_kept: int, eos: Sequence[int], inside: bool
    ) -> dict[str, Any]:
        """See `Api.body`."""
        sampling = {
            "temperature": 0.0, "max_new_tokens": max_tokens, "stop_token_ids": list(eos),
            "repetition_penalty": 1.0, "skip_special_tokens": False, "no_stop_trim": True,
        }  # fmt: skip
        key, value = ("text", prompt) if isinstance(prompt, str) else ("input_ids", list(prompt))
        start = 0 if inside or isinstance(prompt, str) else -1
        return {
            key: value, "sampling_params": sampling, "return_logprob": True, "top_logprobs_num": num_kept,
            "logprob_start_len": start, "return_text_in_logprobs": False,
        }  # fmt: skip

    def read(self, reply: Any, inside: bool) -> Answer:
        """See `Api.read`."""
        said = _get(reply, "meta_info")
        heads = [_triples(step) for step in _get(said, "output_top_logprobs")]
        ids = [int(triple[1]) for triple in _get(said, "output_token_logprobs")]
        given = [int(triple[1]) for triple in said.get("input_token_logprobs") or []]
        prompt_heads = None
        if inside:
            prompt_heads = [_triples(step) for step in _get(said, "input_top_logprobs")[1:]]
        reason = said.get("finish_reason")
        stopped = (reason or {}).get("type") == "stop" if isinstance(reason, dict) else reason == "stop"
        return Answer(given if inside else None, ids, heads, prompt_heads, stopped)


def _get(content: Any, key: str) -> Any:
    value = content.get(key) if isinstance(content, dict) else None
    if value is None:
        raise ServerError(
            f"the server's answer lacks `{key}`, which a trace needs; use vLLM, another server that honours "
            "its return_token_ids, return_tokens_as_token_ids and prompt_logprobs, or SGLang with "
            "server.api=sglang"
        )
    return value


def _named_ids(entries: dict[str, float] | None) -> Entries:
    return {_id_of_name(name): float(logp) for name, logp in (entries or {}).items()}


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
