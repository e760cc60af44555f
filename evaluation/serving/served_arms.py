"""The two servers of a benchmark, with the drafter and without: opened when needed, and checked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from types import TracebackType
from typing import Any

from certdraft.data import BadRequest, Connection, Server, ServerError
from certdraft.evaluation.prompts import Question
from certdraft.evaluation.serving.local_server import LocalVLLM, RunningServer
from certdraft.evaluation.serving.served_passes import Pass, PassFolder, counters_of, run_pass, warm_up
from certdraft.evaluation.serving.served_requests import Asking

_PROBE_TOKENS = 16


@dataclass(frozen=True)
class Arm:
    """A server that answers, and has a drafter or none as it should.

    Attributes:
        connection: to it.
        asking: how it is asked.
        facts: engine, its version, model, longest document, draft length (None: it does not say).
        process: the server, if it was started here.
    """

    connection: Connection
    asking: Asking
    facts: dict[str, Any]
    process: RunningServer | None = None

    def measure(self, questions: Sequence[Question], requests: int, **options: Any) -> Pass:
        """Run a pass; see `run_pass`.

        Raises:
            ServerError: with the last words of a server that was started here.
        """
        return self._told(run_pass, questions, requests, **options)

    def warm_up(self, questions: Sequence[Question], requests: int) -> None:
        """Run a pass that is not measured."""
        self._told(warm_up, questions, requests)

    def close(self) -> None:
        """Close the connection, and end a server that was started here."""
        self.connection.close()
        if self.process is not None:
            self.process.stop()

    def _told(self, act: Any, *args: Any, **options: Any) -> Pass:
        try:
            return act(self.connection, self.asking, *args, **options)
        except ServerError as error:
            if self.process is not None and self.process.has_ended():
                raise ServerError(f"{error}: {self.process.ended()}") from None
            raise


@dataclass(frozen=True)
class Place:
    """Where an arm is: a server that runs, or one to start."""

    server: Server
    local: LocalVLLM | None = None


class Arms:
    """Opens arms, at most one server that was started here at a time; a context that closes all.

    Args:
        places: arm → where it is.
        asking: how to ask; the model's name is filled in.
        questions: the first one is asked to see whether there is a drafter.
        folder: for the logs of servers, and what they say about themselves.
    """

    def __init__(
        self, places: Mapping[str, Place], asking: Asking, questions: Sequence[Question], folder: PassFolder
    ) -> None:
        self._places, self._asking, self._questions, self._folder = places, asking, questions, folder
        self._open: dict[str, Arm] = {}

    def __enter__(self) -> Arms:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name in list(self._open):
            self._open.pop(name).close()

    def open(self, name: str) -> Arm:
        """The arm of that name.

        Raises:
            ServerError: it does not answer, has no counters, has a drafter and should not, or the reverse.
        """
        if name not in self._open:
            for other in [key for key, arm in self._open.items() if arm.process is not None]:
                self._open.pop(other).close()
            self._open[name] = self._made(name, self._places[name])
            self._folder.note(name, self._open[name].facts)
            self._same_model()
        return self._open[name]

    def _made(self, name: str, place: Place) -> Arm:
        process, server = None, place.server
        if place.local is not None:
            process = place.local.start(name, self._folder.folder / f"server-{name}.log")
            server = replace(server, url=process.url)
        connection = Connection(server, options="--")
        try:
            model, limit = connection.served_model()
            asking = replace(self._asking, model=model)
            before = counters_of(connection)
            probe = self._probe(connection, asking)
            facts = {
                "engine": before.engine,
                "version": connection.version(),
                "model": model,
                "max_model_len": limit,
                "draft_length": len(before.by_position) or None,
            }
            _check_drafter(name, connection, before.rounds, probe)
            return Arm(connection, asking, facts, process)
        except BaseException:
            connection.close()
            if process is not None:
                process.stop()
            raise

    def _probe(self, connection: Connection, asking: Asking) -> Pass:
        try:
            return run_pass(connection, asking, self._questions[:1], 1, max_new_tokens=_PROBE_TOKENS)
        except BadRequest as error:
            if asking.chat and "template" in error.reason.lower():
                raise ServerError(f"{error}; the target has no chat template: give --chat false") from None
            raise

    def _same_model(self) -> None:
        known = self._folder.servers()
        names = {arm: facts["model"] for arm, facts in known.items()}
        engines = {facts["engine"] for facts in known.values()}
        if len(set(names.values())) > 1 and self._places["plain"].server.model is None:
            raise ServerError(
                f"the two servers serve different models, {names['drafter']} with a drafter and "
                f"{names['plain']} without; both must run the same target. If they are the same under two "
                "names, give --model and --baseline_model"
            )
        if len(engines) > 1:
            raise ServerError("one server is vLLM and the other SGLang; use one engine for both")


def _check_drafter(name: str, connection: Connection, rounds: int | None, probe: Pass) -> None:
    drafts = probe.counters.rounds or 0
    if name == "plain" and (drafts or (rounds is not None and probe.counters.engine == "vllm")):
        raise ServerError(
            f"{connection.base} has a drafter (its engine counts drafts), so it is no baseline; give "
            "--baseline_url a server of the target alone"
        )
    if name == "drafter" and not drafts:
        raise ServerError(
            f"{connection.base} drafts nothing (its engine counted no draft while it wrote "
            f"{probe.tokens} tokens); start it with its drafter (vLLM: --speculative-config)"
        )
