"""Recording from an inference server: the same shards, notes and errors as with a target loaded here.

Each prompt is one request; `concurrency` of them are in flight. Rows of a shard that is not whole are written
a few at a time, so a killed recording loses little and goes on like any other.
"""

from __future__ import annotations

import re
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from itertools import islice, zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from certdraft.data.corpus.chat import PromptSet
from certdraft.data.record.generation import eos_ids_of_configs
from certdraft.data.record.interruption import Stopped, StopSignals
from certdraft.data.record.recording import (
    Recording,
    account,
    check_disk,
    check_fit,
    finish_trace,
    meta_without_shards,
    read_prompts,
    recorded_settings,
    shard_prompts,
    with_defaults,
)
from certdraft.data.record.server.http_server import (
    SMALL_BYTES,
    BadRequest,
    Connection,
    Server,
    ServerError,
)
from certdraft.data.record.server.server_protocol import (
    Answer,
    Api,
    Completions,
    Request,
    SGLang,
    row_of,
    wants_prompt_heads,
)
from certdraft.data.targets import generation_config, load_tokenizer, target_config
from certdraft.data.trace.recorded_row import RecordedRow
from certdraft.data.trace.shards import Ledger, RecordingError
from certdraft.data.trace.trace_metadata import TraceMeta
from certdraft.support import Progress, facts_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Item = TypeVar("Item")
Result = TypeVar("Result")

_ROWS_A_PART = 32
_AHEAD = 2  # requests handed out per thread
_ENTRY_BYTES = 256  # of JSON that one alternative of one position may take
# Words, digits, code, two scripts and a marker: tokenizers that agree here are taken for the same.
_PROBE = "def f(x):\n    return x + 12345  # naïve café, 你好, emoji 🙂\n\nTHE END"


def record_from_server(folder: Path, recording: Recording, server: Server) -> TraceMeta:
    """`record_trace` with a server in the target's place; the arguments have been checked.

    Args:
        folder: of the trace.
        recording: what to record. `target` names tokenizer and config; no weights are loaded.
        server: where to ask.

    Raises:
        ServerError: the server cannot be used for this.
        ValueError: bad rows, a folder in use, a disk too small.
        FileNotFoundError: no such corpus, config or tokenizer.
    """
    if recording.feature_layers:
        raise RecordingError(
            "a server sends no features of the target's layers; leave feature_layers out, or leave "
            "server.url out, so that this command loads the target"
        )
    tokenizer = load_tokenizer(recording.tokenizer or recording.target, revision=recording.revision)
    prompts, accounting = read_prompts(recording, tokenizer)
    config = target_config(recording.target, revision=recording.revision)
    check_fit(prompts, recording, facts_of(config).vocab_size, config)
    client = _Client(recording, server, tokenizer, prompts, config)
    settings = recorded_settings(recording, prompts, tokenizer)
    settings |= {"server": {"api": server.api, "model": server.model}}
    with closing(client.connection):
        signals = StopSignals()
        ledger = Ledger(folder, settings, -(-len(prompts) // recording.shard_rows), complete=with_defaults)
        try:
            meta = ledger.finished()
            if meta is not None:
                ledger.close()
                return meta
            print(accounting, file=sys.stderr)
            check_disk(folder, ledger, prompts, recording)
            client.check()
            begun = meta_without_shards(
                recording, settings, accounting, vocab_size=client.vocab_size, dtype="server",
                versions={"server": client.version()}, has_entropy=False,
            )  # fmt: skip
            ledger.begin(begun)
            _record(ledger, client, signals)
            return finish_trace(ledger, begun, ledger.shards())
        except Stopped:
            raise signals.exit(folder) from None
        finally:
            ledger.release()


def in_parallel(
    items: Iterable[Item], act: Callable[[Item], Result], threads: int
) -> Iterator[tuple[Item, Result]]:
    """Pairs (item, act(item)) in the order in which they are done, few items being taken ahead.

    Raises:
        Exception: the first that `act` raised; the items that were not begun are left alone.

    Examples:
        >>> sorted(in_parallel([3, 1, 2], lambda n: n * n, threads=2))
        [(1, 1), (2, 4), (3, 9)]
    """
    pool, ended = ThreadPoolExecutor(threads), threading.Event()
    iterator, waiting = iter(items), set[Future[tuple[Item, Result] | None]]()

    def work(item: Item) -> tuple[Item, Result] | None:
        if ended.is_set():
            return None
        try:
            return item, act(item)
        except BaseException:
            ended.set()
            raise

    try:
        while True:
            for item in islice(iterator, _AHEAD * threads - len(waiting)):
                waiting.add(pool.submit(work, item))
            if not waiting:
                return
            done, waiting = wait(waiting, return_when=FIRST_COMPLETED)
            for future in sorted(done, key=lambda future: future.exception() is not None):
                if (pair := future.result()) is not None:
                    yield pair
    finally:
        ended.set()
        pool.shutdown(wait=False, cancel_futures=True)


def _record(ledger: Ledger, client: _Client, signals: StopSignals) -> None:
    """Ask for every prompt of the unwritten shards, and commit each shard once it is whole."""
    shards = [shard for shard in range(ledger.num_shards) if not ledger.is_done(shard)]
    size, total = client.recording.shard_rows, len(client.prompts)
    missing = {shard: set(shard_prompts(shard, size, total).tolist()) for shard in shards}
    rows = {shard: ledger.kept(shard) for shard in shards}  # from before a kill
    fresh: dict[int, dict[int, RecordedRow]] = {shard: {} for shard in shards}  # not on disk yet
    for shard in shards:
        missing[shard] -= rows[shard].keys()

    def work() -> Iterator[int]:
        for shard in shards:  # a shard whose rows are all there, but which is not, asks for one again
            yield from sorted(missing[shard]) or [shard * size]

    def finish(shard: int) -> None:
        used, accounting = account([row for _, row in sorted(rows.pop(shard).items())])
        ledger.commit(shard, used, accounting)
        fresh[shard].clear()

    def save(shard: int) -> None:
        if fresh[shard]:
            ledger.keep(shard, fresh[shard])
            fresh[shard] = {}

    with (
        Progress("recording", sum(map(len, missing.values())), "prompts") as progress,
        signals,
        closing(in_parallel(list(work()), client.row, client.server.concurrency)) as answers,  # type: ignore[type-var]
    ):
        try:
            while True:
                with signals.interruptible():
                    if (pair := next(answers, None)) is None:
                        break
                index, row = pair
                shard = index // size
                rows[shard][index] = fresh[shard][index] = row
                missing[shard].discard(index)
                progress.advance(1, len(row.input_ids))
                if not missing[shard]:
                    finish(shard)
                elif len(fresh[shard]) >= _ROWS_A_PART:
                    save(shard)
        finally:  # whatever ends it, no answer is lost
            for shard in fresh:
                save(shard)


class _Client:
    """Requests for prompts, answers as rows."""

    def __init__(
        self,
        recording: Recording,
        server: Server,
        tokenizer: PreTrainedTokenizerBase,
        prompts: PromptSet,
        config: Any,
    ) -> None:
        self.recording, self.server, self.tokenizer, self.prompts = recording, server, tokenizer, prompts
        self.connection = Connection(server)
        self.vocab_size = facts_of(config).vocab_size
        written = generation_config(recording.target, revision=recording.revision)
        self.eos = eos_ids_of_configs((written, config), tokenizer)
        self.api: Api = Completions(server.model or "") if server.api == "completions" else SGLang()

    def row(self, index: int) -> RecordedRow:
        """The document that one prompt becomes."""
        prompt, settings = self.prompts[index], self.recording.generation
        room = max(0, settings.max_length - len(prompt.ids))
        budget = max(1, min(settings.max_new_tokens, room))
        answer = self._ask(prompt.ids.tolist(), budget, wants_prompt_heads(prompt, settings), prompt.where)
        return row_of(answer, prompt, settings, self.recording.num_kept, self.vocab_size, self.eos)

    def check(self) -> None:
        """Ask once, before any work: same tokenizer, enough alternatives, room for the longest document.

        Raises:
            ServerError: with what the server lacks.
        """
        model, limit = self.connection.served_model()
        if self.server.api == "completions":
            self.api = Completions(model)
        longest = int(self.prompts.lengths.max()) + max(1, self.recording.generation.max_new_tokens)
        longest = min(longest, self.recording.generation.max_length)
        if limit is not None and longest > limit:
            raise ServerError(
                f"documents may reach {longest} tokens, but {self.server.url} serves {model} with room for "
                f"{limit}; lower generation.max_length or raise the server's limit"
            )
        expected = list(self.tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
        answer = self._ask(_PROBE, 1, True)
        if answer.prompt_ids is None:
            raise ServerError(
                f"{self.server.url}: the server does not return the token ids it works on, so its tokenizer "
                "cannot be compared; it must honour return_token_ids (vLLM 0.10.2 or newer)"
            )
        if answer.prompt_ids != expected:
            pairs = zip_longest(answer.prompt_ids, expected, fillvalue="nothing")
            at, (there, here) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
            raise ServerError(
                f"{self.server.url}: the server's tokenizer is not that of {self.recording.target}: token "
                f"{at} of a test text is {there} there and {here} here; serve that model, or name the "
                "one that is served as target"
            )
        few = min(map(len, [*answer.heads, *(answer.prompt_heads or [])]))
        if few < self.recording.num_kept:
            raise self._too_few(few)

    def version(self) -> str:
        """The server's version, as far as it gives one."""
        try:
            answer = self.connection.get("/version")
        except ServerError:
            return self.server.api
        return str(answer.get("version", answer) if isinstance(answer, dict) else answer)

    def _ask(self, prompt: list[int] | str, max_tokens: int, inside: bool, where: str = "") -> Answer:
        kept = self.recording.num_kept
        body = self.api.body(Request(prompt, max_tokens, kept, sorted(self.eos), inside))
        max_bytes = SMALL_BYTES + _ENTRY_BYTES * (kept + 2) * (len(prompt) + max_tokens)
        try:
            reply = self.connection.post(self.api.path, body, max_bytes, where)
        except BadRequest as error:
            limit = [int(number) for number in re.findall(r"\d+", error.reason) if int(number) < kept]
            if "logprobs" in error.reason and limit:
                raise self._too_few(limit[-1]) from None
            raise
        try:
            return self.api.read(reply, inside)
        except ServerError as error:
            raise ServerError(f"{where}: {error}" if where else str(error)) from None
        except (LookupError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise ServerError(
                f"{where or self.server.url}: the server's answer has another shape than server.api="
                f"{self.server.api} gives ({type(error).__name__}: {error}); check which server runs at "
                f"{self.server.url}"
            ) from error

    def _too_few(self, limit: int) -> ServerError:
        return ServerError(
            f"{self.server.url}: the server gives at most {limit} alternatives a step, num_kept="
            f"{self.recording.num_kept} are wanted; start it with a higher limit (vLLM: --max-logprobs "
            f"{self.recording.num_kept}) or record with num_kept={limit}"
        )
