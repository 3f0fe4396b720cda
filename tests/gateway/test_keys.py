"""API keys: made once, kept as hashes, scoped, limited, counted, revoked."""

from __future__ import annotations

import json

import openai
import pytest
import redis
from typer.testing import CliRunner

from lamella.embedded import EmbeddedServer
from lamella.messages import Cancelled
from lamella_gateway.keys_cli import app
from tests.client.acting_worker import MODEL, ActingWorker, token
from tests.gateway.conftest import MakeKey
from tests.gateway.running_gateway import AnsweringWorker, RunningGateway
from tests.waiting import wait_until

CHAT = {"model": MODEL, "messages": [{"role": "user", "content": "Hi there you"}]}


def run(server: EmbeddedServer, *arguments: str) -> str:
    outcome = CliRunner().invoke(app, [*arguments, "--redis-url", server.url])
    assert outcome.exit_code == 0, outcome.output
    return outcome.stdout


def usage(server: EmbeddedServer) -> dict[str, dict[str, int]]:
    return {each["name"]: each for each in json.loads(run(server, "usage", "--json"))["keys"]}


def test_a_key_is_made_used_counted_and_revoked(
    guarded: RunningGateway, answering: AnsweringWorker, embedded_server: EmbeddedServer
) -> None:
    key = run(embedded_server, "create", "notebook", "--user", "ada").strip()
    (listed,) = json.loads(run(embedded_server, "list", "--json"))

    with guarded.client(key) as sdk:
        sdk.chat.completions.create(**CHAT, n=2)
        wait_until(lambda: usage(embedded_server)["notebook"]["completion_tokens"] == 6)
        counted = usage(embedded_server)["notebook"]
        run(embedded_server, "revoke", listed["key_id"])
        with pytest.raises(openai.AuthenticationError, match="revoked"):
            sdk.models.list()

    assert (counted["requests"], counted["prompt_tokens"], counted["tokens_today"]) == (1, 6, 12)
    assert listed["user"] == "ada"
    assert "revoked" in run(embedded_server, "list")


def test_only_a_hash_of_the_key_is_stored(
    embedded_server: EmbeddedServer, embedded_redis: redis.Redis, new_key: MakeKey
) -> None:
    secret = new_key("ada").rpartition("-")[2]

    held = [embedded_redis.hgetall(name) for name in embedded_redis.scan_iter("lamella:apikey:*")]

    assert len(held) == 1
    assert secret not in json.dumps(held)
    assert secret not in run(embedded_server, "list", "--json")


@pytest.mark.parametrize("key", ["nonsense", "sk-lamella-000000000000-" + "0" * 48, "sk-lamella-é"])
def test_without_a_valid_key_nothing_is_served(guarded: RunningGateway, worker: ActingWorker, key: str) -> None:
    headers = {"Authorization": f"Bearer {key}"} if key.isascii() else {}
    with guarded.client() as sdk:
        for call in (
            lambda: sdk.models.list(extra_headers=headers),
            lambda: sdk.chat.completions.create(**CHAT, extra_headers=headers),
            lambda: sdk.responses.retrieve("resp_" + "0" * 32, extra_headers=headers),
        ):
            with pytest.raises(openai.AuthenticationError) as caught:
                call()
            assert caught.value.code == "invalid_api_key"


def test_a_wrong_secret_does_not_open_a_key(guarded: RunningGateway, worker: ActingWorker, new_key: MakeKey) -> None:
    key = new_key("ada")
    wrong = key[:-1] + ("0" if key[-1] != "0" else "1")

    with guarded.client(wrong) as sdk, pytest.raises(openai.AuthenticationError):
        sdk.models.list()
    with guarded.client(key) as sdk:
        assert [model.id for model in sdk.models.list()] == [MODEL]


def test_a_keys_scopes_hold(guarded: RunningGateway, answering: AnsweringWorker, new_key: MakeKey) -> None:
    with guarded.client(new_key("ada", models=("other/model",))) as sdk:
        assert list(sdk.models.list()) == []
        with pytest.raises(openai.NotFoundError):
            sdk.models.retrieve(MODEL)
        with pytest.raises(openai.PermissionDeniedError, match="other/model"):
            sdk.chat.completions.create(**CHAT)
    with guarded.client(new_key("bob", endpoints=("chat",))) as sdk:
        assert sdk.chat.completions.create(**CHAT).choices
        with pytest.raises(openai.PermissionDeniedError) as caught:
            sdk.completions.create(model=MODEL, prompt="Hi")
        assert caught.value.code == "endpoint_not_allowed"


def test_the_keys_user_is_the_jobs_whatever_the_request_says(
    guarded: RunningGateway, answering: AnsweringWorker, new_key: MakeKey
) -> None:
    with guarded.client(new_key("ada")) as sdk:
        answer = sdk.chat.completions.create(**CHAT, user="eve")

    acting = answering.acting
    assert acting.redis.hget(acting.keys.job(answer.id.removeprefix("chatcmpl-")), "user") == "ada"


def test_requests_a_minute_are_held(guarded: RunningGateway, answering: AnsweringWorker, new_key: MakeKey) -> None:
    with guarded.client(new_key("ada", requests_per_minute=2)) as sdk:
        for _ in range(2):
            sdk.chat.completions.create(**CHAT)
        with pytest.raises(openai.RateLimitError) as caught:
            sdk.chat.completions.create(**CHAT)
        sdk.models.list()

    assert caught.value.code == "rate_limit_exceeded"
    assert 1 <= int(caught.value.response.headers["retry-after"]) <= 30


def test_tokens_a_day_count_what_runs_and_give_back_what_was_not_used(
    guarded: RunningGateway, worker: ActingWorker, new_key: MakeKey, embedded_server: EmbeddedServer
) -> None:
    with guarded.client(new_key("ada", tokens_per_day=100)) as sdk:
        made = sdk.responses.create(model=MODEL, input="Hi", max_output_tokens=60, background=True)
        with pytest.raises(openai.RateLimitError) as caught:
            sdk.responses.create(model=MODEL, input="Hi", max_output_tokens=60, background=True)
        worker.run(made.id.removeprefix("resp_"), "Par", "is")
        wait_until(lambda: usage(embedded_server)["ada"]["tokens_today"] == 5)
        sdk.responses.create(model=MODEL, input="Hi", max_output_tokens=60, background=True)

    assert caught.value.code == "insufficient_quota"
    assert caught.value.response.headers["x-should-retry"] == "false" or (
        int(caught.value.response.headers["retry-after"]) <= 120
    )


def test_a_cancelled_job_is_billed_for_what_it_brought(
    guarded: RunningGateway, worker: ActingWorker, new_key: MakeKey, embedded_server: EmbeddedServer
) -> None:
    with guarded.client(new_key("ada", tokens_per_day=1000)) as sdk:
        waiting = sdk.responses.create(model=MODEL, input="Hi", max_output_tokens=60, background=True)
        running = sdk.responses.create(model=MODEL, input="Hi", max_output_tokens=60, background=True)
        job_id = running.id.removeprefix("resp_")
        worker.claim(job_id)
        worker.emit(job_id, token("Par"))
        sdk.responses.cancel(waiting.id)
        sdk.responses.cancel(running.id)
        worker.emit(job_id, Cancelled())
        wait_until(lambda: usage(embedded_server)["ada"]["tokens_today"] == 2)

    counted = usage(embedded_server)["ada"]
    assert (counted["prompt_tokens"], counted["completion_tokens"]) == (1, 1)


def test_what_a_stopped_gateway_left_is_billed_by_the_next(
    embedded_server: EmbeddedServer, worker: ActingWorker, new_key: MakeKey
) -> None:
    key = new_key("ada")
    with RunningGateway(embedded_server.url, requires_key=True) as first, first.client(key) as sdk:
        made = sdk.responses.create(model=MODEL, input="Hi", background=True)
    worker.run(made.id.removeprefix("resp_"), "Par", "is")
    assert usage(embedded_server)["ada"]["completion_tokens"] == 0

    with RunningGateway(embedded_server.url, requires_key=True):
        wait_until(lambda: usage(embedded_server)["ada"]["completion_tokens"] == 2)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("create", "a\nb"), "printable"),
        (("create", "x", "--user", ""), "x"),
        (("create", "x", "--model", "../etc"), "not a model name"),
        (("revoke", "nothing"), "there is no key"),
    ],
)
def test_a_mistake_on_the_command_line_is_said(
    embedded_server: EmbeddedServer, arguments: tuple[str, ...], said: str
) -> None:
    outcome = CliRunner().invoke(app, [*arguments, "--redis-url", embedded_server.url])

    assert said in outcome.output
    assert outcome.exit_code == (0 if said == "x" else 2)
