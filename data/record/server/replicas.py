"""Several servers of one target that share the requests."""

from __future__ import annotations

import sys
import threading
from dataclasses import replace
from typing import Any

from certdraft.data.record.server.http_server import SMALL_BYTES, Connection, Server, ServerLost


class Replicas:
    """Connections to one or more servers of one target, from any thread.

    A server that stays down while others answer is left out for the rest of the recording.

    Args:
        server: its url and those of its replicas, each with `concurrency` requests in flight.

    Raises:
        ServerError: the variable that should hold the key is not set.
    """

    def __init__(self, server: Server) -> None:
        self.connections = [Connection(replace(server, url=url, replicas=())) for url in server.urls]
        self.threads = server.concurrency * len(self.connections)
        self._alive = list(self.connections)
        self._in_flight = {id(connection): 0 for connection in self.connections}
        self._lock = threading.Lock()

    def post(self, path: str, body: dict[str, Any], max_bytes: int = SMALL_BYTES, where: str = "") -> Any:
        """`Connection.post` to the server with the fewest requests in flight.

        Raises:
            ServerError: it refuses the request, or every server is down.
        """
        while True:
            with self._lock:
                connection = min(self._alive, key=lambda each: self._in_flight[id(each)])
                self._in_flight[id(connection)] += 1
            try:
                return connection.post(path, body, max_bytes, where)
            except ServerLost as error:
                self._leave_out(connection, error)
            finally:
                with self._lock:
                    self._in_flight[id(connection)] -= 1

    def close(self) -> None:
        """Cancel the requests in flight and close the connections."""
        for connection in self.connections:
            connection.close()

    def _leave_out(self, lost: Connection, error: ServerLost) -> None:
        """Continue without this server; raises the error when it is the last."""
        with self._lock:
            if lost not in self._alive:  # another thread was first
                return
            if len(self._alive) == 1:
                raise error
            self._alive.remove(lost)
            print(f"{error} Until then {len(self._alive)} other server(s) do its part.", file=sys.stderr)
