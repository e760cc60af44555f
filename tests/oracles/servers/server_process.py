"""A completion server of a small target as a process of its own, and what shall go wrong in it."""

import json
import os
import shutil
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from certdraft.data import Server

FOLDER = "layers_1_2"  # below the shared folder: where the server writes hidden states
_FILE = Path(__file__).parents[2] / "data" / "record" / "completion_server.py"
NO_PROXY = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}


class ServerProcess:
    """One server.

    Args:
        port: where it listens.
        root: folder that it shares with the recording, for hidden states of layers 1 and 2.
    """

    def __init__(self, port: int, root: Path | None = None) -> None:
        self.url, self.root = f"http://127.0.0.1:{port}", root

    def faults(self, **faults: Any) -> None:
        """Set what goes wrong from now on."""
        if self.root is not None:
            features = {"folder": str(self.root / FOLDER), "layers": [1, 2]}
            faults["features"] = features | faults.get("features", {})
        request = urllib.request.Request(f"{self.url}/faults", json.dumps(faults).encode())
        urllib.request.urlopen(request).close()

    def reset(self) -> None:
        """Nothing goes wrong, and no hidden states are left of an earlier test."""
        if self.root is not None:
            shutil.rmtree(self.root)
            (self.root / FOLDER).mkdir(parents=True)
        self.faults()

    def stats(self) -> dict[str, int]:
        """What the server has counted since the faults were set."""
        with urllib.request.urlopen(f"{self.url}/stats") as reply:
            return json.loads(reply.read())

    def __call__(self, **changes: Any) -> Server:
        """Settings that name this server."""
        shared = {} if self.root is None else {"features_dir": str(self.root)}
        return Server(**{"url": self.url, "concurrency": 3, "backoff_s": 0.01} | shared | changes)


@contextmanager
def serving(target_dir: str, root: Path | None = None) -> Iterator[ServerProcess]:
    """Run a server of a target until the end of the block."""
    command = [sys.executable, str(_FILE), target_dir]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=NO_PROXY) as running:
        assert running.stdout is not None
        try:
            yield ServerProcess(int(running.stdout.readline()), root)
        finally:
            running.kill()
