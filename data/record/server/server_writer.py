"""Recording from an inference server: the same shards, notes and errors as with a target loaded here.

Each prompt is one request; `concurrency` of them are in flight. Rows of a shard that is not whole are written
a few at a time, so a killed recording loses little and goes on like any other.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import closing
from itertools import islice
from pathlib import Path
from typing import TypeVar

from certdraft.data.record.interruption import Stopped, StopSignals
from certdraft.data.record.recording import (
    Recording,
    account,
    check_disk,
    check_fit,
    feature_size,
    finish_trace,
    meta_without_shards,
    open_ledger,
    read_prompts,
    recorded_settings,
    shard_prompts,
)
from certdraft.data.record.server.feature_files import FeatureFiles
from certdraft.data.record.server.http_server import Server
from certdraft.data.record.server.serve_command import serve_command
from certdraft.data.record.server.server_client import Client
from certdraft.data.targets import load_tokenizer, target_config
from certdraft.data.trace.recorded_row import RecordedRow
from certdraft.data.trace.shards import Ledger, RecordingError
from certdraft.data.trace.trace_metadata import TraceMeta
from certdraft.support import Progress, facts_of

Item = TypeVar("Item")
Result = TypeVar("Result")

_ROWS_A_PART = 32
_AHEAD = 2  # requests handed out per thread


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
    features = _feature_files(folder, recording, server)
    tokenizer = load_tokenizer(recording.tokenizer or recording.target, revision=recording.revision)
    prompts, accounting = read_prompts(recording, tokenizer)
    config = target_config(recording.target, revision=recording.revision)
    check_fit(prompts, recording, facts_of(config).vocab_size, config)
    client = Client(recording, server, tokenizer, prompts, config, features)
    settings = recorded_settings(recording, prompts, tokenizer)
    settings |= {"server": {"api": server.api, "model": server.model}}
    with closing(client):
        signals = StopSignals()
        ledger = open_ledger(folder, settings)
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


def _feature_files(folder: Path, recording: Recording, server: Server) -> FeatureFiles | None:
    """Where the servers leave features; None when none are recorded."""
    if not recording.feature_layers:
        return None
    if server.api != "completions":
        raise RecordingError("feature_layers: only vLLM's server (server.api=completions) gives features")
    if server.features_dir is None:
        raise RecordingError(
            "feature_layers with server.url need server.features_dir, a folder shared with the server, such "
            "as /dev/shm/features on the same machine. The server starts there with\n"
            f"{serve_command(recording, '/dev/shm/features')}"
        )
    return FeatureFiles(
        server.features_dir, recording.feature_layers, feature_size(recording), folder, server.timeout_s
    )


def in_parallel(
    items: Iterable[Item], act: Callable[[Item], Result], threads: int
) -> Iterator[tuple[Item, Result]]:
    """Pairs (item, act(item)) in the order in which they are done, few items being taken ahead.

    Raises:
        Exception: the first that `act` raised; items not begun are skipped.

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


def _record(ledger: Ledger, client: Client, signals: StopSignals) -> None:
    """Ask for every prompt of the unwritten shards, and commit each shard once it is whole."""
    shards = [shard for shard in range(ledger.num_shards) if not ledger.is_done(shard)]
    size, total = client.recording.shard_rows, len(client.prompts)
    missing = {shard: set(shard_prompts(shard, size, total).tolist()) for shard in shards}
    rows = {shard: ledger.kept(shard) for shard in shards}  # from before a kill
    fresh: dict[int, dict[int, RecordedRow]] = {shard: {} for shard in shards}  # not on disk yet
    for shard in shards:
        missing[shard] -= rows[shard].keys()

    def work() -> Iterator[int]:
        for shard in shards:  # a shard whose rows are all there but which was not written needs one again
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
        closing(in_parallel(list(work()), client.row, client.replicas.threads)) as answers,  # type: ignore[type-var]
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
