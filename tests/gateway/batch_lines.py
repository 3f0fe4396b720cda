"""Inputs of batches, and their outputs read back, for the tests of the gateway."""

from __future__ import annotations

import json
from collections.abc import Iterable

import openai
from openai.types import Batch

from tests.client.acting_worker import MODEL, ActingWorker
from tests.waiting import wait_until

CHAT = "/v1/chat/completions"
ENDED = ("completed", "failed", "expired", "cancelled")


def chat_line(number: int, prompt: str | None = None, **body: object) -> dict[str, object]:
    messages = [{"role": "user", "content": f"p{number}" if prompt is None else prompt}]
    return line(number, CHAT, {"model": MODEL, "messages": messages, **body})


def line(number: int, url: str, body: dict[str, object]) -> dict[str, object]:
    return {"custom_id": f"c{number}", "method": "POST", "url": url, "body": body}


def upload(sdk: openai.OpenAI, lines: Iterable[dict[str, object] | str]) -> str:
    text = "\n".join(each if isinstance(each, str) else json.dumps(each) for each in lines)
    return sdk.files.create(file=("in.jsonl", text.encode()), purpose="batch").id


def begin(sdk: openai.OpenAI, lines: Iterable[dict[str, object] | str], **options: object) -> Batch:
    given = {"endpoint": CHAT, "completion_window": "24h", **options}
    return sdk.batches.create(input_file_id=upload(sdk, lines), **given)  # type: ignore[arg-type]  # each test says what it needs


def ended(sdk: openai.OpenAI, batch: Batch) -> Batch:
    """The batch, once it has ended."""
    return wait_until(lambda: found if (found := sdk.batches.retrieve(batch.id)).status in ENDED else None)


def records(sdk: openai.OpenAI, file_id: str | None) -> list[dict[str, object]]:
    """What a file of outputs says; nothing where there is none."""
    return [] if file_id is None else [json.loads(each) for each in sdk.files.content(file_id).text.splitlines()]


def all_running(worker: ActingWorker) -> list[str]:
    """The jobs that have not ended, if every one of them runs; else none of them."""
    active = list(worker.redis.zrange(worker.keys.active, 0, -1))
    states = {worker.redis.hget(worker.keys.job(job_id), "state") for job_id in active}
    return active if states == {"running"} else []


def texts(outputs: list[dict[str, object]]) -> dict[str, str]:
    """The answers of a batch of chats by their custom ids."""
    return {
        str(each["custom_id"]): each["response"]["body"]["choices"][0]["message"]["content"]  # type: ignore[index]  # it is JSON
        for each in outputs
    }
