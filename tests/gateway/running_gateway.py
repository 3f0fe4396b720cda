"""A real gateway on loopback in a thread, and a worker behind it that answers by itself."""

from __future__ import annotations

import base64
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from types import TracebackType

import openai
import redis

from lamella.embedding import EmbeddingsEvent, EmbedRequest
from lamella.messages import TerminalEvent, TokenEvent, decode_request
from lamella_gateway.cli import listen, make_server
from lamella_gateway.settings import Settings
from tests.client.acting_worker import ActingWorker, done, token
from tests.waiting import wait_until

KEEP_ALIVE = b": keep-alive\n\n"
Events = Sequence[TokenEvent | TerminalEvent]


class RunningGateway:
    """A gateway from enter to exit; `url` is what clients take, without the ``/v1``."""

    def __init__(self, redis_url: str, **settings: object) -> None:
        self._files = tempfile.TemporaryDirectory(prefix="gateway-files-")
        own = {"requires_key": False, "grace_s": 1.0, "files_dir": Path(self._files.name)}
        given = {"redis_url": redis_url, "port": 0, **own, **settings}
        self.settings = Settings(**given)  # type: ignore[arg-type]  # each test says what it needs
        self._listener = listen(self.settings)
        self.server = make_server(self.settings)
        self._thread = threading.Thread(target=self.server.run, kwargs={"sockets": [self._listener]}, name="gateway")
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> RunningGateway:
        self._thread.start()
        wait_until(lambda: self.server.started or not self._thread.is_alive())
        assert self.server.started
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.server.should_exit = True
        self._thread.join(40)
        self._listener.close()
        self._files.cleanup()
        assert not self._thread.is_alive()

    def client(self, key: str = "none", **options: object) -> openai.OpenAI:
        """An SDK's client; without retries unless the test asks for some."""
        given = {"max_retries": 0, "timeout": 40.0, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, **given)  # type: ignore[arg-type]  # as above


def hello(prompt: str) -> Events:
    """What a worker says unless the test knows better."""
    return token("Hel", 1), token("lo ", 2), token("there", 3), done(3)


def _vectors(request: EmbedRequest) -> tuple[EmbeddingsEvent, TerminalEvent]:
    """Two numbers for each text."""
    count = len(request.texts)
    return EmbeddingsEvent(count=count, width=2, values=base64.b64encode(bytes(8 * count)).decode()), done(0)


class AnsweringWorker:
    """An acting worker that takes every job and says what `answer` makes of its last message or prompt."""

    def __init__(self, client: redis.Redis, answer: Callable[[str], Events] = hello) -> None:
        self.acting = ActingWorker(client)
        self.answer = answer
        self.prompts: list[str] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._work, name="answering")

    def __enter__(self) -> AnsweringWorker:
        self.acting.announce()
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join(40)

    def _work(self) -> None:
        seen: set[str] = set()
        server, keys = self.acting.redis, self.acting.keys
        while not self._stop.wait(0.005):
            for job_id in server.zrange(keys.active, 0, -1):
                if job_id not in seen and self.acting.claim(job_id).status == "ok":
                    seen.add(job_id)
                    request = decode_request(server.hget(keys.job(job_id), "request") or "")
                    if isinstance(request, EmbedRequest):
                        self.acting.emit(job_id, *_vectors(request))
                        continue
                    prompt = request.prompt or (request.messages or ())[-1].content
                    self.prompts.append(prompt)
                    self.acting.emit(job_id, *self.answer(prompt))


def on_next_job(worker: ActingWorker, act: Callable[[str], object]) -> threading.Thread:
    """Claim the next job in a thread, and act on it there; the caller joins the thread."""
    known = set(worker.fences)

    def run() -> None:
        (job_id,) = wait_until(lambda: set(worker.redis.zrange(worker.keys.active, 0, -1)) - known)
        worker.claim(job_id)
        act(job_id)

    thread = threading.Thread(target=run, name="next-job")
    thread.start()
    return thread
