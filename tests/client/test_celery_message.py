"""Our envelope against what Celery itself puts on the list."""

from __future__ import annotations

import base64
import json

import redis
from celery import Celery

from lamella.celery_message import celery_message
from lamella.embedded import EmbeddedServer
from lamella.keys import DEFAULT_PREFIX, TASK_NAME, Keys, queue_name

OURS_TO_CHOOSE = {"origin"}
UNIQUE = {"delivery_tag", "reply_to"}


def celery_sends(server: EmbeddedServer, client: redis.Redis, job_id: str, model: str) -> dict[str, object]:
    app = Celery("contract", broker=f"redis+socket://{server.socket_path}?virtual_host=0", set_as_current=False)
    app.conf.update(broker_transport_options={"global_keyprefix": DEFAULT_PREFIX}, task_ignore_result=True)
    with app.connection_for_write() as connection:
        app.send_task(
            TASK_NAME,
            args=[job_id],
            task_id=job_id,
            queue=queue_name(model),
            connection=connection,
            ignore_result=True,
        )
    app.close()
    raw = client.rpop(Keys().queue_list(model))
    assert isinstance(raw, str)
    sent: dict[str, object] = json.loads(raw)
    return sent


def test_the_envelope_is_the_one_celery_sends(embedded_server: EmbeddedServer, embedded_redis: redis.Redis) -> None:
    model = "owner/name@0123abc"
    theirs = celery_sends(embedded_server, embedded_redis, "job1", model)

    ours = json.loads(celery_message("job1", model))

    assert ours.keys() == theirs.keys()
    for part, optional in (("headers", OURS_TO_CHOOSE), ("properties", UNIQUE)):
        assert ours[part].keys() == theirs[part].keys()
        left = {key: value for key, value in ours[part].items() if key not in optional | {"argsrepr"}}
        assert left == {key: theirs[part][key] for key in left}
    assert json.loads(base64.b64decode(ours["body"])) == json.loads(base64.b64decode(str(theirs["body"])))
    assert (ours["content-type"], ours["content-encoding"]) == (theirs["content-type"], theirs["content-encoding"])


def test_each_message_has_a_delivery_tag_of_its_own() -> None:
    tags = {json.loads(celery_message("job1", "m"))["properties"]["delivery_tag"] for _ in range(10)}

    assert len(tags) == 10


def test_the_message_carries_nothing_but_the_id() -> None:
    body = json.loads(base64.b64decode(json.loads(celery_message("job1", "m"))["body"]))

    assert body[:2] == [["job1"], {}]
