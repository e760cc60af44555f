"""Greedy answers of a server, streamed: their tokens, and when each part of them arrived.

A part is what one event of the stream brings. With a drafter it holds what one target pass committed, as long
as the client reads faster than the server writes.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from certdraft.data import Connection, ServerError
from certdraft.evaluation.prompts import Question

_TOKEN_BYTES = 8192  # of an event that brings one token; names, ids and text around it
_TEXT_KEYS = ("content", "reasoning_content", "reasoning", "text")


@dataclass(frozen=True)
class Answer:
    """One answer.

    Attributes:
        prompt: its number.
        prompt_ids: token ids of the prompt as the server read it; empty where it does not say.
        ids: token ids of the answer, likewise.
        text: of the answer.
        tokens: in the answer, as the server counts them.
        times: seconds from the request to each part that holds text.
        sizes: tokens of each part; equal shares where the server sends no ids.
        seconds: from the request to the end of the stream.
    """

    prompt: int
    prompt_ids: list[int]
    ids: list[int]
    text: str
    tokens: int
    times: list[float]
    sizes: list[float]
    seconds: float

    @property
    def said(self) -> list[int] | str:
        """What is compared with another answer: token ids, or the text where there are none."""
        return self.ids or self.text


def first_difference(first: Sequence[Any], second: Sequence[Any]) -> int:
    """Return where two texts part: the first place that differs, or the end of the shorter one.

    Examples:
        >>> first_difference("greedy", "greens")
        4
    """
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


@dataclass(frozen=True)
class Asking:
    """How questions become requests.

    Attributes:
        model: the server's name for it.
        chat: send messages, which the server puts into its chat template; else bare text to continue.
        max_new_tokens: longest answer.
    """

    model: str
    chat: bool
    max_new_tokens: int

    def body(self, question: Question, max_new_tokens: int | None = None) -> dict[str, Any]:
        """The JSON of a request; its salt keeps the server from finding the prompt in a cache."""
        asked: dict[str, Any]
        if self.chat:
            asked = {"messages": [*question.history, {"role": "user", "content": question.turns[0]}]}
        else:
            asked = {"prompt": question.bare or question.turns[0]}
        return {
            **asked,
            "model": self.model,
            "max_tokens": max_new_tokens or self.max_new_tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "return_token_ids": True,
            "cache_salt": f"certdraft-{uuid.uuid4().hex}",
        }


def ask(
    connection: Connection,
    asking: Asking,
    question: Question,
    prompt: int,
    max_new_tokens: int | None = None,
) -> Answer:
    """Send one request and read its answer.

    Args:
        connection: to the server.
        asking: how.
        question: the prompt; its first turn is asked.
        prompt: its number.
        max_new_tokens: another limit than `asking` has.

    Raises:
        ServerError: no whole answer, or one of another shape.
    """
    path = "/v1/chat/completions" if asking.chat else "/v1/completions"
    body = asking.body(question, max_new_tokens)
    # A prompt comes back once, as ids; a byte of text is at most one token.
    shown = sum(len(str(body.get(key, "")).encode()) for key in ("messages", "prompt"))
    max_bytes = (1 << 20) + 16 * shown + _TOKEN_BYTES * body["max_tokens"]
    events, seconds = connection.stream(path, body, max_bytes, question.where)
    try:
        return _answer(prompt, events, seconds)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ServerError(
            f"{connection.base}{path}: the stream has another shape than OpenAI's ({type(error).__name__}: "
            f"{error}); check which server runs there"
        ) from error


def _answer(prompt: int, events: list[tuple[float, Any]], seconds: float) -> Answer:
    prompt_ids: list[int] = []
    ids: list[int] = []
    texts: list[str] = []
    times: list[float] = []
    sizes: list[int] = []
    tokens: int | None = None
    for when, event in events:
        if event.get("usage"):
            tokens = int(event["usage"]["completion_tokens"])
        for choice in event.get("choices", ()):
            prompt_ids = prompt_ids or _ids(event, choice, "prompt_token_ids")
            new = _ids({}, choice, "token_ids")
            said = _text(choice)
            if new or said:
                times.append(when)
                sizes.append(len(new))
                ids += new
                texts.append(said)
    if not tokens or not times:
        raise ValueError("no tokens, or no usage at the end")
    if ids and len(ids) != tokens:
        raise ValueError(f"{len(ids)} token ids, usage counts {tokens}")
    parts = [float(size) for size in sizes] if ids and all(sizes) else [tokens / len(times)] * len(times)
    return Answer(prompt, prompt_ids, ids, "".join(texts), tokens, times, parts, seconds)


def _ids(event: Mapping[str, Any], choice: Mapping[str, Any], key: str) -> list[int]:
    return [int(token) for token in choice.get(key) or event.get(key) or ()]


def _text(choice: Mapping[str, Any]) -> str:
    delta = choice.get("delta") or choice
    return "".join(delta.get(key) or "" for key in _TEXT_KEYS)
