"""An inference server over HTTP: requests that are retried, and refusals in words."""

from __future__ import annotations

import http.client
import json
import os
import random
import time
import urllib.error
import urllib.request
from dataclasses import dataclass
from typing import Any, Literal

from certdraft.data.trace.shards import RecordingError

_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
_LONGEST_WAIT_S = 60.0


class ServerError(RecordingError):
    """The server cannot be used; the message says what it said and what to do."""


class BadRequest(ServerError):
    """The server refused a request; `said` is its own text."""

    def __init__(self, message: str, said: str) -> None:
        super().__init__(message)
        self.said = said


@dataclass(frozen=True)
class Server:
    """Where the target runs, when not here.

    Args:
        url: such as http://localhost:8000; the target is loaded by this command when not given.
        model: the server's name for the target; the one model it serves when not given.
        api: "completions" is /v1/completions as vLLM speaks it, "sglang" SGLang's own /generate.
        concurrency: requests in flight.
        timeout_s: seconds without a byte after which a request counts as lost.
        retries: further attempts after a lost request, a 429 or a 5xx.
        backoff_s: wait before the first of them; doubles each time, up to a minute.
        api_key_variable: environment variable that holds the key to send, if the server wants one.
    """

    url: str | None = None
    model: str | None = None
    api: Literal["completions", "sglang"] = "completions"
    concurrency: int = 32
    timeout_s: float = 600.0
    retries: int = 6
    backoff_s: float = 1.0
    api_key_variable: str | None = None

    def __post_init__(self) -> None:
        if self.url is not None and not self.url.startswith(("http://", "https://")):
            raise ValueError(f"server.url {self.url!r} must begin with http:// or https://")
        if self.concurrency < 1 or self.retries < 0 or self.timeout_s <= 0 or self.backoff_s < 0:
            raise ValueError(
                "server: concurrency ≥ 1, retries ≥ 0, timeout_s > 0 and backoff_s ≥ 0 are needed"
            )


class Connection:
    """Requests to one server, from any thread.

    Args:
        server: which, and how patiently.

    Raises:
        ServerError: the variable that should hold the key is not set.
    """

    def __init__(self, server: Server) -> None:
        self.server, self.base = server, (server.url or "").rstrip("/").removesuffix("/v1")
        self._headers = {"Content-Type": "application/json"}
        if name := server.api_key_variable:
            if name not in os.environ:
                raise ServerError(f"server.api_key_variable: {name} is not set in the environment")
            self._headers["Authorization"] = f"Bearer {os.environ[name]}"

    def get(self, path: str) -> Any:
        """The JSON answer to a GET; see `post`."""
        return self._ask(path, None)

    def post(self, path: str, body: dict[str, Any]) -> Any:
        """The JSON answer to a POST.

        Lost connections, time-outs, answers that break off, 429 and 5xx are tried again.

        Raises:
            BadRequest: the server refuses this request (4xx); trying again would not help.
            ServerError: no whole answer after all attempts.
        """
        return self._ask(path, json.dumps(body).encode())

    def _ask(self, path: str, data: bytes | None) -> Any:
        reason = ""
        for attempt in range(self.server.retries + 1):
            if attempt:
                time.sleep(self._wait_s(attempt))
            try:
                return self._once(path, data)
            except urllib.error.HTTPError as error:
                said = _said(error)
                if error.code not in _RETRIED:
                    raise self._refused(path, error.code, said) from None
                reason = f"HTTP {error.code}: {said}"
            except (OSError, http.client.HTTPException, ValueError) as error:
                # refused and lost connections, time-outs, bodies cut short, JSON that breaks off
                reason = str(getattr(error, "reason", "") or error) or type(error).__name__
        raise ServerError(
            f"{self.base}{path}: no whole answer in {self.server.retries + 1} attempts (the last: {reason}). "
            "What is written stays; once the server answers, run the same command again to go on."
        )

    def _once(self, path: str, data: bytes | None) -> Any:
        request = urllib.request.Request(self.base + path, data, self._headers)
        with urllib.request.urlopen(request, timeout=self.server.timeout_s) as response:
            return json.loads(response.read())

    def _wait_s(self, attempt: int) -> float:
        wait = min(self.server.backoff_s * 2 ** (attempt - 1), _LONGEST_WAIT_S)
        return wait * random.uniform(0.5, 1.0)  # clients that failed together do not return together

    def _refused(self, path: str, code: int, said: str) -> ServerError:
        if code in (401, 403):
            return ServerError(
                f"{self.base}{path}: HTTP {code}, the server wants a key ({said}); give the name of the "
                "environment variable that holds it as server.api_key_variable"
            )
        return BadRequest(f"{self.base}{path}: the server refuses the request, HTTP {code}: {said}", said)


def _said(error: urllib.error.HTTPError) -> str:
    """The message of an error's body, in whatever shape it comes."""
    try:
        text = error.read().decode(errors="replace")
    except (OSError, http.client.HTTPException):
        return str(error.reason)
    try:
        content = json.loads(text)
    except ValueError:
        return " ".join(text.split())[:300] or str(error.reason)
    for key in ("error", "message", "detail"):
        if isinstance(content, dict) and key in content:
            content = content[key]
    return " ".join(str(content).split())[:500]
