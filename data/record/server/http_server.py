"""Requests to an inference server: retried, bounded in time and size, and refused in words."""

from __future__ import annotations

import asyncio
import json
import os
import random
import threading
import time
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any, Literal

import httpx

from certdraft.data.trace.shards import RecordingError

_RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
_LONGEST_WAIT_S = 60.0
_THIS_MACHINE = ("127.0.0.1", "localhost", "::1")
SMALL_BYTES = 1 << 20  # of an answer that holds no token positions


class ServerError(RecordingError):
    """The server cannot be used; the message holds its own words and what to do."""


class ServerLost(ServerError):
    """No whole answer after all attempts; another server of the same target may answer."""


class BadRequest(ServerError):
    """The server refused a request; `reason` is its own text."""

    def __init__(self, message: str, reason: str) -> None:
        super().__init__(message)
        self.reason = reason


@dataclass(frozen=True)
class Server:
    """An inference server that runs the target.

    Args:
        url: such as http://localhost:8000; the target is loaded by this command when not given.
        model: the server's name for the target; the one model it serves when not given.
        api: "completions" is vLLM's /v1/completions, "sglang" SGLang's own /generate.
        replicas: addresses of further servers of the same target, which share the requests.
        concurrency: requests in flight, per server.
        timeout_s: seconds after which a request without a whole answer counts as lost.
        retries: further attempts after a lost request, a 429 or a 5xx.
        backoff_s: wait before the first of them; doubles each time, up to a minute.
        api_key_variable: environment variable that holds the key to send, if the server requires one.
        features_dir: with feature_layers, folder shared with vLLM servers, where they leave features.
            Without a url the command ends with the line that starts such a server.
        check_features: load the target here too, and compare features of a test text, before recording.
    """

    url: str | None = None
    replicas: tuple[str, ...] = ()
    model: str | None = None
    api: Literal["completions", "sglang"] = "completions"
    concurrency: int = 32
    timeout_s: float = 600.0
    retries: int = 6
    backoff_s: float = 1.0
    api_key_variable: str | None = None
    features_dir: str | None = None
    check_features: bool = False

    def __post_init__(self) -> None:
        for url in self.urls:
            if not url.startswith(("http://", "https://")):
                raise ValueError(f"server.url {url!r} must begin with http:// or https://")
        if self.replicas and self.url is None or len(set(self.urls)) < len(self.urls):
            raise ValueError("server.replicas are further servers: give server.url, and each address once")
        if self.concurrency < 1 or self.retries < 0 or self.timeout_s <= 0 or self.backoff_s < 0:
            raise ValueError(
                "server: concurrency ≥ 1, retries ≥ 0, timeout_s > 0 and backoff_s ≥ 0 are needed"
            )

    @property
    def urls(self) -> tuple[str, ...]:
        """All addresses."""
        return (self.url, *self.replicas) if self.url is not None else self.replicas


class Connection:
    """Requests to one server, from any thread; `close` ends those in flight at once.

    Args:
        server: its address, and how often and how long to try.
        options: prefix of its settings on the command line, for errors.

    Raises:
        ServerError: the variable that should hold the key is not set.
    """

    def __init__(self, server: Server, options: str = "server.") -> None:
        self.server, self.base = server, (server.url or "").rstrip("/").removesuffix("/v1")
        self._options = options
        headers = {"Accept-Encoding": "identity"}  # a compressed answer could be far larger than its bytes
        if name := server.api_key_variable:
            if name not in os.environ:
                raise ServerError(f"{options}api_key_variable: {name} is not set in the environment")
            headers["Authorization"] = f"Bearer {os.environ[name]}"
        limits = httpx.Limits(max_connections=server.concurrency + 1)
        # A server on this machine is not asked through a proxy.
        local = httpx.URL(self.base).host in _THIS_MACHINE
        # The deadline of a whole request is `_once`'s; redirects would carry the key to another origin.
        self._client = httpx.AsyncClient(
            headers=headers, timeout=None, limits=limits, follow_redirects=False, trust_env=not local
        )
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def get(self, path: str) -> Any:
        """The JSON answer to a GET; see `post`."""
        return self._submit(self._ask("GET", path, None, SMALL_BYTES, "")).result()

    def get_text(self, path: str, max_bytes: int = SMALL_BYTES) -> str:
        """The answer to a GET as text; see `post`."""
        return self._submit(self._ask("GET", path, None, max_bytes, "", bytes.decode)).result()

    def stream(
        self, path: str, body: dict[str, Any], max_bytes: int = SMALL_BYTES, where: str = ""
    ) -> tuple[list[tuple[float, Any]], float]:
        """The server-sent events that answer a POST, and the seconds until the stream ended.

        It is asked once: an answer that was tried again could not be timed.

        Args:
            path: below the server's address.
            body: JSON that requests a stream.
            max_bytes: longest answer that is read.
            where: prompt that is asked about, for errors.

        Returns:
            (seconds since the request was sent, JSON) of every event, and seconds in all.

        Raises:
            BadRequest: the server refuses this request (4xx).
            ServerError: no connection, a time-out, an event that reports an error, a stream without its end.
        """
        return self._submit(self._stream(path, body, max_bytes, where)).result()

    def served_model(self) -> tuple[str, int | None]:
        """Name of the model and the longest document it takes, from /v1/models.

        Raises:
            ServerError: no list of models, several without a choice, or not the wanted one.
        """
        answer = self.get("/v1/models")
        entries = answer.get("data") if isinstance(answer, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
            raise ServerError(f"{self.base}/v1/models does not list models; is this an inference server?")
        names = [str(entry.get("id")) for entry in entries]
        wanted = self.server.model or (names[0] if len(names) == 1 else None)
        if wanted not in names:
            found = f"no model {wanted!r}" if wanted else "several models"
            raise ServerError(
                f"{self.base} serves {found} ({', '.join(names) or 'none'}); name one as {self._options}model"
            )
        limit = entries[names.index(wanted)].get("max_model_len")
        return str(wanted), limit if isinstance(limit, int) else None

    def version(self) -> str | None:
        """The version that the server gives at /version, as vLLM and SGLang do; None where it gives none."""
        try:
            answer = self.get("/version")
        except ServerError:
            return None
        found = answer.get("version") if isinstance(answer, dict) else answer
        return None if found is None else str(found)

    def post(self, path: str, body: dict[str, Any], max_bytes: int = SMALL_BYTES, where: str = "") -> Any:
        """The JSON answer to a POST.

        Lost connections, time-outs, answers that break off, 429 and 5xx are tried again.

        Args:
            path: below the server's address.
            body: JSON.
            max_bytes: longest answer that is read.
            where: row of the corpus that is asked about, for errors.

        Raises:
            BadRequest: the server refuses this request (4xx); trying again would not help.
            ServerError: a redirect, an answer too long or too deep, or no whole one after all attempts.
        """
        return self._submit(self._ask("POST", path, body, max_bytes, where)).result()

    def close(self) -> None:
        """Cancel the requests in flight and close the connections."""
        if self._loop.is_closed():
            return
        self._submit(self._end()).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _submit(self, work: Coroutine[Any, Any, Any]) -> Future[Any]:
        if self._loop.is_closed():
            work.close()
            raise ServerError(f"{self.base}: the connection is closed")
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    async def _end(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._client.aclose()

    async def _ask(
        self,
        method: str,
        path: str,
        body: Any,
        max_bytes: int,
        where: str,
        read: Callable[[bytes], Any] = json.loads,
    ) -> Any:
        reason, about = "", f" (asked about {where})" if where else ""
        for attempt in range(self.server.retries + 1):
            if attempt:
                await asyncio.sleep(wait_s(self.server, attempt))
            try:
                status, content = await self._once(method, path, body, max_bytes)
                if status == 200:
                    return read(content)
            except RecursionError:
                raise ServerError(
                    f"{self.base}{path}: the server's JSON is nested too deep to be an answer{about}"
                ) from None
            except ServerError as error:
                raise ServerError(f"{error}{about}") from None
            except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, ValueError) as error:
                # refused and lost connections, time-outs, bodies cut short, JSON that breaks off
                reason = self._reason(error)
                continue
            text = _message(content) or f"HTTP {status}"
            if status not in _RETRIED:
                raise self._refused(path, status, text)
            reason = f"HTTP {status}: {text}"
        raise ServerLost(
            f"{self.base}{path}: no whole answer in {self.server.retries + 1} attempts (the last: {reason}). "
            "What is written stays; once the server answers, run the same command again to go on."
        )

    async def _once(self, method: str, path: str, body: Any, max_bytes: int) -> tuple[int, bytes]:
        async with (
            asyncio.timeout(self.server.timeout_s),
            self._client.stream(method, self.base + path, json=body) as response,
        ):
            if response.is_redirect:
                raise ServerError(
                    f"{self.base}{path}: the server redirects to {response.headers.get('location')!r}, "
                    "which is not followed, because the API key would go there too; give that address as "
                    f"{self._options}url if you trust it"
                )
            content = bytearray()
            async for part in response.aiter_bytes():
                content += part
                if len(content) > max_bytes:
                    raise ServerError(
                        f"{self.base}{path}: the server's answer is longer than {max_bytes:,} bytes, more "
                        "than the tokens that were asked for can take; check which server runs there"
                    )
            return response.status_code, bytes(content)

    async def _stream(
        self, path: str, body: Any, max_bytes: int, where: str
    ) -> tuple[list[tuple[float, Any]], float]:
        events, size, whole, about = [], 0, False, f" (asked about {where})" if where else ""
        begin = time.perf_counter()
        try:
            async with (
                asyncio.timeout(self.server.timeout_s),
                self._client.stream("POST", self.base + path, json=body) as response,
            ):
                pending = b""
                async for part in response.aiter_bytes():
                    now, size = time.perf_counter() - begin, size + len(part)
                    if size > max_bytes:
                        raise ServerError(
                            f"{self.base}{path}: the server streams more than {max_bytes:,} bytes{about}"
                        )
                    *lines, pending = (pending + part).split(b"\n")
                    for line in lines if response.status_code == 200 else ():
                        if line.startswith(b"data:"):
                            whole = line[5:].strip() == b"[DONE]"
                            events += [] if whole else [(now, json.loads(line[5:]))]
                if response.status_code != 200:
                    text = _message(pending) or f"HTTP {response.status_code}"
                    raise self._refused(path, response.status_code, text)
        except (httpx.HTTPError, httpx.InvalidURL, TimeoutError, ValueError, RecursionError) as error:
            if isinstance(error, ServerError):
                raise
            raise ServerError(f"{self.base}{path}: {self._reason(error)}{about}") from None
        failed = [event for _, event in events if not isinstance(event, dict) or "error" in event]
        if failed or not whole:
            said = _message(json.dumps(failed[0]).encode()) if failed else "the stream broke off"
            raise ServerError(f"{self.base}{path}: {said}{about}")
        return events, time.perf_counter() - begin

    def _reason(self, error: BaseException) -> str:
        if isinstance(error, TimeoutError):
            return f"no whole answer within {self._options}timeout_s={self.server.timeout_s:g}"
        causes = [error]
        while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
            causes.append(cause)
        numbers = [cause.errno for cause in causes if isinstance(cause, OSError) and cause.errno]
        return os.strerror(numbers[0]) if numbers else str(error) or type(error).__name__

    def _refused(self, path: str, status: int, reason: str) -> ServerError:
        if status in (401, 403):
            return ServerError(
                f"{self.base}{path}: HTTP {status}, the server needs a key ({reason}); give the name of the "
                f"environment variable that holds it as {self._options}api_key_variable"
            )
        return BadRequest(
            f"{self.base}{path}: the server refuses the request, HTTP {status}: {reason}", reason
        )


def wait_s(server: Server, attempt: int) -> float:
    """Seconds to wait before the attempt of this number, the first one being number 0."""
    wait = min(server.backoff_s * 2 ** (attempt - 1), _LONGEST_WAIT_S)
    return wait * random.uniform(0.5, 1.0)  # clients that failed together do not return together


def _message(body: bytes) -> str:
    """The message of an error's body, in whatever shape it comes."""
    text = body.decode(errors="replace")
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        return " ".join(text.split())[:300]
    for key in ("error", "message", "detail"):
        if isinstance(content, dict) and key in content:
            content = content[key]
    return " ".join(str(content).split())[:500]
