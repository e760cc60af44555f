"""Requests to inference servers for the documents of a recording, and the checks of a server before that."""

from __future__ import annotations

import re
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from jaxtyping import UInt16
from numpy import ndarray

from certdraft.data.corpus.chat import PromptSet
from certdraft.data.record.generation import eos_ids_of_configs
from certdraft.data.record.recording import Recording
from certdraft.data.record.server.feature_check import compare_features, target_features
from certdraft.data.record.server.feature_files import FeatureFiles, LostFile, with_last_token
from certdraft.data.record.server.http_server import (
    SMALL_BYTES,
    BadRequest,
    Connection,
    Server,
    ServerError,
    wait_s,
)
from certdraft.data.record.server.replicas import Replicas
from certdraft.data.record.server.serve_command import serve_command
from certdraft.data.record.server.server_protocol import (
    Answer,
    Api,
    Completions,
    Request,
    SGLang,
    row_of,
    wants_prompt_heads,
)
from certdraft.data.targets import generation_config
from certdraft.data.trace.recorded_row import RecordedRow
from certdraft.support import facts_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_ENTRY_BYTES = 256  # of JSON that one alternative of one position may take
# Words, digits, code, two scripts and a marker: tokenizers that agree here are taken for the same.
_PROBE = "def f(x):\n    return x + 12345  # naïve café, 你好, emoji 🙂\n\nTHE END"


class Client:
    """Requests for prompts, answers as rows; see `record_from_server`."""

    def __init__(
        self,
        recording: Recording,
        server: Server,
        tokenizer: PreTrainedTokenizerBase,
        prompts: PromptSet,
        config: Any,
        features: FeatureFiles | None,
    ) -> None:
        self.recording, self.server, self.tokenizer, self.prompts = recording, server, tokenizer, prompts
        self.replicas, self.features = Replicas(server), features
        self.vocab_size = facts_of(config).vocab_size
        written = generation_config(recording.target, revision=recording.revision)
        self.eos = eos_ids_of_configs((written, config), tokenizer)
        self.outputs: UInt16[ndarray, "T A H"] | None = None  # of all the target's layers, for the test text
        self.api: Api = Completions(server.model or "") if server.api == "completions" else SGLang()

    def row(self, index: int) -> RecordedRow:
        """The document that one prompt becomes."""
        prompt, settings = self.prompts[index], self.recording.generation
        room = max(0, settings.max_length - len(prompt.ids))
        budget = max(1, min(settings.max_new_tokens, room))
        given, inside = prompt.ids.tolist(), wants_prompt_heads(prompt, settings)
        kept, vocab, eos = self.recording.num_kept, self.vocab_size, self.eos
        if self.features is None:
            answer = self._ask(self.replicas, given, budget, inside, prompt.where)
            return row_of(answer, prompt, settings, kept, vocab, eos)
        answer, hidden = self._ask_with_features(
            self.features, self.replicas, given, budget, inside, prompt.where
        )
        written = 0 if settings.teacher_forced else len(answer.ids)
        hidden = with_last_token(hidden, len(given) + written)
        return row_of(answer, prompt, settings, kept, vocab, eos, hidden)

    def _ask_with_features(
        self,
        files: FeatureFiles,
        to: Connection | Replicas,
        given: list[int],
        budget: int,
        inside: bool,
        where: str,
    ) -> tuple[Answer, UInt16[ndarray, "T L H"]]:
        """An answer and features of all tokens but the last; asked again when the file is lost."""
        for attempt in range(self.server.retries + 1):
            if attempt:
                files.pause(wait_s(self.server, attempt))
            answer = self._ask(to, given, budget, inside, where)
            try:
                return answer, files.take(answer.features, [*given, *answer.ids][:-1], where)
            except LostFile as error:
                lost = error
        raise ServerError(
            f"{lost} (the last of {self.server.retries + 1} attempts). What is written stays; run the same "
            "command again to go on."
        )

    def close(self) -> None:
        """Cancel the requests in flight, and delete the files of abandoned requests."""
        self.replicas.close()
        if self.features is not None:
            self.features.close()

    def check(self) -> None:
        """Ask each server once, before any work: same tokenizer, enough alternatives, room, the right layers.

        Raises:
            ServerError: with what a server lacks.
        """
        longest = int(self.prompts.lengths.max()) + max(1, self.recording.generation.max_new_tokens)
        longest = min(longest, self.recording.generation.max_length)
        if self.features is not None:
            self.features.open(longest * self.replicas.threads)
        for connection in self.replicas.connections:
            self._check(connection, longest)

    def _check(self, connection: Connection, longest: int) -> None:
        url = connection.base
        model, limit = connection.served_model()
        if isinstance(self.api, Completions):
            if self.api.model not in ("", model):
                raise ServerError(
                    f"{url} serves {model}, another server {self.api.model}; replicas must give one target "
                    "one name (vLLM: --served-model-name)"
                )
            self.api = Completions(model)
        if limit is not None and longest > limit:
            raise ServerError(
                f"documents may reach {longest} tokens, but {url} serves {model} with room for "
                f"{limit}; lower generation.max_length or raise the server's limit"
            )
        expected = list(self.tokenizer(_PROBE, add_special_tokens=False)["input_ids"])
        answer = self._ask(connection, _PROBE, 1, True)
        if answer.prompt_ids is None:
            raise ServerError(
                f"{url}: the server does not return the token ids it works on, so its tokenizer "
                "cannot be compared; it must honour return_token_ids (vLLM 0.10.2 or newer)"
            )
        if answer.prompt_ids != expected:
            pairs = zip_longest(answer.prompt_ids, expected, fillvalue="nothing")
            at, (there, here) = next((i, pair) for i, pair in enumerate(pairs) if pair[0] != pair[1])
            raise ServerError(
                f"{url}: the server's tokenizer is not that of {self.recording.target}: token "
                f"{at} of a test text is {there} there and {here} here; serve that model, or name the "
                "one that is served as target"
            )
        few = min(map(len, [*answer.heads, *(answer.prompt_heads or [])]))
        if few < self.recording.num_kept:
            raise self._too_few(few)
        if self.features is not None:
            if answer.features is None:
                raise ServerError(
                    f"{url}: the server gives no features; start it with\n"
                    f"{serve_command(self.recording, self.server.features_dir or '')}"
                )
            self._check_features(connection, self.features, expected)

    def _check_features(self, connection: Connection, files: FeatureFiles, ids: list[int]) -> None:
        url = connection.base
        served = self._ask_with_features(files, connection, ids, 1, False, url)[1]
        if self.server.check_features:
            if self.outputs is None:
                self.outputs = target_features(self.recording, ids)
            compare_features(served, self.outputs, self.recording.feature_layers, url)

    def version(self) -> str:
        """The server's version, or its protocol where it gives none."""
        return self.replicas.connections[0].version() or self.server.api

    def _ask(
        self,
        to: Connection | Replicas,
        prompt: list[int] | str,
        max_tokens: int,
        inside: bool,
        where: str = "",
    ) -> Answer:
        kept = self.recording.num_kept
        name = None if self.features is None else self.features.name()
        body = self.api.body(Request(prompt, max_tokens, kept, sorted(self.eos), inside, name))
        max_bytes = SMALL_BYTES + _ENTRY_BYTES * (kept + 2) * (len(prompt) + max_tokens)
        try:
            reply = to.post(self.api.path, body, max_bytes, where)
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
