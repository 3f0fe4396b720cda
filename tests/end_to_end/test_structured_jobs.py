"""Formats, tools and embeddings through the whole path: client, server, worker process, engine, and back."""

from __future__ import annotations

import json
import math
import signal
from pathlib import Path

import pytest
from pydantic import BaseModel

from lamella.client import Client
from lamella.embedded import EmbeddedServer
from lamella.errors import JobError, JobFailed
from lamella.messages import TokenEvent
from lamella_engine import ShardStore
from tests import tiny_models
from tests.end_to_end.fleet import LEASE_S, Fleet

TEMPLATE = (
    "{% if tools %}<tool_call></tool_call>{% for tool in tools %}{{ tool.function.name }} {% endfor %}{% endif %}"
    + tiny_models.CHAT_TEMPLATE
)
SCHEMA = {
    "type": "object",
    "properties": {"city": {"enum": ["Paris", "Rome"]}, "days": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["city", "days"],
    "additionalProperties": False,
}
TOOL = {"type": "function", "function": {"name": "weather", "parameters": SCHEMA}}
CHAT = [{"role": "user", "content": "How is the weather?"}]
CALLER = "tiny-caller"


@pytest.fixture
def caller(fleet: Fleet, client: Client, tiny_store: Path, tmp_path: Path) -> str:
    """The name of a model whose template knows tools."""
    if not (tiny_store / CALLER).exists():
        tiny_models.save_tiny_llama(tmp_path / "model")
        (tmp_path / "model" / "chat_template.jinja").write_text(TEMPLATE)
        ShardStore(tiny_store).ensure(CALLER, source=tmp_path / "model")
    fleet.serve(client, CALLER, 1)
    return CALLER


class City(BaseModel):
    capital: bool
    letter: str


def test_an_answer_follows_a_schema_and_takes_fewer_sweeps_than_tokens(client: Client, solo: str) -> None:
    job = client.submit("Rome", model=solo, response_format={"type": "json_schema", "schema": SCHEMA}, max_tokens=300)

    completion = job.result(timeout_s=40)

    answer = json.loads(completion.text)
    assert set(answer) == {"city", "days"}
    assert completion.finish_reason == "stop"
    assert completion.usage.sweeps < completion.usage.completion_tokens / 2
    events = [item.event for item in job.stream(timeout_s=40) if isinstance(item.event, TokenEvent)]
    assert "".join(event.text for event in events) == completion.text
    assert max(len(event.token_ids) for event in events) > 1


def test_a_format_that_cannot_be_enforced_fails_the_job_with_the_reason(client: Client, solo: str) -> None:
    job = client.submit("Rome", model=solo, response_format={"type": "json_schema", "schema": {"type": "wat"}})

    with pytest.raises(JobFailed, match="wat") as caught:
        job.result(timeout_s=40)

    assert caught.value.code == "bad_response_format"


def test_a_biased_token_is_chosen_or_never(client: Client, solo: str) -> None:
    plain = client.generate("Rome", model=solo, max_tokens=10, ignore_eos=True, timeout_s=40)
    pushed = client.generate("Rome", model=solo, max_tokens=10, ignore_eos=True, logit_bias={65: 100}, timeout_s=40)
    barred = client.generate(
        "Rome", model=solo, max_tokens=10, ignore_eos=True, logit_bias={plain.token_ids[0]: -100}, timeout_s=40
    )

    assert pushed.token_ids == (65,) * 10
    assert plain.token_ids[0] not in barred.token_ids


def test_a_tool_is_called_and_its_answer_goes_back(client: Client, caller: str) -> None:
    choice = {"type": "function", "function": {"name": "weather"}}

    first = client.generate(messages=CHAT, model=caller, tools=[TOOL], tool_choice=choice, max_tokens=300, timeout_s=40)

    assert (first.finish_reason, first.text) == ("tool_calls", "")
    (call,) = first.tool_calls
    assert call.function.name == "weather"
    assert set(json.loads(call.function.arguments)) == {"city", "days"}
    turns = [
        *CHAT,
        {"role": "assistant", "content": None, "tool_calls": [call.model_dump()]},
        {"role": "tool", "tool_call_id": call.id, "content": "rain"},
    ]
    second = client.generate(messages=turns, model=caller, tools=[TOOL], max_tokens=8, ignore_eos=True, timeout_s=40)
    assert second.usage.completion_tokens == 8


def test_tools_without_a_template_for_them_fail_the_job_clearly(client: Client, solo: str) -> None:
    with pytest.raises(JobFailed, match="knows no tools") as caught:
        client.generate(messages=CHAT, model=solo, tools=[TOOL], timeout_s=40)

    assert caught.value.code == "tools_unsupported"


def test_vectors_come_whole_and_the_same_beside_other_jobs(client: Client, solo: str) -> None:
    texts = ["The river runs", "Paris is the capital of France", "a"] * 5
    alone = client.embed(solo, texts, timeout_s=40)
    talk = client.submit("The river", model=solo, max_tokens=200, ignore_eos=True)

    beside = client.embed(solo, texts, timeout_s=40)

    assert len(alone.vectors) == 15
    assert all(math.isclose(math.hypot(*vector), 1.0, rel_tol=1e-5) for vector in alone.vectors)
    assert alone.vectors[0] == pytest.approx(beside.vectors[0], abs=1e-5)
    assert alone.vectors[0] == pytest.approx(alone.vectors[3], abs=1e-5)
    assert alone.usage.completion_tokens == 0
    assert alone.usage.sweeps < 15
    assert talk.result(timeout_s=40).usage.completion_tokens == 200


def test_a_job_is_read_as_what_it_is(client: Client, solo: str) -> None:
    vectors = client.submit_embed(solo, ["a"])
    text = client.submit("a", model=solo, max_tokens=3, ignore_eos=True)

    with pytest.raises(JobError, match="embeddings"):
        vectors.result(timeout_s=40)
    with pytest.raises(JobError, match="generates text"):
        text.embeddings(timeout_s=40)


def test_an_answer_in_a_format_goes_on_after_its_worker_is_killed(
    client: Client, pair: list[str], fleet: Fleet
) -> None:
    model = "tiny-pair"
    grammar = {"type": "regex", "regex": "(item [0-9]{1,3} of the list; ){40}end"}
    options = {"model": model, "response_format": grammar, "max_tokens": 480, "temperature": 1.0, "seed": 5}
    expected = client.generate("Rome", timeout_s=40, **options)
    job = client.submit("Rome", **options)
    events = job.stream(timeout_s=LEASE_S + 60)
    while not isinstance(next(events).event, TokenEvent):
        pass

    worker = job.status().worker
    assert worker is not None
    fleet.signal(worker, signal.SIGKILL)

    completion = job.result(timeout_s=LEASE_S + 60)
    assert completion.text == expected.text
    assert completion.token_ids == expected.token_ids
    assert job.status().attempts > 1


def test_the_same_request_for_vectors_under_one_key_is_one_job(session_server: EmbeddedServer, solo: str) -> None:
    with Client(session_server.url) as client:
        job = client.submit_embed(solo, ["unmistakable"], idempotency_key="vectors")
        again = client.submit_embed(solo, ["unmistakable"], idempotency_key="vectors")

        assert job.id == again.id
        assert job.embeddings(timeout_s=40).vectors == again.embeddings(timeout_s=40).vectors
