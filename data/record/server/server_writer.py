"""Recording from an inference server: the same shards, notes and refusals as with a target loaded here.

Each prompt is one request; `concurrency` of them are in flight. Rows of a shard that is not whole are written
a few at a time, so a killed recording loses little and goes on like any other.
"""

from __future__ import annotations

import re
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from certdraft.data.corpus.chat import Prompt, PromptSet
from certdraft.data.record.generation import eos_ids_of_configs
from certdraft.data.record.parallel import in_parallel
from certdraft.data.record.recording import (
    Recording,
    account,
    check_disk,
    check_fit,
    read_prompts,
    shard_prompts,
    target_revision,
    with_defaults,
)
from certdraft.data.record.server.http_server import BadRequest, Connection, Server, ServerError
from certdraft.data.record.server.server_protocol import Answer, Api, Completions, SGLang
from certdraft.data.record.server.server_rows import row_of, wants_prompt_heads
from certdraft.data.targets import generation_config, load_tokenizer, target_config, tokenizer_fingerprint
from certdraft.data.trace.arrow_trace import TRACE_FILE, TraceMeta
from certdraft.data.trace.recorded_row import RecordedRow
from certdraft.data.trace.shards import Ledger, RecordingError, stopped
from certdraft.data.trace.trace_metadata import trace_meta
from certdraft.support import Progress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ROWS_A_PART = 32
# Words, digits, code, two scripts and a marker: tokenizers that agree here are one tokenizer.
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
    words = load_tokenizer(recording.tokenizer or recording.target, revision=recording.revision)
    prompts, accounting = read_prompts(recording, words)
    config = target_config(recording.target, revision=recording.revision)
    check_fit(prompts, recording, int(config.vocab_size), getattr(config, "max_position_embeddings", None))
    asker = _Asker(recording, server, words, prompts)
    settings = recording.settings() | {
        "num_prompts": len(prompts),
        "prompts_sha256": prompts.sha256(),
        "target_revision": target_revision(recording.target, recording.revision),
        "tokenizer_fingerprint": tokenizer_fingerprint(words),
        "server": {"api": server.api, "model": server.model},
    }
    num_shards = -(-len(prompts) // recording.shard_rows)
    ledger = Ledger(folder, settings, num_shards, complete=with_defaults)
    try:
        meta = ledger.finished()
        if meta is not None:
            ledger.close()
            return meta
        print(accounting, file=sys.stderr)
        check_disk(folder, ledger, prompts, recording)
        asker.check()
        _record(ledger, asker)
        meta = trace_meta(
            ledger, recording, settings, accounting, vocab_size=asker.vocab_size, dtype="server",
            versions={"server": asker.version()}, has_entropy=False,
        )  # fmt: skip
        ledger.finish(meta)
        return TraceMeta.from_json((folder / TRACE_FILE).read_text(encoding="utf-8"), folder / TRACE_FILE)
    finally:
        ledger.release()


def _record(ledger: Ledger, asker: _Asker) -> None:
    """Asks for every prompt of the unwritten shards, and commits each shard once it is whole."""
    shards = [shard for shard in range(ledger.num_shards) if not ledger.is_done(shard)]
    size, total = asker.recording.shard_rows, len(asker.prompts)
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

    with Progress("recording", sum(map(len, missing.values())), "prompts") as progress, _sigterm() as asked:
        try:
            for index, row in in_parallel(work(), asker.row, asker.server.concurrency):
                shard = index // size
                rows[shard][index] = fresh[shard][index] = row
                missing[shard].discard(index)
                progress.advance(1, len(row.input_ids))
                if not missing[shard]:
                    finish(shard)
                elif len(fresh[shard]) >= _ROWS_A_PART:
                    save(shard)
                if asked.is_set():
                    raise stopped(ledger.folder)
        finally:  # whatever ends it, no answer is lost
            for shard in fresh:
                save(shard)


@contextmanager
def _sigterm() -> Iterator[threading.Event]:
    """Set once SIGTERM came; a handler can be installed in the main thread only."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return
    before = signal.signal(signal.SIGTERM, lambda *_: asked.set())
    try:
        yield asked
    finally:
        signal.signal(signal.SIGTERM, before)


class _Asker:
    """Prompts in, rows out."""

    def __init__(
        self, recording: Recording, server: Server, tokenizer: PreTrainedTokenizerBase, prompts: PromptSet
    ) -> None:
        self.recording, self.server, self.tokenizer, self.prompts = recording, server, tokenizer, prompts
        self.connection = Connection(server)
        config = target_config(recording.target, revision=recording.revision)
        self.vocab_size = int(config.vocab_size)
        written = generation_config(recording.target, revision=recording.revision)
        self.eos = eos_ids_of_configs((written, config), tokenizer)
        self.api: Api = Completions(server.model or "") if server.api == "completions" else SGLang()

    def row(self, index: int) -> RecordedRow:
        """The document that one prompt becomes."""
        prompt, settings = self.prompts[index], self.recording.generation
        room = max(0, settings.max_length - len(prompt.ids))
        budget = min(settings.max_new_tokens, room)
        answer = self._ask(prompt, max(1, budget), wants_prompt_heads(prompt, settings))
        return row_of(answer, prompt, settings, self.recording.num_kept, self.vocab_size, self.eos)

    def check(self) -> None:
        """Asks once, before any work: same tokenizer, enough alternatives, room for the longest document.

        Raises:
            ServerError: names what the server lacks.
        """
        model, limit = self._served()
        if self.server.api == "completions":
            self.api = Completions(model)
        longest = int(self.prompts.lengths.max()) + max(1, self.recording.generation.max_new_tokens)
        longest = min(longest, self.recording.generation.max_length)
        if limit is not None and longest > limit:
            raise ServerError(
                f"documents may reach {longest} tokens, but {self.server.url} serves {model} with room for "
                f"{limit}; lower generation.max_length or raise the server's limit"
            )
        mine = self.tokenizer(_PROBE, add_special_tokens=False)["input_ids"]
        theirs = self._ask(_PROBE, 1, True)
        if theirs.prompt_ids is None:
            raise ServerError(
                f"{self.server.url}: the server does not say which token ids it works on, so its tokenizer "
                "cannot be compared; it must honour return_token_ids (vLLM 0.10.2 or newer)"
            )
        if list(theirs.prompt_ids) != list(mine):
            at = next(
                (i for i, (a, b) in enumerate(zip(mine, theirs.prompt_ids, strict=False)) if a != b),
                min(len(mine), len(theirs.prompt_ids)),
            )
            raise ServerError(
                f"{self.server.url}: the server's tokenizer is not that of {self.recording.target}: token "
                f"{at} of a test text is {_at(theirs.prompt_ids, at)} there and {_at(mine, at)} here; serve "
                "that model, or name the one that is served as target"
            )
        few = min(map(len, [*theirs.heads, *(theirs.prompt_heads or [])]))
        if few < self.recording.num_kept:
            raise self._too_few(few)

    def version(self) -> str:
        """What the server calls itself, as far as it says."""
        try:
            said = self.connection.get("/version")
        except ServerError:
            return self.server.api
        return str(said.get("version", said) if isinstance(said, dict) else said)

    def _ask(self, prompt: Prompt | str, max_tokens: int, inside: bool) -> Answer:
        text = prompt if isinstance(prompt, str) else prompt.ids.tolist()
        kept = self.recording.num_kept
        body = self.api.body(text, max_tokens, kept, sorted(self.eos), inside)
        try:
            reply = self.connection.post(self.api.path, body)
        except BadRequest as error:
            limit = [int(number) for number in re.findall(r"\d+", error.said) if int(number) < kept]
            if "logprobs" in error.said and limit:
                raise self._too_few(limit[-1]) from None
            raise
        try:
            return self.api.read(reply, inside)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            if isinstance(error, ServerError):
                raise
            raise ServerError(
                f"{self.server.url}{self.api.path}: the server's answer has another shape than "
                f"server.api={self.server.api} gives ({type(error).__name__}: {error})"
            ) from error

    def _too_few(self, limit: int) -> ServerError:
        return ServerError(
            f"{self.server.url}: the server gives at most {limit} alternatives a step, num_kept="
            f"{self.recording.num_kept} are wanted; start it with a higher limit (vLLM: --max-logprobs "
            f"{self.recording.num_kept}) or record with num_kept={limit}"
        )

    def _served(self) -> tuple[str, int | None]:
        """Name of the model and the longest document it takes, from /v1/models."""
        entries = self.connection.get("/v1/models").get("data") or []
        names = [entry["id"] for entry in entries]
        wanted = self.server.model or (names[0] if len(names) == 1 else None)
        if wanted not in names:
            asked = f"no model {wanted!r}" if wanted else "several models"
            raise ServerError(
                f"{self.server.url} serves {asked} ({', '.join(names) or 'none'}); name one as server.model"
            )
        limit = entries[names.index(wanted)].get("max_model_len")
        return str(wanted), None if limit is None else int(limit)


def _at(ids: list[int], index: int) -> str:
    return str(ids[index]) if index < len(ids) else "nothing"
