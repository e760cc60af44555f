"""Passes over all prompts with a fixed number of requests in flight, each kept in a file once it is whole."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from certdraft.data import Connection, ServerError, in_parallel
from certdraft.evaluation.prompts import Question
from certdraft.evaluation.report.page import write_json
from certdraft.evaluation.serving.engine_counters import Counters, NoCounters, read_counters
from certdraft.evaluation.serving.served_requests import Answer, Asking, ask

ARMS = ("drafter", "plain")  # the server with the drafter, the one without
_METRICS_BYTES = 1 << 26
_SETTLING_S = 2.0  # the engine's counters follow the last token
_WARMUP_TOKENS = 16


@dataclass(frozen=True)
class PassKey:
    """Which pass it is.

    Attributes:
        arm: one of `ARMS`.
        requests: in flight.
        repetition: from 0.
    """

    arm: str
    requests: int
    repetition: int

    @property
    def name(self) -> str:
        """Of its file, without the ending."""
        return f"{self.arm}-{self.requests}-{self.repetition}"


@dataclass(frozen=True)
class Pass:
    """One pass.

    Attributes:
        wall_s: from the first request to the end of the last answer.
        answers: in the order of the prompts.
        counters: growth of the engine's counters.
    """

    wall_s: float
    answers: list[Answer]
    counters: Counters

    @property
    def tokens(self) -> int:
        """Of all answers."""
        return sum(answer.tokens for answer in self.answers)


class PassFolder:
    """The passes of one benchmark on disk, which a later call of the same command goes on with.

    Args:
        folder: of the benchmark; passes are kept in `passes` below it, from the first one on.
        settings: what the passes depend on.

    Raises:
        FileExistsError: the folder holds something else, a finished benchmark, or one of other settings.
    """

    def __init__(self, folder: Path, settings: dict[str, Any]) -> None:
        self.folder, self._settings = folder / "passes", json.loads(json.dumps(settings))
        if (folder / "bench.json").exists() or (
            folder.exists() and any(folder.iterdir()) and not self.folder.is_dir()
        ):
            raise FileExistsError(
                f"{folder}: output directory already in use; name another one with --out, or move it away"
            )
        then = self._read("settings")
        changed = sorted(key for key in settings if then.get(key) != self._settings[key])
        if then and changed:
            raise FileExistsError(
                f"{folder} holds an unfinished benchmark with other settings ({', '.join(changed)}); "
                "give these again to go on with it, or name another folder with --out"
            )

    def note(self, arm: str, facts: dict[str, Any]) -> None:
        """Keep what an arm's server reports about itself.

        Raises:
            ServerError: earlier passes are of another model or another draft length.
        """
        known = self.servers().get(arm) or facts
        apart = [key for key in ("model", "draft_length") if known[key] != facts[key]]
        if apart:
            raise ServerError(
                f"the passes in {self.folder} are of {apart[0]} {known[apart[0]]}, this server has "
                f"{facts[apart[0]]}; go on with the same one, or name another folder with --out"
            )
        self._write("servers", {**self.servers(), arm: facts})

    def servers(self) -> dict[str, dict[str, Any]]:
        """What the servers of the arms said about themselves."""
        return self._read("servers")

    def load(self, key: PassKey) -> Pass | None:
        """The pass, if it was run."""
        found = self._read(key.name)
        if not found:
            return None
        counters = found["counters"] | {"by_position": tuple(found["counters"]["by_position"])}
        return Pass(found["wall_s"], [Answer(**a) for a in found["answers"]], Counters(**counters))

    def save(self, key: PassKey, run: Pass) -> None:
        """Write a pass, whole or not at all."""
        self._write(key.name, asdict(key) | asdict(run))

    def _read(self, name: str) -> dict[str, Any]:
        file = self.folder / f"{name}.json"
        return json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}

    def _write(self, name: str, content: dict[str, Any]) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "settings.json").is_file():
            write_json(self.folder / "settings.json", self._settings)
        write_json(self.folder / f"{name}.json", content)


def counters_of(connection: Connection) -> Counters:
    """Read the engine's counters.

    Raises:
        ServerError: no /metrics, or one without an engine's counters.
    """
    advice = "vLLM has them unless it runs with --disable-log-stats, SGLang with --enable-metrics"
    try:
        return read_counters(connection.get_text("/metrics", _METRICS_BYTES))
    except NoCounters as error:
        raise ServerError(f"{connection.base}/metrics: {error}; {advice}") from None
    except ServerError as error:
        raise ServerError(f"{error} The engine's counters are needed: {advice}.") from None


def run_pass(
    connection: Connection,
    asking: Asking,
    questions: Sequence[Question],
    requests: int,
    *,
    progress: Callable[[int], None] = lambda tokens: None,
    max_new_tokens: int | None = None,
) -> Pass:
    """Ask every question once, `requests` of them at a time.

    Args:
        connection: to the server.
        asking: how.
        questions: the prompts, in order.
        requests: in flight.
        progress: called with the tokens of each answer.
        max_new_tokens: another limit than `asking` has.

    Raises:
        ServerError: an answer is missing; nothing is tried again, because it could not be timed.
    """
    before = counters_of(connection)
    answers: list[Answer] = []
    begin = time.perf_counter()

    def one(index: int) -> Answer:
        return ask(connection, asking, questions[index], index, max_new_tokens)

    with closing(in_parallel(range(len(questions)), one, requests)) as results:  # type: ignore[type-var]
        for _, answer in results:
            answers.append(answer)
            progress(answer.tokens)
    wall_s = time.perf_counter() - begin
    answers.sort(key=lambda answer: answer.prompt)
    wanted = sum(answer.tokens for answer in answers)
    while True:
        after = counters_of(connection).since(before)
        if after.generated >= wanted or time.perf_counter() - begin - wall_s > _SETTLING_S:
            return Pass(wall_s, answers, after)
        time.sleep(0.05)


def warm_up(connection: Connection, asking: Asking, questions: Sequence[Question], requests: int) -> Pass:
    """Run a short pass that is not measured: two rounds of requests at this load."""
    few = [questions[index % len(questions)] for index in range(2 * requests)]
    return run_pass(connection, asking, few, requests, max_new_tokens=_WARMUP_TOKENS)
