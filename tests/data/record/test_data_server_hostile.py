"""A client survives servers that redirect, never end an answer or send it byte by byte."""

import contextlib
import http.server
import threading
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError

import pytest

from certdraft.data import Server, ServerError
from certdraft.data.record.server import http_server as server_module


class Hostile(http.server.BaseHTTPRequestHandler):
    """Answers that a client must survive; `keys` are the Authorization headers that came."""

    keys: list[str | None] = []
    protocol_version = "HTTP/1.1"

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.keys.append(self.headers.get("Authorization"))
        mode = self.path.removeprefix("/")
        self.send_response(302 if mode.startswith("to/") else 200)
        if mode.startswith("to/"):
            self.send_header("Location", "http://" + mode.removeprefix("to/"))
        self.send_header("Content-Length", "0" if mode.startswith("to/") else str(1 << 40))
        self.send_header("Connection", "close")
        with contextlib.suppress(OSError):
            if mode == "slow-headers":
                for _ in range(60):
                    self.wfile.write(b"X-A: b\r\n")
                    time.sleep(0.05)
            self.end_headers()
            while mode in ("endless", "dribble"):
                self.wfile.write(b" " * ((1 << 16) if mode == "endless" else 1))
                if mode == "dribble":
                    time.sleep(0.05)


@pytest.fixture
def hostile(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(Hostile, "keys", [])
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hostile)
    running.daemon_threads = True
    thread = threading.Thread(target=running.serve_forever, daemon=True)
    thread.start()
    yield f"127.0.0.1:{running.server_port}"
    running.shutdown()
    running.server_close()


def asked(address: str, path: str, **settings: object) -> None:
    server = Server(f"http://{address}", **{"timeout_s": 0.5, "retries": 1, "backoff_s": 0.01} | settings)
    with contextlib.closing(server_module.Connection(server)) as connection:
        connection.get(path)


def test_a_redirect_is_refused_and_the_key_stays(hostile: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", "secret")
    with pytest.raises(
        ServerError, match=r"redirects to 'http://127\.0\.0\.1:\d+/elsewhere', which is not foll"
    ):
        asked(hostile, f"/to/{hostile}/elsewhere", api_key_variable="A_KEY", timeout_s=10)
    assert Hostile.keys == ["Bearer secret"]  # one request, and none to the other address


def test_answers_of_any_length_are_not_read(hostile: str) -> None:
    with pytest.raises(ServerError, match="answer is longer than 1,048,576 bytes"):
        asked(hostile, "/endless", timeout_s=60)
    assert len(Hostile.keys) == 1


@pytest.mark.parametrize("path", ["/dribble", "/slow-headers"])
def test_a_request_ends_although_bytes_trickle_in(hostile: str, path: str) -> None:
    begin = time.monotonic()
    with pytest.raises(
        ServerError, match=r"in 2 attempts \(the last: no whole answer within .*timeout_s=0\.5\)"
    ):
        asked(hostile, path)
    assert time.monotonic() - begin < 6


def test_closing_a_connection_ends_its_requests(hostile: str) -> None:
    connection = server_module.Connection(Server(f"http://{hostile}", timeout_s=600))
    ended = threading.Event()

    def ask() -> None:
        with pytest.raises(CancelledError):
            connection.get("/dribble")
        ended.set()

    threading.Thread(target=ask, daemon=True).start()
    while not Hostile.keys:
        time.sleep(0.01)
    connection.close()
    assert ended.wait(10)
    with pytest.raises(ServerError, match="the connection is closed"):
        connection.get("/dribble")
