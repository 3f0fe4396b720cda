"""Answers one question with a real model through the real path: client, embedded server, worker, streamed engine.

Owns the demo's directory, ``.demo`` in the checkout: the shards (kept, so that a second run starts in seconds), the
server's data and the worker's log. Everything it starts it stops, whatever happens. `make demo` runs it; the question
comes from the command line or LAMELLA_DEMO_PROMPT. Neighbours: `fetch_smollm2` for the model, then only what users
have too: the client library, ``python -m lamella_engine import`` and ``python -m lamella_worker``.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from lamella import ChatMessage, Client, Completion, LamellaError, TokenEvent, WorkerInfo
from lamella.child_process import start_child, stop_child
from lamella.completion import CompletionBuilder
from lamella.embedded import EmbeddedServer
from lamella.messages import Done
from tools.fetch_smollm2 import FetchError, fetch

ROOT = Path(__file__).resolve().parent.parent
MODEL = "SmolLM2-135M-Instruct"
QUESTION = "What is the capital of France?"
IMPORT_TIMEOUT_S = 900.0
READY_TIMEOUT_S = 180.0
ANSWER_TIMEOUT_S = 600.0
DRAIN_S = 10.0
HEARTBEAT_WAIT_S = 5.0
LOG_TAIL_LINES = 15
INTERRUPTED = 130


class DemoError(Exception):
    """The demo cannot go on; the message says why and what to do."""


class Answer(NamedTuple):
    """The finished text and when its first token came and its last, in seconds from the submission."""

    completion: Completion
    first_token_s: float
    total_s: float


def run_demo(question: str, max_tokens: int, directory: Path, models: Path) -> None:
    """Answer `question` on standard output; progress and figures go to standard error.

    Raises:
        DemoError, FetchError, LamellaError: it cannot be answered; everything that was started is stopped.
    """
    if not question.strip():
        raise DemoError('the question is empty; ask one: make demo PROMPT="..."')
    started = time.monotonic()
    store = directory / "shards"
    directory.mkdir(parents=True, exist_ok=True)
    _say(f"model    {MODEL}, Q4_1 GGUF expanded to float32")
    if not _is_imported(store):
        _import_model(fetch(models), store)
    with EmbeddedServer(directory / "server") as server, Client(server.url) as client:
        _say(f"server   embedded Valkey, append-only file on, {server.socket_path}")
        _cancel_leftovers(client)
        with _worker(server.url, store, directory / "worker.log") as process:
            worker = _wait_for_worker(client, process, directory / "worker.log")
            _say(f"worker   {worker.name}, {worker.device}, {worker.model.num_layers} layers stream from {store}")
            _say(f"ready    after {time.monotonic() - started:.1f} s\n\n> {question}\n")
            answer = _ask(client, question, max_tokens)
            _report(answer, _worker_after(client, worker, answer.completion.usage.completion_tokens))


def _is_imported(store: Path) -> bool:
    """A manifest is written last, so where there is one the shards are whole; the worker checks them as it opens."""
    return any(store.glob(f"{MODEL}/manifest.json"))


def _import_model(gguf: Path, store: Path) -> None:
    command = [sys.executable, "-m", "lamella_engine", "import", MODEL, str(gguf), "--store", str(store)]
    try:
        outcome = subprocess.run(
            command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, timeout=IMPORT_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise DemoError(
            f"building the shards took longer than {IMPORT_TIMEOUT_S:.0f} s; is the disk under {store} very slow? "
            "Run the demo again: it goes on where it was."
        ) from error
    if outcome.returncode != 0:
        raise DemoError(f"the model could not be imported into {store}; the reason stands above")


def _cancel_leftovers(client: Client) -> None:
    """Cancel what a killed demo left in the queue: nobody waits for it."""
    for status in client.jobs():
        if not status.state.is_final:
            client.cancel(status.job_id)


@contextmanager
def _worker(url: str, store: Path, log_path: Path) -> Iterator[subprocess.Popen[bytes]]:
    command = [sys.executable, "-m", "lamella_worker", "--redis-url", url, "--model", MODEL, "--device", "cpu"]
    command += ["--store", str(store), "--offline", "--slots", "2", "--drain-s", str(DRAIN_S)]
    command += ["--ram", "0"]  # this model would fit: stream it all the same, as one that does not
    with log_path.open("wb") as log:
        process = start_child(command, death_signal=signal.SIGTERM, output=log)
    try:
        yield process
    finally:
        stop_child(process, grace_s=DRAIN_S + 5.0)


def _wait_for_worker(client: Client, process: subprocess.Popen[bytes], log_path: Path) -> WorkerInfo:
    deadline = time.monotonic() + READY_TIMEOUT_S
    while time.monotonic() < deadline:
        for worker in client.workers():
            if worker.pid == process.pid:
                return worker
        if process.poll() is not None:
            raise DemoError(
                f"the worker ended with {process.returncode}; {_log_tail(log_path)}\n"
                f"If the model is at fault, delete {log_path.parent} and run the demo again."
            )
        time.sleep(0.1)
    raise DemoError(f"the worker was not ready within {READY_TIMEOUT_S:.0f} s; {_log_tail(log_path)}")


def _log_tail(path: Path) -> str:
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_TAIL_LINES:]
    return f"its log ({path}) ends with:\n" + "\n".join(lines)


def _ask(client: Client, question: str, max_tokens: int) -> Answer:
    submitted = time.monotonic()
    first_token_s = 0.0
    chat = (ChatMessage(role="user", content=question),)
    job = client.submit(messages=chat, model=MODEL, max_tokens=max_tokens)
    builder = CompletionBuilder(job.id)
    try:
        for item in job.stream(timeout_s=ANSWER_TIMEOUT_S):
            if isinstance(item.event, TokenEvent) and not first_token_s:
                first_token_s = time.monotonic() - submitted
            print(builder.add(item), end="", flush=True)
            if isinstance(item.event, Done):
                print(flush=True)
                return Answer(builder.completion(item.event), first_token_s, time.monotonic() - submitted)
    except BaseException:
        job.cancel()
        raise
    raise DemoError(f"the stream of job {job.id} ended without an end")


def _worker_after(client: Client, worker: WorkerInfo, tokens: int) -> WorkerInfo:
    """Return the worker's heartbeat once it counts the answer's tokens, or the latest there is."""
    deadline = time.monotonic() + HEARTBEAT_WAIT_S
    while time.monotonic() < deadline and worker.tokens < tokens:
        time.sleep(0.1)
        worker = next((each for each in client.workers() if each.name == worker.name), worker)
    return worker


def _report(answer: Answer, worker: WorkerInfo) -> None:
    usage = answer.completion.usage
    tokens = usage.completion_tokens
    decode_s = answer.total_s - answer.first_token_s
    speed = f"{(tokens - 1) / decode_s:.1f} tokens/s" if tokens > 1 and decode_s > 0 else "no rate for one token"
    _say(f"\ntokens   {tokens} in {answer.total_s:.2f} s: first after {answer.first_token_s:.2f} s, then {speed}")
    _say(f"sweeps   {usage.sweeps} (each moves every layer once)")
    _say(f"streamed {_megabytes(usage.streamed_bytes / max(tokens, 1))} of weights a token")
    _say(
        f"memory   {_megabytes(worker.peak_rss_bytes)} at the worker's peak, Python and torch included; "
        f"the model's weights are {_megabytes(worker.model.size_bytes)}"
    )


def _megabytes(count: float) -> str:
    return f"{count / 1e6:.1f} MB"


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def _interrupt(number: int, frame: FrameType | None) -> None:
    """End by SIGTERM the way Ctrl-C does, so that everything started is stopped."""
    raise KeyboardInterrupt


def main() -> int:
    """Run the demo as the command line says; 0 only if the question was answered."""
    parser = argparse.ArgumentParser(
        description="Answer one question with SmolLM2-135M-Instruct on this machine's CPU."
    )
    parser.add_argument("question", nargs="?", default=os.environ.get("LAMELLA_DEMO_PROMPT", QUESTION))
    parser.add_argument("--max-tokens", type=int, default=200, help="length of the answer at most (%(default)s)")
    parser.add_argument("--directory", type=Path, default=ROOT / ".demo", help="shards and data (%(default)s)")
    parser.add_argument("--models", type=Path, default=ROOT / ".models", help="where the GGUF is kept (%(default)s)")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        run_demo(arguments.question, arguments.max_tokens, arguments.directory.absolute(), arguments.models.absolute())
    except (DemoError, FetchError, LamellaError) as error:
        _say(f"error: {error}")
        return 1
    except OSError as error:
        _say(f"error: {error}; {arguments.directory} must be a directory you can write to")
        return 1
    except KeyboardInterrupt:
        _say("interrupted; everything that was started is stopped")
        return INTERRUPTED
    return 0


if __name__ == "__main__":
    sys.exit(main())
