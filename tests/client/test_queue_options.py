"""User, priority and deadline from a submit's arguments to the record; limits; what is refused, and with what words."""

from __future__ import annotations

import json

import pytest
import redis
from typer.testing import CliRunner

from lamella import AsyncClient, Client, DeadlineHopeless, Priority, QueueFull, RequestError, UserLimitReached
from lamella.cli import app
from lamella.embedded import EmbeddedServer
from lamella.keys import Keys
from tests.client.acting_worker import MODEL, ActingWorker

KEYS = Keys()


def test_the_terms_of_a_job_show_in_its_status(client: Client, worker: ActingWorker) -> None:
    job = client.submit("hi", user="ann", priority="high", deadline_s=60)

    status = job.status()

    assert (status.user, status.priority) == ("ann", Priority.HIGH)
    assert status.deadline_at == pytest.approx(status.created_at + 60, abs=0.01)
    assert status.position == 0
    assert status.estimate is not None


def test_a_job_without_terms_is_the_anonymous_users_and_normal(client: Client, worker: ActingWorker) -> None:
    status = client.submit("hi").status()

    assert (status.user, status.priority, status.deadline_at) == ("anonymous", Priority.NORMAL, None)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"user": ""}, "user"),
        ({"user": "a\nb"}, "user"),
        ({"user": "x" * 129}, "user"),
        ({"user": 5}, "user"),
        ({"priority": "urgent"}, "'high', 'normal', 'low'"),
        ({"priority": 1}, "priority"),
        ({"deadline_s": 0}, "deadline_s"),
        ({"deadline_s": -1.0}, "deadline_s"),
        ({"deadline_s": float("nan")}, "deadline_s"),
        ({"deadline_s": float("inf")}, "deadline_s"),
        ({"deadline_s": 1e12}, "deadline_s"),
        ({"deadline_s": "soon"}, "deadline_s"),
        ({"deadline_s": True}, "deadline_s"),
    ],
)
def test_unusable_terms_are_refused_by_name(
    client: Client, worker: ActingWorker, options: dict[str, object], words: str, embedded_redis: redis.Redis
) -> None:
    with pytest.raises(RequestError, match=words):
        client.submit("hi", **options)  # type: ignore[arg-type]  # wrong on purpose

    assert embedded_redis.zcard(KEYS.jobs) == 0


def test_a_key_of_another_user_is_another_request(client: Client, worker: ActingWorker) -> None:
    client.submit("hi", user="ann", idempotency_key="k")

    with pytest.raises(RequestError, match="another request"):
        client.submit("hi", user="bob", idempotency_key="k")


def test_a_users_limit_is_said_with_when_to_try_again(client: Client, worker: ActingWorker) -> None:
    client.set_limits(user_queued=0)

    with pytest.raises(UserLimitReached, match="0 may") as refused:
        client.submit("hi", user="ann")

    assert refused.value.retry_after_s > 0
    assert isinstance(refused.value, QueueFull)


def test_a_hopeless_deadline_is_said_with_the_estimate(
    client: Client, worker: ActingWorker, embedded_redis: redis.Redis
) -> None:
    embedded_redis.hset(f"{KEYS.prefix}queue:{MODEL}", mapping={"samples": 20, "rate": "1", "ratio": "1", "best": "1"})

    with pytest.raises(DeadlineHopeless, match=r"deadline of 5 s") as refused:
        client.submit("hi", deadline_s=5, max_tokens=100, ignore_eos=True)

    assert refused.value.estimate_s == pytest.approx(100)
    assert client.submit("hi", deadline_s=5, max_tokens=100).status().state == "queued"


def test_limits_are_set_shown_and_taken_away(client: Client) -> None:
    client.set_limits(model_queued=5, user_tokens=1000)
    client.set_user_limits("ann", weight=2.5, running=1)

    assert (client.limits().model_queued, client.limits().user_tokens) == (5, 1000)
    assert (client.user_limits("ann").weight, client.user_limits("ann").running) == (2.5, 1)
    assert client.user_limits("bob").weight == 1

    client.set_limits(model_queued=None, user_tokens=None)
    client.set_user_limits("ann", weight=None)

    assert (client.limits().model_queued, client.limits().user_tokens) == (10_000, None)
    assert (client.user_limits("ann").weight, client.user_limits("ann").running) == (1, 1)


@pytest.mark.parametrize("changes", [{"model_queued": -1}, {"model_queued": 1.5}, {"queued": 3}, {"user_tokens": "x"}])
def test_unusable_limits_are_refused_and_nothing_changes(client: Client, changes: dict[str, object]) -> None:
    before = client.limits()

    with pytest.raises(RequestError, match="limit"):
        client.set_limits(**changes)  # type: ignore[arg-type]  # wrong on purpose

    assert client.limits() == before


async def test_the_asyncio_client_takes_terms_and_limits(embedded_server: EmbeddedServer, worker: ActingWorker) -> None:
    async with AsyncClient(embedded_server.url) as client:
        await client.set_user_limits("ann", weight=2)
        job = await client.submit("hi", user="ann", priority=Priority.LOW, deadline_s=60.0)
        status = await job.status()

        assert (await client.user_limits("ann")).weight == 2
        assert (await client.limits()).model_queued == 10_000
    assert (status.user, status.priority) == ("ann", Priority.LOW)


def test_the_commands_submit_show_and_limit(
    client: Client, worker: ActingWorker, embedded_server: EmbeddedServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LAMELLA_REDIS_URL", embedded_server.url)
    run = CliRunner().invoke

    job_id = run(app, ["submit", "hi", "--user", "ann", "--priority", "low", "--deadline-s", "60"]).stdout.strip()
    shown = run(app, ["status", job_id]).stdout
    refused = run(app, ["submit", "hi", "--priority", "urgent"])
    limited = run(app, ["limits", "--user-queued", "3", "--json"])
    own = run(app, ["limits", "--user", "ann", "--weight", "2"])
    mixed = run(app, ["limits", "--weight", "2"])
    wrong = run(app, ["limits", "--user-queued", "many"])

    assert "ann" in shown
    assert "low" in shown
    assert "position" in shown
    assert refused.exit_code == 2
    assert json.loads(limited.stdout)["user_queued"] == 3
    assert "2.0" in own.stdout
    assert (mixed.exit_code, wrong.exit_code) == (2, 2)
    assert "--user" in mixed.stderr
