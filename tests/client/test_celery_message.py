"""The envelope that the scripts write against what Celery itself puts on the list."""

from __future__ import annotations

import base64
import json
from typing import Any

import pytest
import redis
from celery import Celery

from lamella.embedded import EmbeddedServer
from lamella.keys import DEFAULT_PREFIX, TASK_NAME, Keys, queue_name
from lamella.messages import GenerateRequest
from lamella.queue_calls import serve_call
from lamella.registry_calls import nudge_call, submit_call
from tests.client.acting_worker import call

KEYS = Keys()
MODEL = "owner/name@0123abc"
OURS_TO_CHOOSE = {"origin"}
UNIQUE = {"delivery_tag", "reply_to"}
PLAIN = {"body_encoding"}  # ours is text as it is, which kombu reads as well


def celery_sends(server: EmbeddedServer, client: redis.Redis, job_id: str) -> dict[str, Any]:
    app = Celery("contract", broker=f"redis+socket://{server.socket_path}?virtual_host=0", set_as_current=False)
    app.conf.update(broker_transport_options={"global_keyprefix": DEFAULT_PREFIX}, task_ignore_result=True)
    with app.connection_for_write() as connection:
        app.send_task(
            TASK_NAME,
            args=[job_id],
            task_id=job_id,
            queue=queue_name(MODEL),
            connection=connection,
            ignore_result=True,
        )
    app.close()
    return taken(client)


def we_send(client: redis.Redis, job_id: str) -> dict[str, Any]:
    call(client, serve_call(KEYS, "w", MODEL, 1))
    call(client, submit_call(KEYS, job_id, GenerateRequest(model=MODEL, prompt="a secret")))
    return taken(client)


def taken(client: redis.Redis) -> dict[str, Any]:
    raw = client.rpop(KEYS.queue_list(MODEL))
    assert isinstance(raw, str)
    sent: dict[str, Any] = json.loads(raw)
    return sent


@pytest.mark.parametrize("job_id", ["j", "j1", "job", 'od"d\\id'])
def test_the_envelope_is_the_one_celery_sends(
    embedded_server: EmbeddedServer, embedded_redis: redis.Redis, job_id: str
) -> None:
    theirs = celery_sends(embedded_server, embedded_redis, job_id)

    ours = we_send(embedded_redis, job_id)

    assert ours.keys() == theirs.keys()
    for part, optional in (("headers", OURS_TO_CHOOSE), ("properties", UNIQUE | PLAIN)):
        assert ours[part].keys() == theirs[part].keys()
        left = {key: value for key, value in ours[part].items() if key not in optional | {"argsrepr"}}
        assert left == {key: theirs[part][key] for key in left}
    assert ours["properties"]["body_encoding"] is None
    assert json.loads(ours["body"]) == json.loads(base64.b64decode(str(theirs["body"])))
    assert (ours["content-type"], ours["content-encoding"]) == (theirs["content-type"], theirs["content-encoding"])


def test_each_sending_has_a_delivery_tag_of_its_own(embedded_redis: redis.Redis) -> None:
    tags = {we_send(embedded_redis, "job1")["properties"]["delivery_tag"]}

    for _ in range(3):
        call(embedded_redis, nudge_call(KEYS, "job1", MODEL, 0))
        tags.add(taken(embedded_redis)["properties"]["delivery_tag"])

    assert len(tags) == 4


def test_the_message_carries_nothing_but_the_id(embedded_redis: redis.Redis) -> None:
    sent = we_send(embedded_redis, "job1")

    assert json.loads(sent["body"])[:2] == [["job1"], {}]
    assert "secret" not in json.dumps(sent)
