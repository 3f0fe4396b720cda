"""What a real worker with a real model tells: metrics, log lines, Flower's figures and traces, against what it did."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from lamella import tracing
from lamella.client import Client
from lamella.embedded import EmbeddedServer
from lamella.job import Job
from lamella.messages import Done
from lamella_engine import ShardStore
from lamella_worker.monitor import make_monitor
from tests.faults.workers import Workers
from tests.otlp_receiver import OtlpReceiver
from tests.scrape import Scrape, scrape
from tests.waiting import wait_until

pytest.importorskip("opentelemetry.exporter.otlp.proto.http", reason="the extra [tracing] is not installed")

MODEL, WORKER = "tiny-watched", "watched"
SECRET = "zanzibar quokka marmalade"  # of a prompt; no line of a log and no span may have it
SETTINGS = ("[engine]", "max_sequences = 4", "[telemetry]", "metrics_port = 0", 'log_format = "json"')


@dataclass
class Watched:
    """A worker that tells everything, a client that traces, and where the traces arrive."""

    workers: Workers
    client: Client
    receiver: OtlpReceiver
    model_bytes: int
    row_bytes: int

    def scrape(self) -> Scrape:
        info = self.workers.info(WORKER)
        assert info is not None
        assert info.metrics_address is not None
        return scrape(info.metrics_address)

    def run(self, num_tokens: int, count: int = 1) -> list[Job]:
        """Run so many jobs side by side to their ends."""
        jobs = [
            self.client.submit(f"{SECRET} {n}", model=MODEL, max_tokens=num_tokens, ignore_eos=True)
            for n in range(count)
        ]
        for job in jobs:
            assert len(job.result(timeout_s=60).token_ids) == num_tokens
        return jobs


@pytest.fixture(scope="module")
def watched(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watched]:
    from tests.fixtures.servers import require_embedded

    require_embedded()
    root = tmp_path_factory.mktemp("watched")
    model = ShardStore(root / "store").ensure(MODEL, source=tiny_llama_dir)
    with EmbeddedServer(root / "d") as server, OtlpReceiver() as receiver, Client(server.url) as client:
        workers = Workers(server.url, root / "store", root)
        exporting = tracing.open_exporting(receiver.endpoint, "test-client")
        tracing.use_tracing(exporting)
        try:
            workers.start(MODEL, WORKER, settings=(*SETTINGS, f'traces = "{receiver.endpoint}"'))
            layer_bytes = sum(layer.nbytes for layer in model.layers)
            row_bytes = 4 * int(json.loads((tiny_llama_dir / "config.json").read_text())["hidden_size"])
            yield Watched(workers, client, receiver, layer_bytes, row_bytes)
        finally:
            workers.close()
            tracing.stop_tracing()
            exporting.shutdown()


def done(job: Job) -> Done:
    outcome = job.status().outcome
    assert isinstance(outcome, Done)
    return outcome


def test_metrics_count_exactly_what_was_done(watched: Watched) -> None:
    watched.run(3)
    before = watched.scrape()

    jobs = watched.run(7, count=3)

    after = wait_until(lambda: _when_idle(watched, before, num_jobs=3))

    def more(name: str, **labels: str) -> float:
        return after.value(name, model=MODEL, **labels) - before.value(name, model=MODEL, **labels)

    sweeps = more("lamella_sweeps_total")
    assert more("lamella_tokens_total") == more("lamella_engine_tokens_total") == 21
    assert more("lamella_prompt_tokens_total") == sum(done(job).usage.prompt_tokens for job in jobs)
    assert max(done(job).usage.sweeps for job in jobs) <= sweeps <= sum(done(job).usage.sweeps for job in jobs)
    moved = more("lamella_weight_bytes_total", tier="disk")
    # Beside the layers a sweep reads rows of the embedding: those of the tokens that it is given.
    rows, rest = divmod(moved - watched.model_bytes * sweeps, watched.row_bytes)
    assert rest == 0
    assert 0 < rows <= more("lamella_prompt_tokens_total") + 3 * 6
    assert more("lamella_streamed_bytes_total") == moved
    assert more("lamella_weight_bytes_total", tier="ram") == more("lamella_weight_bytes_total", tier="vram") == 0
    assert more("lamella_sweep_seconds_count") == sweeps
    assert more("lamella_sweep_seconds_sum") == pytest.approx(more("lamella_lane_seconds_total", lane="sweep"))
    assert more("lamella_time_to_first_token_seconds_count") == more("lamella_queue_wait_seconds_count") == 3
    assert more("lamella_inter_token_seconds_count") == 3 * 6
    assert more("lamella_attempts_total") == more("lamella_attempts_ended_total", outcome="ended") == 3
    assert more("lamella_jobs_total", state="done") == 3
    lanes = {lane: more("lamella_lane_seconds_total", lane=lane) for lane in ("compute", "bubble", "sweep")}
    assert lanes["compute"] + lanes["bubble"] == pytest.approx(lanes["sweep"])


def _when_idle(watched: Watched, before: Scrape, num_jobs: int) -> Scrape | None:
    """A scrape after the last of the jobs has left and the engine's last sign of life has come."""
    now = watched.scrape()
    name = "lamella_attempts_ended_total"
    has_left = now.value(name, outcome="ended") == before.value(name, outcome="ended") + num_jobs
    is_idle = now.value("lamella_running_sequences") == now.value("lamella_kv_blocks_used") == 0
    return now if has_left and is_idle else None


def test_metrics_of_a_busy_worker_tell_how_full_it_is(watched: Watched) -> None:
    job = watched.client.submit(SECRET, model=MODEL, max_tokens=400, ignore_eos=True)

    busy = wait_until(lambda: found if (found := watched.scrape()).value("lamella_kv_blocks_used") > 0 else None)
    job.cancel()

    assert busy.value("lamella_running_jobs", model=MODEL) == busy.value("lamella_running_sequences") == 1
    assert 0 < busy.value("lamella_kv_blocks_used") <= busy.value("lamella_kv_blocks")
    assert busy.value("lamella_batch_limit_sequences") == 4
    assert busy.value("lamella_engine_ready") == 1
    assert busy.value("lamella_worker_info", worker=WORKER, device="cpu", dtype="float32") == 1
    assert busy.value("lamella_plan_bytes", tier="disk") == watched.model_bytes
    wait_until(lambda: watched.scrape().has("lamella_jobs_total", state="cancelled"))


def test_every_line_of_the_log_is_an_object_and_those_about_a_job_name_it(watched: Watched) -> None:
    (job,) = watched.run(3)

    wait_until(lambda: f"job={job.id} ended" in watched.workers.log(WORKER))
    lines = [json.loads(line) for line in watched.workers.log(WORKER).splitlines()]

    about = [line for line in lines if line.get("job") == job.id]
    assert {line["message"].split()[1] for line in about} >= {"starts:", "ended"}
    for line in about:
        assert (line["attempt"], line["worker"], line["model"]) == (1, WORKER, MODEL)
    assert all("job" in line or "jobs" in line for line in lines if "job=" in line["message"])
    assert {"time", "level", "logger", "message", "pid"} <= set(lines[0])


def test_neither_log_nor_metrics_nor_traces_have_a_word_of_a_prompt(watched: Watched) -> None:
    jobs = watched.run(5)
    text = jobs[0].result(timeout_s=40).text.strip()
    wait_until(lambda: _spans_of(watched, jobs[0]).keys() >= {"lamella.attempt", "lamella.submit"})

    told = watched.workers.log(WORKER) + watched.scrape().text + watched.receiver.raw.decode("latin-1")

    assert not any(word in told for word in SECRET.split())
    assert len(text) < 8 or text not in told


def test_metrics_have_no_label_of_a_job(watched: Watched) -> None:
    (job,) = watched.run(2)

    found = watched.scrape()

    assert job.id not in found.text
    ours = [sample for sample in found.samples if sample.name.startswith("lamella_")]
    labels = {label for sample in ours for label in sample.labels}
    assert labels <= {
        *("model", "le", "tier", "lane", "outcome", "state", "basis"),
        *("worker", "version", "device", "family", "dtype"),
    }
    assert [s.name for s in ours if "worker" in s.labels] == ["lamella_worker_info"]


def test_flower_is_told_of_device_model_plan_and_engine(watched: Watched) -> None:
    watched.run(2)

    monitor = make_monitor(watched.workers.url, "lamella:")
    (stats,) = wait_until(lambda: monitor.control.inspect(timeout=2.0).stats()).values()

    assert stats["lamella device"] == "cpu"
    assert stats["lamella model"].startswith(f"{MODEL}: llama, 4 layers")
    assert re.search(r"4 layers \([\d.]+ [KM]iB\) on disk; budgets RAM", stats["lamella plan"])
    assert re.search(r"ready, restarted 0 times; 0 of 4 sequences run", stats["lamella engine"])
    assert re.search(r"[1-9]\d* sweeps of [\d.]+ s", stats["lamella engine"])
    assert stats["lamella"]["model"]["name"] == MODEL


def test_a_trace_goes_from_the_submit_through_the_queue_to_the_sweeps(watched: Watched) -> None:
    (job,) = watched.run(9)

    spans = wait_until(lambda: s if len(s := _spans_of(watched, job)) == 5 else None)

    submit, queue, attempt = (spans[f"lamella.{name}"] for name in ("submit", "queue", "attempt"))
    prefill, decode = spans["lamella.prefill"], spans["lamella.decode"]
    assert queue.parent_id == attempt.parent_id == submit.span_id
    assert prefill.parent_id == decode.parent_id == attempt.span_id
    assert (submit.service, attempt.service) == ("test-client", "lamella-worker")
    assert attempt.attributes["lamella.outcome"] == "ended"
    assert (attempt.attributes["lamella.attempt"], attempt.attributes["lamella.tokens"]) == (1, 9)
    assert attempt.attributes["lamella.sweeps"] == done(job).usage.sweeps
    assert attempt.attributes["lamella.streamed_bytes"] == done(job).usage.streamed_bytes
    assert decode.attributes["lamella.sweeps"] == decode.attributes["lamella.tokens"] == 9
    sweeps = [about for name, about in decode.events if name == "sweep"]
    assert [about["lamella.tokens"] for about in sweeps] == [1, 2, 4, 8]
    assert all(float(str(about["lamella.sweep_s"])) > 0 for about in sweeps)
    assert attempt.begin_ns <= prefill.begin_ns <= prefill.end_ns <= decode.begin_ns <= decode.end_ns <= attempt.end_ns


def _spans_of(watched: Watched, job: Job):  # type: ignore[no-untyped-def]
    """The spans of the trace that a job is in, by name."""
    traces = {span.trace_id for span in watched.receiver.spans() if span.attributes.get("lamella.job") == job.id}
    return {span.name: span for span in watched.receiver.spans() if span.trace_id in traces}
