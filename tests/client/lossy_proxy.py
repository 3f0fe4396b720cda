"""A proxy in front of a server's unix socket that can lose answers: the server works, the client never hears."""

from __future__ import annotations

import socket
import threading
from pathlib import Path
from types import TracebackType


class LossyProxy:
    """Passes bytes both ways; after `lose_next_answer_to`, the next such command's answer is dropped with the link."""

    def __init__(self, server: Path, directory: Path) -> None:
        self.path = directory / "proxy.sock"
        self.url = f"unix://{self.path}?db=0"
        self.lost = 0
        self._server = server
        self._sign: bytes | None = None
        self._stop = threading.Event()
        self._threads: list[threading.Thread] = []
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._listener.bind(str(self.path))
        self._listener.listen()
        self._listener.settimeout(0.05)

    def __enter__(self) -> LossyProxy:
        self._spawn(self._accept)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(5.0)
        self._listener.close()

    def lose_next_answer_to(self, command: str) -> None:
        self._sign = command.encode()

    def _spawn(self, work: object, *args: object) -> None:
        assert callable(work)
        thread = threading.Thread(target=work, args=args, name="lossy-proxy", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _accept(self) -> None:
        while not self._stop.is_set():
            try:
                near, _ = self._listener.accept()
            except TimeoutError:
                continue
            self._spawn(self._serve, near)

    def _serve(self, near: socket.socket) -> None:
        with near, socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as far:
            near.settimeout(0.05)
            far.settimeout(5.0)
            far.connect(str(self._server))
            while not self._stop.is_set():
                try:
                    asked = near.recv(1 << 20)
                except TimeoutError:
                    continue
                except OSError:
                    return
                if not asked:
                    return
                far.sendall(asked)
                answer = far.recv(1 << 20)
                if self._sign is not None and self._sign in asked:
                    self._sign = None
                    self.lost += 1
                    return
                near.sendall(answer)
