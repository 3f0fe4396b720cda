"""Embeddings over HTTP, with OpenAI's own SDK as the client."""

from __future__ import annotations

import base64
from array import array

import openai
import pytest

from lamella.embedding import EmbeddingsEvent
from lamella.messages import Done, Failed, Usage
from tests.client.acting_worker import MODEL, ActingWorker
from tests.gateway.conftest import MakeKey
from tests.gateway.running_gateway import RunningGateway, on_next_job
from tests.gateway.test_chat import sent

VECTORS = [[0.5, -1.0, 0.25], [2.0, 0.0, -0.125]]


def bring(worker: ActingWorker, job_id: str, count: int) -> None:
    numbers = array("f", [number for vector in VECTORS[:count] for number in vector])
    event = EmbeddingsEvent(count=count, width=3, values=base64.b64encode(numbers.tobytes()).decode())
    worker.emit(job_id, event, Done(finish_reason="stop", usage=Usage(prompt_tokens=7, completion_tokens=0)))


@pytest.mark.parametrize("encoding", [{}, {"encoding_format": "float"}])
def test_the_vectors_of_texts_come_in_order(sdk: openai.OpenAI, worker: ActingWorker, encoding: dict[str, str]) -> None:
    thread = on_next_job(worker, lambda job_id: bring(worker, job_id, 2))
    found = sdk.embeddings.create(model=MODEL, input=["one", "two"], **encoding)
    thread.join(40)

    assert [each.embedding for each in found.data] == VECTORS
    assert [each.index for each in found.data] == [0, 1]
    assert (found.model, found.usage.prompt_tokens, found.usage.total_tokens) == (MODEL, 7, 7)


def test_base64_is_float32_of_one_vector(sdk: openai.OpenAI, worker: ActingWorker) -> None:
    thread = on_next_job(worker, lambda job_id: bring(worker, job_id, 2))
    found = sdk.embeddings.create(model=MODEL, input=["one", "two"], encoding_format="base64")
    thread.join(40)

    assert base64.b64decode(found.data[1].embedding) == array("f", VECTORS[1]).tobytes()


def test_a_single_text_and_the_pooling_reach_the_job(sdk: openai.OpenAI, worker: ActingWorker) -> None:
    thread = on_next_job(worker, lambda job_id: bring(worker, job_id, 1))
    options = {"pooling": "last", "normalised": False}
    found = sdk.embeddings.create(model=MODEL, input="one", extra_body=options)
    thread.join(40)

    (request,) = sent(worker)
    assert (request.texts, request.pooling, request.normalised) == (("one",), "last", False)
    assert len(found.data) == 1


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"input": [1, 2, 3]}, "token ids are not taken"),
        ({"input": [[1, 2], [3]]}, "token ids are not taken"),
        ({"input": []}, "input"),
        ({"input": ""}, "input"),
        ({"input": ["a", ""]}, "input"),
        ({"input": "a", "dimensions": 64}, "not shortened"),
        ({"input": "a", "extra_body": {"pooling": "max"}}, "pooling"),
    ],
    ids=str,
)
def test_what_cannot_be_embedded_is_refused(
    sdk: openai.OpenAI, worker: ActingWorker, fields: dict[str, object], said: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=said):
        sdk.embeddings.create(model=MODEL, **fields)

    assert sent(worker) == []


def test_a_model_without_embeddings_is_a_bad_request(sdk: openai.OpenAI, worker: ActingWorker) -> None:
    failed = Failed(code="embeddings_unsupported", message="this family runs step by step")
    thread = on_next_job(worker, lambda job_id: worker.emit(job_id, failed))
    with pytest.raises(openai.BadRequestError, match="step by step") as caught:
        sdk.embeddings.create(model=MODEL, input="one")
    thread.join(40)

    assert (caught.value.code, caught.value.param) == ("embeddings_unsupported", "model")


def test_a_key_needs_the_endpoint(guarded: RunningGateway, worker: ActingWorker, new_key: MakeKey) -> None:
    with guarded.client(new_key("eve", endpoints=("chat",))) as eve, guarded.client(new_key("ada")) as ada:
        with pytest.raises(openai.PermissionDeniedError):
            eve.embeddings.create(model=MODEL, input="one")
        thread = on_next_job(worker, lambda job_id: bring(worker, job_id, 1))
        found = ada.embeddings.create(model=MODEL, input="one")
        thread.join(40)

    assert found.data[0].embedding == VECTORS[0]
