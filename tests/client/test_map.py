"""Many prompts at once: results in order, a bound on what is under way, errors, and what one leaves behind."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import redis

from lamella import AsyncClient, Client, Completion, JobFailed, LamellaError, MapProgress, RequestError, WaitTimeout
from lamella.connection import Connection
from lamella.embedded import EmbeddedServer
from lamella.key_ring import new_key_line
from lamella.map_closing import Closing
from lamella.map_prompts import PromptTask
from lamella.map_run import MapBounds, MapRun
from lamella.map_sync import drive
from lamella.messages import decode_request
from tests.client.acting_worker import ActingWorker, done, token
from tests.client.answering_worker import AnsweringWorker
from tests.waiting import wait_until


@pytest.fixture
def answering(worker: ActingWorker) -> Iterator[AnsweringWorker]:
    with AnsweringWorker(worker) as answering:
        yield answering


def test_results_come_in_the_order_of_the_prompts(client: Client, answering: AnsweringWorker) -> None:
    answering.latest_first = True
    prompts = [f"p{number}" for number in range(20)]

    results = list(client.map(prompts, in_flight=5, max_tokens=3))

    assert [result.text for result in results] == [f"<{prompt}>" for prompt in prompts]
    assert answering.most_at_once <= 5


def test_prompts_are_taken_only_as_they_are_needed(client: Client, answering: AnsweringWorker) -> None:
    taken = []

    def prompts() -> Iterator[str]:
        for number in range(1_000_000):
            taken.append(number)
            yield str(number)

    results = client.map(prompts(), in_flight=2)
    first = [next(results).text for _ in range(3)]
    results.close()

    assert first == ["<0>", "<1>", "<2>"]
    assert len(taken) < 50


def test_without_a_bound_of_ones_own_the_slots_count(client: Client, worker: ActingWorker) -> None:
    results = client.map(map(str, range(100)), timeout_s=1.0)

    with pytest.raises(WaitTimeout, match="no job has brought anything"):
        next(results)

    assert worker.redis.zcard(worker.keys.jobs) == 2 * worker.announce().slots


def test_a_run_that_is_left_leaves_its_jobs_where_it_is_told_to(
    worker: ActingWorker, embedded_server: EmbeddedServer
) -> None:
    def run(bounds: MapBounds) -> None:
        tasks = (PromptTask(place, f"p{place}", {}, f"left-{bounds.leaves}") for place in range(3))
        for _ in drive(connection, MapRun(tasks, connection.keys, None, bounds), leave):
            raise AssertionError("nothing answers")

    def leave() -> None:
        raise LamellaError("left")

    connection = Connection(embedded_server.url, "lamella:", 10.0)
    for leaves in (True, False):
        with pytest.raises(LamellaError, match="left"):
            run(MapBounds(in_flight=3, leaves=leaves))
    connection.close()

    states = [worker.redis.hget(key, "state") for key in worker.redis.scan_iter(worker.keys.job("*"))]
    assert sorted(states) == ["cancelled"] * 3 + ["queued"] * 3


def test_a_run_that_is_closed_waits_for_what_runs_and_gives_up_the_rest(
    worker: ActingWorker, embedded_server: EmbeddedServer
) -> None:
    def after_round() -> None:
        if "held" in answering.asked:
            run.close(Closing(LamellaError("given up")))
        if run.counts.ended + run.counts.in_flight == 2000:
            for job_id in worker.fences.keys() & worker.redis.zrange(worker.keys.active, 0, -1):
                worker.emit(job_id, token("late"), done())

    connection = Connection(embedded_server.url, "lamella:", 10.0)
    tasks = (PromptTask(place, ("one", "held")[min(place, 1)], {}, "closed") for place in range(2000))
    run = MapRun(tasks, connection.keys, None, MapBounds(in_flight=2))
    with AnsweringWorker(worker, holds=["held"]) as answering:
        outcomes = [result.outcome for result in drive(connection, run, after_round)]
    connection.close()

    shown = [outcome.text if isinstance(outcome, Completion) else str(outcome) for outcome in outcomes]
    assert shown[0] == "<one>"
    assert set(shown[1:]) == {"late", "given up"}
    assert shown.count("late") <= 2
    assert len(shown) == 2000


def test_chats_and_mappings_are_prompts_too(client: Client, answering: AnsweringWorker, worker: ActingWorker) -> None:
    prompts = [[{"role": "user", "content": "chat"}], {"prompt": "own", "max_tokens": 7}, "plain"]

    results = list(client.map(prompts, in_flight=1, max_tokens=5))

    requests = [decode_request(worker.redis.hget(worker.keys.job(r.job_id), "request") or "") for r in results]
    assert requests[0].messages is not None
    assert [request.sampling.max_tokens for request in requests] == [5, 7, 5]


def test_an_error_is_raised_in_its_place_and_cancels_the_rest(client: Client, worker: ActingWorker) -> None:
    with AnsweringWorker(worker, refuses={"bad"}, holds={"slow"}):
        results = client.map(["good", "bad", "slow"], in_flight=3)

        assert next(results).text == "<good>"
        with pytest.raises(JobFailed, match="prompt_too_long"):
            next(results)

        states = {job.state.value for job in client.jobs()}
        assert wait_until(lambda: all(job.state.is_final or job.cancel_requested for job in client.jobs())), states


def test_errors_are_values_where_that_is_asked_for(client: Client, worker: ActingWorker) -> None:
    with AnsweringWorker(worker, refuses={"bad"}):
        results = list(client.map(["good", "bad", "", "good"], errors="return"))

    assert [type(result).__name__ for result in results] == ["Completion", "JobFailed", "RequestError", "Completion"]
    assert "prompt 2" in str(results[2])


def test_closing_the_generator_cancels_what_is_under_way(client: Client, worker: ActingWorker) -> None:
    with AnsweringWorker(worker, holds={"1", "2", "3"}):
        results = client.map(["0", "1", "2", "3"], in_flight=4)
        next(results)

        results.close()

        states = [job.state.value for job in client.jobs()]
        assert all(job.state.is_final or job.cancel_requested for job in client.jobs()), states


def test_progress_tells_how_far_it_is(client: Client, answering: AnsweringWorker) -> None:
    seen: list[MapProgress] = []

    list(client.map(["a", "b", "c"], progress=seen.append))

    assert (seen[-1].done, seen[-1].total, seen[-1].failed, seen[-1].in_flight) == (3, 3, 0, 0)
    assert seen[-1].tokens == 3


def test_a_bar_is_drawn_on_stderr(
    client: Client, answering: AnsweringWorker, capsys: pytest.CaptureFixture[str]
) -> None:
    list(client.map(["a", "b", "c"], progress=True))

    drawn = capsys.readouterr()
    assert "3/3" in drawn.err
    assert drawn.out == ""


def test_a_repeated_map_with_a_key_asks_nothing_anew(client: Client, answering: AnsweringWorker) -> None:
    first = [result.job_id for result in client.map(["a", "b"], idempotency_key="k")]

    again = [result.job_id for result in client.map(["a", "b"], idempotency_key="k")]

    assert again == first
    assert len(client.jobs()) == 2


def test_a_map_goes_on_after_jobs_that_an_earlier_one_cancelled(client: Client, worker: ActingWorker) -> None:
    results = client.map(["a"], idempotency_key="k", timeout_s=0.2)
    with pytest.raises(WaitTimeout):
        next(results)

    with AnsweringWorker(worker):
        again = list(client.map(["a"], idempotency_key="k"))

    assert [result.text for result in again] == ["<a>"]
    assert [job.state.value for job in client.jobs()] == ["done", "cancelled"]


def test_a_map_waits_while_the_queue_is_full(client: Client, answering: AnsweringWorker) -> None:
    client.set_limits(model_queued=1)

    results = list(client.map([str(number) for number in range(12)], in_flight=8))

    assert [result.text for result in results] == [f"<{number}>" for number in range(12)]


def test_a_map_outlives_a_restart_of_the_server(own_server: EmbeddedServer) -> None:
    raw = redis.Redis.from_url(own_server.url, protocol=2, decode_responses=True)
    with (
        raw,
        Client(own_server.url, timeout_s=2.0) as client,
        AnsweringWorker(ActingWorker(raw), patient=True) as worker,
    ):
        worker.announce()
        texts: list[str] = []
        prompts = [str(number) for number in range(40)]
        reading = threading.Thread(target=lambda: texts.extend(r.text for r in client.map(prompts, in_flight=2)))
        reading.start()
        wait_until(lambda: len(texts) >= 3)

        own_server.stop()
        own_server.start()
        reading.join(40)

    assert texts == [f"<{prompt}>" for prompt in prompts]


def test_encrypted_jobs_are_read_too(
    embedded_server: EmbeddedServer, embedded_redis: redis.Redis, tmp_path: object
) -> None:
    keys = tmp_path / "keys"  # type: ignore[operator]  # a path
    keys.write_text(new_key_line("k1") + "\n")
    keys.chmod(0o600)
    with Client(embedded_server.url, encryption_keys_file=keys) as client:
        results = client.map(["a"], require_worker=False, model="tiny/model", timeout_s=0.3, errors="return")
        with pytest.raises(WaitTimeout):
            next(results)
        stored = embedded_redis.hget(f"lamella:job:{client.jobs()[0].job_id}", "request") or ""

    assert '"prompt"' not in stored


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"in_flight": 0}, "in_flight is 0"),
        ({"in_flight": True}, "in_flight is True"),
        ({"errors": "drop"}, "errors is 'drop'"),
        ({"timeout_s": 0}, "timeout_s is 0"),
        ({"progress": 3}, "progress is of type int"),
        ({"messages": []}, "messages belong to each prompt"),
        ({"idempotency_key": ""}, "idempotency_key is ''"),
    ],
)
def test_a_mistake_is_told_before_anything_is_sent(client: Client, options: dict[str, object], says: str) -> None:
    with pytest.raises(RequestError, match=says):
        client.map(["a"], **options)  # type: ignore[call-overload]  # that is the point


@pytest.mark.parametrize("prompts", ["text", b"bytes", {"prompt": "x"}, 3])
def test_one_prompt_is_no_list_of_prompts(client: Client, prompts: object) -> None:
    with pytest.raises(RequestError, match="several of them"):
        client.map(prompts)  # type: ignore[call-overload]  # that is the point


def test_an_unknown_option_names_the_prompt(client: Client, worker: ActingWorker) -> None:
    with pytest.raises(RequestError, match=r"prompt 0 .*unknown key 'max_token'; did you mean 'max_tokens'"):
        next(client.map(["a"], max_token=3))  # type: ignore[call-overload]  # that is the point


async def test_the_asyncio_client_maps_alike(embedded_server: EmbeddedServer, answering: AnsweringWorker) -> None:
    answering.latest_first = True

    async with AsyncClient(embedded_server.url) as client:
        results = [result async for result in client.map([str(number) for number in range(9)], in_flight=3)]
        failures = [type(each).__name__ async for each in client.map(["", "x"], errors="return")]

    assert [result.text for result in results] == [f"<{number}>" for number in range(9)]
    assert failures == ["RequestError", "Completion"]
    assert answering.most_at_once <= 3


async def test_closing_the_asyncio_generator_cancels_what_is_under_way(
    embedded_server: EmbeddedServer, worker: ActingWorker
) -> None:
    with AnsweringWorker(worker, holds={"1", "2"}):
        async with AsyncClient(embedded_server.url) as client:
            results = client.map(["0", "1", "2"], in_flight=3)
            first: Completion | LamellaError = await anext(results)
            await results.aclose()
            jobs = await client.jobs()

    assert isinstance(first, Completion)
    assert all(job.state.is_final or job.cancel_requested for job in jobs)


def test_a_lost_stream_is_asked_for_again(client: Client, worker: ActingWorker) -> None:
    first = client.submit("a", model=worker.model, idempotency_key="k-0")
    worker.claim(first.id)
    worker.emit(first.id, token("x"), done())
    worker.redis.delete(worker.keys.stream(first.id))

    with AnsweringWorker(worker):
        results = list(client.map(["a"], idempotency_key="k"))

    assert [result.text for result in results] == ["<a>"]
