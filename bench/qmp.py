"""A minimal blocking QMP client: the same for every peer, so that it favours none."""

import json
import socket
import time
from pathlib import Path
from typing import Any

Json = Any

TIMEOUT_S = 300.0


class Qmp:
    """One negotiated QMP session."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(TIMEOUT_S)
        self._socket.connect(str(path))
        self._lines = self._socket.makefile("rb")
        self.greeting = self._receive()
        self.greeted = time.perf_counter()
        self._events: list[dict[str, Json]] = []
        self.command("qmp_capabilities")

    def close(self) -> None:
        self._lines.close()
        self._socket.close()

    def command(self, name: str, arguments: dict[str, Json] | None = None) -> Json:
        """Execute a command and return what it returns.

        Raises:   RuntimeError: the command failed.
        """
        request = {"execute": name} | ({"arguments": arguments} if arguments else {})
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        while True:
            message = self._receive()
            if "error" in message:
                raise RuntimeError(f"{name}: {message['error']['desc']}")
            if "return" in message:
                return message["return"]
            self._events.append(message)

    def event(self, name: str) -> dict[str, Json]:
        """Wait for an event and return its data; also finds one that came already."""
        while True:
            for message in self._events:
                if message["event"] == name:
                    self._events.remove(message)
                    data: dict[str, Json] = message["data"]
                    return data
            self._events.append(self._receive())

    def _receive(self) -> dict[str, Json]:
        line = self._lines.readline()
        if not line:
            raise RuntimeError("the daemon closed the QMP session")
        message: dict[str, Json] = json.loads(line)
        return message
