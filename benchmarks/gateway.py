"""What the HTTP gateway costs: beside the client library at many streams, and in memory at a thousand idle ones.

    python -m benchmarks.gateway --streams 64 --requests 400 --idle 1000 --json gateway.json

Everything but the model is real: an embedded server, the gateway in a process of its own, and a worker that emits each
job's tokens on a clock. `streams` jobs run all the time, a token each `--every-s`; beside them request after request is
timed from its start to its first token, alternately through the library and through the gateway, so that a busy
machine disturbs both alike. The client of the gateway sends plain HTTP over open connections, so that what is measured
is the gateway and not an SDK. `load_average` says how busy the machine was.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from functools import partial
from pathlib import Path
from typing import Any

import redis

from benchmarks.json_file import write_json
from benchmarks.machine import Bystanders, machine_facts, proc_field, process_busy_s
from lamella import AsyncClient
from lamella.connection import script_digest
from lamella.embedded import EmbeddedServer
from lamella.registry_calls import emit_call
from tests.client.acting_worker import MODEL, ActingWorker, done, token

READY_S = 60.0
LEASE_MS = 60_000
REQUEST_S = 30.0
SETTLE_S = 5.0
SLOTS = 100_000  # so that every job is sent at once


class Clockwork:
    """A worker whose jobs all get a token at each tick; short jobs get one at once and end."""

    def __init__(self, url: str, every_s: float) -> None:
        self._redis = redis.Redis.from_url(url, protocol=2, decode_responses=True, socket_timeout=30)
        self._worker = ActingWorker(self._redis)
        self._worker.announce()
        self._redis.set(self._worker.keys.capacity(MODEL), SLOTS)
        self._queue = self._worker.keys.queue_list(MODEL)
        self._every_s = every_s
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="clockwork")
        self.is_idle = False

    def start(self) -> None:
        """Begin to work."""
        self._thread.start()

    def close(self) -> None:
        """Stop."""
        self._stop.set()
        self._thread.join(READY_S)
        self._redis.close()

    def _run(self) -> None:
        running: list[str] = []
        tick = time.monotonic()
        while not self._stop.is_set():
            message = None if self.is_idle else self._redis.brpop([self._queue], timeout=0.01)
            if isinstance(message, tuple | list):
                job_id = json.loads(message[1])["headers"]["id"]
                self._worker.claim(job_id)
                self._worker.emit(job_id, token("x"))
                if "short" in (self._redis.hget(self._worker.keys.job(job_id), "request") or ""):
                    self._worker.emit(job_id, done(1))
                else:
                    running.append(job_id)
            if self.is_idle:
                self._stop.wait(0.1)
            elif time.monotonic() - tick >= self._every_s:
                tick = time.monotonic()
                self._sweep(running)

    def _sweep(self, running: Sequence[str]) -> None:
        """Bring every job its next token, all in one pipeline, as a worker's publisher does."""
        with self._redis.pipeline(transaction=False) as pipeline:
            for job_id in running:
                self._worker.seqs[job_id] += 1
                fence, seq = self._worker.fences[job_id], self._worker.seqs[job_id]
                call = emit_call(self._worker.keys, job_id, fence, seq, LEASE_MS, (token("x"),))
                pipeline.evalsha(script_digest(call.script), len(call.keys), *call.keys, *call.args)
            pipeline.execute()


class Http:
    """One open connection to the gateway."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def first_token(self, prompt: str) -> None:
        """Send a streaming chat and read up to its first token."""
        if self._streams is None:
            self._streams = await asyncio.open_connection("127.0.0.1", self._port)
        reader, writer = self._streams
        body = (
            f'{{"model": "{MODEL}", "stream": true, "messages": [{{"role": "user", "content": "{prompt}"}}]}}'.encode()
        )
        head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: {len(body)}\r\n"
        writer.write(f"{head}Content-Type: application/json\r\n\r\n".encode() + body)
        status = await reader.readline()
        if b" 200 " not in status:
            raise RuntimeError(f"the gateway answered {status!r}")
        await reader.readuntil(b'"content": "x"')

    async def rest(self) -> None:
        """Read to the end of the answer."""
        assert self._streams is not None
        await self._streams[0].readuntil(b"\r\n0\r\n\r\n")

    async def drain(self) -> None:
        """Read for ever."""
        assert self._streams is not None
        while await self._streams[0].read(65536):
            pass


async def by_library(client: AsyncClient, prompt: str) -> None:
    """Up to the first token through the library; the job's end is read as well, as the gateway's is."""
    job = await client.submit(messages=[{"role": "user", "content": prompt}], model=MODEL)
    async with aclosing(job.stream(timeout_s=REQUEST_S)) as items:
        await anext(items)


async def timed(call: Callable[[], Awaitable[None]]) -> float:
    """Milliseconds that a call takes."""
    began = time.perf_counter()
    async with asyncio.timeout(REQUEST_S):
        await call()
    return (time.perf_counter() - began) * 1000


async def overhead(port: int, url: str, streams: int, requests: int) -> dict[str, Any]:
    """Time to the first token through library and gateway, with `streams` streams open in the gateway."""
    background = [Http(port) for _ in range(streams)]
    for each in background:
        await timed(partial(each.first_token, "long"))
    readers = [asyncio.create_task(each.drain()) for each in background]
    timings: dict[str, list[float]] = {"library": [], "gateway": []}
    async with AsyncClient(url) as client:
        http = Http(port)
        for number in range(requests + 10):
            library = await timed(lambda: by_library(client, "short"))
            gateway = await timed(lambda: http.first_token("short"))
            await http.rest()
            if number >= 10:  # what is made once has been made
                timings["library"].append(library)
                timings["gateway"].append(gateway)
    for reader in readers:
        reader.cancel()
    await asyncio.gather(*readers, return_exceptions=True)
    extra = sorted(after - before for before, after in zip(timings["library"], timings["gateway"], strict=True))
    return {
        "streams": streams,
        "requests": requests,
        **{name: quantiles(values) for name, values in timings.items()},
        "overhead_ms": {
            "p50_of_differences": statistics.median(extra),
            "p50": quantiles(timings["gateway"])["p50_ms"] - quantiles(timings["library"])["p50_ms"],
            "p99": quantiles(timings["gateway"])["p99_ms"] - quantiles(timings["library"])["p99_ms"],
        },
    }


def quantiles(values: Sequence[float]) -> dict[str, float]:
    """Median and 99th percentile."""
    ordered = sorted(values)
    return {"p50_ms": statistics.median(ordered), "p99_ms": ordered[min(len(ordered) - 1, int(0.99 * len(ordered)))]}


async def idle(port: int, process: Process, count: int) -> dict[str, Any]:
    """Memory and processor time of the gateway while `count` streams wait for a first token that does not come."""
    before = process.rss_mb()
    waiting = [asyncio.create_task(Http(port).first_token("idle")) for _ in range(count)]
    deadline = time.monotonic() + READY_S
    while await open_streams(port) < count and time.monotonic() < deadline:
        await asyncio.sleep(0.5)
    busy, began = process.busy_s(), time.monotonic()
    await asyncio.sleep(SETTLE_S)
    spent, elapsed = process.busy_s() - busy, time.monotonic() - began
    result = {
        "streams": await open_streams(port),
        "rss_mb": process.rss_mb(),
        "rss_before_mb": before,
        "cpu_share": spent / elapsed,
    }
    for task in waiting:
        task.cancel()
    await asyncio.gather(*waiting, return_exceptions=True)
    return result


async def open_streams(port: int) -> int:
    """How many requests wait at the gateway, by its own metrics."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(b"GET /metrics HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n")
    text = (await reader.read()).decode()
    writer.close()
    return int(float(text.partition("\nlamella_gateway_open_streams ")[2].partition("\n")[0]))


class Process:
    """What Linux tells of a process."""

    def __init__(self, pid: int) -> None:
        self._pid = pid

    def rss_mb(self) -> float:
        """Resident memory."""
        return float((proc_field(f"/proc/{self._pid}/status", "VmRSS") or "0").split()[0]) * 1024 / 1e6

    def busy_s(self) -> float:
        """Processor time so far."""
        return process_busy_s(self._pid)


def start(url: str, directory: Path) -> tuple[subprocess.Popen[str], int]:
    """Start the gateway in a process of its own, and return it with its port."""
    command = [sys.executable, "-c", "from lamella_gateway.cli import app; app()"]
    options = ["--no-auth", "--port", "0", "--redis-url", url, "--max-open-streams", "5000", "--grace-s", "1"]
    process = subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True, cwd=directory, env=os.environ)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("serving http://"):
            threading.Thread(target=process.stderr.read, daemon=True).start()  # or its log would fill the pipe
            return process, int(line.strip().removesuffix("/v1").rpartition(":")[2])
    raise RuntimeError(f"the gateway ended with {process.wait(READY_S)}")


def main(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Run it; returns what is printed."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=64)
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--idle", type=int, default=1000)
    parser.add_argument("--every-s", type=float, default=0.25)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="lamella-") as name, EmbeddedServer(Path(name) / "d") as server:
        clockwork = Clockwork(server.url, given.every_s)
        clockwork.start()
        process, port = start(server.url, Path.cwd())
        try:
            bystanders = Bystanders()
            words = sys.argv[1:] if arguments is None else arguments
            result: dict[str, Any] = {"command": "python -m benchmarks.gateway " + " ".join(words)}
            result["machine"] = machine_facts(Path(name), "cpu")
            result["overhead"] = asyncio.run(overhead(port, server.url, given.streams, given.requests))
            result["busy_cores_of_all_but_this_program"] = bystanders.busy_cores()
            clockwork.is_idle = True
            result["idle"] = asyncio.run(idle(port, Process(process.pid), given.idle))
            result["load_average"] = os.getloadavg()[0]
        finally:
            clockwork.close()
            process.terminate()
            process.wait(READY_S)
    if given.json is not None:
        write_json(given.json, result)
    return result


if __name__ == "__main__":
    print(json.dumps(main(), indent=2))
