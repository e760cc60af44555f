"""A vLLM server on this machine, started and stopped by the benchmark."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType

import httpx

from certdraft.data import ServerError, embedded_target_path
from certdraft.drafters import drafter_kinds, read_facts

_STOPPING_S = 30.0
_DYING_S = 5.0  # from the first lost request to the end of its process
_SHOWN_LINES = 3  # of a log, in an error


@dataclass(frozen=True)
class LocalVLLM:
    """A vLLM server with and without a drafter, one at a time.

    Args:
        python: interpreter of the environment that vLLM is installed in.
        target: "embedded", a folder or a hub name.
        drafter: exported folder, or another one that vLLM reads.
        dtype: of the weights.
        draft_length: draft tokens per round; that of the export when None.
        method: vLLM's word for the drafter; by the export when None.
        options: further options of the server.
        port: to listen on; a free one when None.
        starting_s: seconds that it may take until it answers.
    """

    python: str
    target: str
    drafter: str
    dtype: str = "bfloat16"
    draft_length: int | None = None
    method: str | None = None
    options: list[str] = field(default_factory=list)
    port: int | None = None
    starting_s: float = 1800.0

    def speculative_config(self) -> dict[str, str | int]:
        """vLLM's --speculative-config.

        Raises:
            ValueError: the folder's format is not for vLLM, or does not say how long its drafts are.
        """
        method, length = self.method, self.draft_length
        if (Path(self.drafter) / "drafter.json").is_file():
            facts = read_facts(self.drafter)
            kind = drafter_kinds().get(facts["family"])
            engines = kind.export_formats.get(facts["format"]) if kind is not None else None
            if method is None and (engines is None or engines.vllm is None):
                raise ValueError(
                    f"{self.drafter}: vLLM does not read the format {facts['format']} of this drafter; "
                    "export it in another one, or name vLLM's method with --method"
                )
            method = method or (engines.vllm if engines is not None else None)
            length = length or facts["draft_length"]
        if length is None:
            raise ValueError(
                f"{self.drafter} does not say how many tokens to draft; give --draft_length (and --method "
                "unless it is a causal LM)"
            )
        return {
            "method": method or "draft_model",
            "model": str(Path(self.drafter).resolve()) if Path(self.drafter).exists() else self.drafter,
            "num_speculative_tokens": length,
        }

    def command(self, arm: str, port: int) -> list[str]:
        """The command line of the server with the drafter ("drafter") or without ("plain")."""
        model = str(embedded_target_path()) if self.target == "embedded" else self.target
        line = [self.python, "-m", "vllm.entrypoints.openai.api_server", "--model", model]
        line += ["--host", "127.0.0.1", "--port", str(port), "--dtype", self.dtype, *self.options]
        if arm == "drafter":
            line += ["--speculative-config", json.dumps(self.speculative_config())]
        return line

    def start(self, arm: str, log: Path) -> RunningServer:
        """Start it and wait until it answers.

        Args:
            arm: with the drafter or without.
            log: log file.

        Raises:
            ServerError: it cannot be started, ends, or takes too long.
        """
        port = self.port or _free_port()
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("wb") as said:
            try:
                # vLLM's own processes are in the new session too, so that all of them can be ended.
                process = subprocess.Popen(
                    self.command(arm, port), stdout=said, stderr=subprocess.STDOUT, start_new_session=True
                )
            except OSError as error:
                raise ServerError(
                    f"{self.python} cannot be run ({error.strerror}); give the interpreter of the "
                    "environment that has vLLM as --python"
                ) from None
        running = RunningServer(process, f"http://127.0.0.1:{port}", log)
        try:
            running.wait(self.starting_s)
        except BaseException:
            running.stop()
            raise
        return running


@dataclass(frozen=True)
class RunningServer:
    """A server that was started here; a context that ends it."""

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def __enter__(self) -> RunningServer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def wait(self, seconds: float) -> None:
        """Return once the server answers; raise ServerError if it ends before, or does not in time."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if self.process.poll() is not None:
                raise ServerError(self.ended())
            try:
                if httpx.get(f"{self.url}/health", trust_env=False, timeout=5.0).status_code == 200:
                    return
            except httpx.HTTPError:
                pass
            time.sleep(0.5)
        raise ServerError(f"the server did not answer within {seconds:g} s; see {self.log}")

    def has_ended(self) -> bool:
        """Whether the server has ended, or does within seconds."""
        try:
            self.process.wait(_DYING_S)
        except subprocess.TimeoutExpired:
            return False
        return True

    def ended(self) -> str:
        """What to say of a server that has ended: its exit code and its last words."""
        lines = self.log.read_text(encoding="utf-8", errors="replace").splitlines()
        said = [line.strip() for line in lines if "rror" in line] or [line for line in lines if line.strip()]
        return (
            f"the server ended with exit code {self.process.returncode}: "
            f"{' | '.join(said[-_SHOWN_LINES:])[-600:] or 'no word'} (all of it: {self.log})"
        )

    def stop(self) -> None:
        """End the server and its processes."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self.process.pid, number)
            except ProcessLookupError:
                break
            try:
                self.process.wait(_STOPPING_S)
            except subprocess.TimeoutExpired:
                continue
        self.process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
