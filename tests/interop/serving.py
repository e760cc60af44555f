"""A vLLM server process on this machine's CPU."""

import os
import socket
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from interop.environments import ENVIRONMENTS

ENVIRONMENT = os.environ | {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "HF_HUB_OFFLINE": "1",
    "OMP_NUM_THREADS": "1",
    "TORCHDYNAMO_DISABLE": "1",  # some functions are compiled in eager mode too, which takes minutes
    "no_proxy": "127.0.0.1",
}
STARTING_S = 900.0


@contextmanager
def served(words: list[str], log: Path, **variables: str) -> Iterator[str]:
    """A vLLM server with these words, the model first, and a port; the address, once it answers.

    The CPU build has no metadata under the name that `vllm serve` looks up, so the module is run.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    python = ENVIRONMENTS / "vllm" / "venv" / "bin" / "python"
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", *words]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    environment = ENVIRONMENT | variables
    with (
        log.open("w") as said,
        subprocess.Popen(command, env=environment, stdout=said, stderr=said) as running,
    ):
        try:
            wait_for(f"http://127.0.0.1:{port}/health", running, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            running.terminate()
            running.wait(60)


def wait_for(health: str, running: subprocess.Popen[bytes], log: Path) -> None:
    """Returns once the server answers."""
    begin = time.monotonic()
    while time.monotonic() - begin < STARTING_S:
        assert running.poll() is None, log.read_text()[-3000:]
        try:
            urllib.request.urlopen(health, timeout=5).close()
            return
        except (urllib.error.URLError, OSError):
            time.sleep(1)
    raise AssertionError(f"no answer after {STARTING_S:g} s: {log.read_text()[-3000:]}")
