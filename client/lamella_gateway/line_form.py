"""Lines of a batch as the requests that the routes take: the same fields, jobs, bodies and errors.

Owns what a line may not ask because nobody waits for it (streams, background), and the form of its record. Does no
I/O. Neighbours: the routes (whose requests and bodies these are), `batch_check`, `batch_execution`, and
`lamella.batch_tasks`, which reads lines through it.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from lamella import Completion, Done, Embeddings, LamellaError, Priority, RequestError
from lamella.batch_form import LineJobs
from lamella.batch_lines import BatchError, BatchLine, BatchUrl
from lamella.batch_results import error_record, record_id
from lamella.map_flight import Brought
from lamella_gateway.answer import Answer
from lamella_gateway.api_error import ApiError, from_lamella
from lamella_gateway.api_keys import Endpoint
from lamella_gateway.batch_record import Tally
from lamella_gateway.body import parse
from lamella_gateway.chat import chat_body, chat_order
from lamella_gateway.chat_request import ChatRequest
from lamella_gateway.completion_request import CompletionRequest
from lamella_gateway.completions import completion_body, completion_order
from lamella_gateway.embedding_request import EmbeddingRequest
from lamella_gateway.embeddings import embedding_order, embeddings_body
from lamella_gateway.order import Order
from lamella_gateway.response_record import response_id
from lamella_gateway.response_request import ResponseRequest
from lamella_gateway.response_shapes import ended_body, response_body
from lamella_gateway.responses import response_order

ENDPOINTS: dict[BatchUrl, Endpoint] = {
    BatchUrl.CHAT: Endpoint.CHAT,
    BatchUrl.COMPLETIONS: Endpoint.COMPLETIONS,
    BatchUrl.EMBEDDINGS: Endpoint.EMBEDDINGS,
    BatchUrl.RESPONSES: Endpoint.RESPONSES,
}
GIVEN_UP = frozenset(("batch_cancelled", "batch_expired", "batch_stopped"))  # codes of lines that were not run

Request = ChatRequest | CompletionRequest | EmbeddingRequest | ResponseRequest
Result = TypeVar("Result", Completion, Embeddings)
Body = Callable[[Sequence[Brought]], object]


class HttpForm:
    """Lines of one endpoint.

    Args:
        url: the endpoint.
        user: whose jobs they are; None leaves it to the lines.
        default_tokens: how long an answer of a model may be that does not say; raises BatchError for a model that the
            batch may not use.

    Attributes:
        tally: lines whose record was made, and their tokens; changed as records are made.
    """

    def __init__(self, url: BatchUrl, user: str | None, default_tokens: Callable[[str], int]) -> None:
        self.tally = Tally()
        self._url = url
        self._user = user
        self._default_tokens = default_tokens

    def read(self, line: BatchLine) -> LineJobs:
        """Return the jobs of a line; raises BatchError, which names the field."""
        if line.url is not self._url or line.custom_id is None:
            raise BatchError("invalid_line", "a line has custom_id, method, url and body", custom_id=line.custom_id)
        try:
            order, body = self._asked(line)
            drafts = order.drafts(self._user, requires_worker=False, priority=Priority.LOW)
        except ApiError as error:
            param = "body" if error.param is None else f"body.{error.param}"
            raise BatchError(error.code or "invalid_request", error.message, param, line.custom_id) from error
        except BatchError:
            raise
        except RequestError as error:
            raise BatchError("invalid_request", str(error), "body", line.custom_id) from error
        return LineJobs(drafts, lambda batch_id, results: self._record(batch_id, line, body, results))

    def failure(self, batch_id: str, number: int, custom_id: str | None, error: LamellaError) -> str:
        """Return the record of a line that brought no answer: an HTTP status where the request would have had one."""
        if isinstance(error, BatchError):
            record = error_record(batch_id, number, custom_id, error)
        else:
            answer = from_lamella(error)
            job_id = getattr(error, "job_id", None)
            record = _record(batch_id, number, custom_id, answer.status, str(job_id or ""), json.loads(answer.body()))
        self.tally = counted(self.tally, record)
        return record

    def _asked(self, line: BatchLine) -> tuple[Order, Body]:
        text = json.dumps(line.body).encode()
        match self._url:
            case BatchUrl.CHAT:
                return self._chat(parse(ChatRequest, text))
            case BatchUrl.COMPLETIONS:
                return self._completion(parse(CompletionRequest, text))
            case BatchUrl.EMBEDDINGS:
                return self._embedding(parse(EmbeddingRequest, text))
            case BatchUrl.RESPONSES:
                return self._response(parse(ResponseRequest, text))
            case BatchUrl.PLAIN:
                raise BatchError("invalid_url", "the plain form has no url")

    def _chat(self, asked: ChatRequest) -> tuple[Order, Body]:
        _check_waits(asked.stream, "stream")
        order = chat_order(asked, self._default_tokens(asked.model))

        def body(results: Sequence[Brought]) -> object:
            one_call = asked.parallel_tool_calls is False
            return chat_body(asked, [Answer.of(each, one_call=one_call) for each in _all(results, Completion)])

        return order, body

    def _completion(self, asked: CompletionRequest) -> tuple[Order, Body]:
        _check_waits(asked.stream, "stream")
        self._default_tokens(asked.model)
        order = completion_order(asked)
        return order, lambda results: completion_body(asked, [Answer.of(each) for each in _all(results, Completion)])

    def _embedding(self, asked: EmbeddingRequest) -> tuple[Order, Body]:
        self._default_tokens(asked.model)

        def body(results: Sequence[Brought]) -> object:
            (found,) = _all(results, Embeddings)
            return embeddings_body(asked, found.vectors, found.usage)

        return embedding_order(asked), body

    def _response(self, asked: ResponseRequest) -> tuple[Order, Body]:
        _check_waits(asked.stream, "stream")
        _check_waits(asked.background, "background")
        _check_waits(asked.store, "store")
        if asked.previous_response_id is not None:
            raise ApiError(
                400,
                "a line of a batch goes on from no response; send the conversation as input",
                param="previous_response_id",
                code="unsupported_parameter",
            )
        order, record = response_order(asked, self._default_tokens(asked.model))
        record = record.model_copy(update={"store": False})

        def body(results: Sequence[Brought]) -> object:
            (found,) = _all(results, Completion)
            answer = Answer.of(found, one_call=not record.parallel_tool_calls)
            now = time.time()
            base = response_body(response_id(found.job_id), record, now, "in_progress")
            return ended_body(base, answer, Done(finish_reason=answer.stop_reason, usage=found.usage), now)

        return order, body

    def _record(self, batch_id: str, line: BatchLine, body: Body, results: Sequence[Brought]) -> str:
        record = _record(batch_id, line.number, line.custom_id, 200, results[0].job_id, body(results))
        self.tally = counted(self.tally, record)
        return record


def counted(tally: Tally, record: str | bytes) -> Tally:
    """Return a tally with one record more, as it is written."""
    told = json.loads(record)
    if told["error"] is not None:
        name = "given_up" if told["error"]["code"] in GIVEN_UP else "failed"
        return tally.model_copy(update={name: getattr(tally, name) + 1})
    if told["response"]["status_code"] != 200:
        return tally.model_copy(update={"failed": tally.failed + 1})
    usage = told["response"]["body"]["usage"]
    return tally.model_copy(
        update={
            "completed": tally.completed + 1,
            "input_tokens": tally.input_tokens + usage.get("prompt_tokens", usage.get("input_tokens", 0)),
            "output_tokens": tally.output_tokens + usage.get("completion_tokens", usage.get("output_tokens", 0)),
        }
    )


def _all(results: Sequence[Brought], kind: type[Result]) -> list[Result]:
    found = [each for each in results if isinstance(each, kind)]
    if len(found) != len(results):
        raise BatchError("invalid_answer", "a job brought something else than was asked")
    return found


def _check_waits(value: bool | None, name: str) -> None:
    if value:
        raise ApiError(
            400,
            f"{name} is true; the answers of a batch come in its output file, so leave {name} out",
            param=name,
            code="unsupported_parameter",
        )


def _record(batch_id: str, number: int, custom_id: str | None, status: int, request_id: str, body: object) -> str:
    response = {"status_code": status, "request_id": request_id, "body": body}
    record = {"id": record_id(batch_id, number), "custom_id": custom_id, "response": response, "error": None}
    return json.dumps(record, ensure_ascii=False)
