"""Servers without a model, in this process, and a prompts file for them."""

import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from oracles.servers.fake_engine import Engine, serve

PROMPTS = 6


@pytest.fixture
def start() -> Iterator[Callable[..., tuple[Engine, str]]]:
    """Starts an engine; returns it and its address."""
    servers = []

    def make(**behaviour: Any) -> tuple[Engine, str]:
        engine = Engine(**behaviour)
        server = serve(engine)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return engine, f"http://127.0.0.1:{server.server_address[1]}"

    yield make
    for server in servers:
        server.shutdown()
        server.server_close()


@pytest.fixture
def settings(tmp_path: Path) -> dict[str, Any]:
    """A small benchmark."""
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"question {n}"}) + "\n" for n in range(PROMPTS)))
    return {
        "prompts_files": [str(file)], "requests": [1, 4], "max_new_tokens": 16, "repetitions": 2,
        "out": str(tmp_path / "bench"),
    }  # fmt: skip


@pytest.fixture
def result(settings: dict[str, Any]) -> Callable[[], dict[str, Any]]:
    """Content of bench.json."""
    return lambda: json.loads(Path(settings["out"], "bench.json").read_text())
