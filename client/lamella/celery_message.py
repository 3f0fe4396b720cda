"""The Celery message that tells a worker of a job, byte for byte what Celery itself would put on a Redis list.

Owns the envelope (Celery's message protocol 2 inside kombu's virtual transport) so that submitting a job needs no
Celery. It carries the job id and nothing else: the request itself stays in the job's record. Neighbours:
`registry_calls` (which stores and pushes it), the worker's Celery app (which consumes it).
"""

from __future__ import annotations

import base64
import json
import uuid

from lamella.keys import TASK_NAME, queue_name

ORIGIN = "lamella-client"
TRACE_HEADER = "traceparent"


def celery_message(job_id: str, model: str, trace: str | None = None) -> str:
    """Return the JSON envelope of task ``lamella.generate`` for one job, addressed to the model's queue.

    `trace` is the W3C traceparent of whoever asks for it; it travels in the headers, beside Celery's own.
    """
    queue = queue_name(model)
    body = [[job_id], {}, {"callbacks": None, "errbacks": None, "chain": None, "chord": None}]
    envelope = {
        "body": base64.b64encode(json.dumps(body).encode()).decode(),
        "content-encoding": "utf-8",
        "content-type": "application/json",
        "headers": _headers(job_id) | ({} if trace is None else {TRACE_HEADER: trace}),
        "properties": {
            "correlation_id": job_id,
            "reply_to": job_id,
            "delivery_mode": 2,
            "delivery_info": {"exchange": "", "routing_key": queue},
            "priority": 0,
            "body_encoding": "base64",
            "delivery_tag": str(uuid.uuid4()),
        },
    }
    return json.dumps(envelope)


def _headers(job_id: str) -> dict[str, object]:
    return {
        "lang": "py",
        "task": TASK_NAME,
        "id": job_id,
        "shadow": None,
        "eta": None,
        "expires": None,
        "group": None,
        "group_index": None,
        "retries": 0,
        "timelimit": [None, None],
        "root_id": job_id,
        "parent_id": None,
        "argsrepr": repr((job_id,)),
        "kwargsrepr": "{}",
        "origin": ORIGIN,
        "ignore_result": True,
        "replaced_task_nesting": 0,
        "stamped_headers": None,
        "stamps": {},
    }
