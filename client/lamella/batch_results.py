"""What a batch writes: a line for each answer, in the form in which it was asked, and a line for each error.

Owns the shapes of both and the ids that tell which line of which input a record belongs to. Does no I/O. Neighbours:
`batch_files` (which writes and reads back), `batch_run`.
"""

from __future__ import annotations

import json
import re
import time

from lamella.batch_lines import BatchError, BatchLine, BatchUrl
from lamella.completion import Completion
from lamella.errors import JobCancelled, JobError, JobFailed, LamellaError, NoWorkerError
from lamella.messages import TokenLogprob

_RECORD_ID = re.compile(r'^\{"id": "batch_req_([0-9a-f]{16})_([1-9][0-9]{0,14})"[,}]', re.ASCII)


def record_id(batch_id: str, number: int) -> str:
    """Return the id of the record for line `number` of a batch."""
    return f"batch_req_{batch_id}_{number}"


def read_record_id(line: bytes) -> tuple[str, int] | None:
    """Return batch and line number of a written record; None if it is none of ours."""
    found = _RECORD_ID.match(line[:80].decode("ascii", "replace"))
    return (found[1], int(found[2])) if found else None


def answer_record(batch_id: str, line: BatchLine, model: str, completion: Completion) -> str:
    """Return the output line for an answer."""
    usage = {
        "prompt_tokens": completion.usage.prompt_tokens,
        "completion_tokens": completion.usage.completion_tokens,
        "total_tokens": completion.usage.prompt_tokens + completion.usage.completion_tokens,
    }
    head: dict[str, object] = {"id": record_id(batch_id, line.number), "custom_id": line.custom_id}
    if line.url is BatchUrl.PLAIN:
        return _json(
            {
                **head,
                "line": line.number,
                "text": completion.text,
                "finish_reason": completion.finish_reason,
                "model": model,
                "job_id": completion.job_id,
                "usage": usage,
                **({"tool_calls": _message(completion)["tool_calls"]} if completion.tool_calls else {}),
                **({} if completion.logprobs is None else {"logprobs": _chat_logprobs(completion.logprobs)}),
            }
        )
    body = {
        "id": ("chatcmpl-" if line.url is BatchUrl.CHAT else "cmpl-") + completion.job_id,
        "object": "chat.completion" if line.url is BatchUrl.CHAT else "text_completion",
        "created": int(time.time()),
        "model": model,
        "choices": [_choice(line.url, completion)],
        "usage": usage,
    }
    response = {"status_code": 200, "request_id": completion.job_id, "body": body}
    return _json({**head, "response": response, "error": None})


def error_record(batch_id: str, number: int, custom_id: str | None, error: LamellaError) -> str:
    """Return the line of the error file for a line that brought no answer."""
    job_id = error.job_id if isinstance(error, JobError) else None
    told: dict[str, object] = {"code": error_code(error), "message": str(error), "line": number}
    if isinstance(error, BatchError) and error.param is not None:
        told["param"] = error.param
    if job_id is not None:
        told["job_id"] = job_id
    return _json({"id": record_id(batch_id, number), "custom_id": custom_id, "response": None, "error": told})


def error_code(error: LamellaError) -> str:
    """Return the machine-readable reason of an error."""
    match error:
        case BatchError(code=code) | JobFailed(code=code):
            return code
        case JobCancelled():
            return "cancelled"
        case NoWorkerError():
            return "model_not_served"
        case _:
            return "".join(f"_{c.lower()}" if c.isupper() else c for c in type(error).__name__).lstrip("_")


def _choice(url: BatchUrl, completion: Completion) -> dict[str, object]:
    logprobs = completion.logprobs
    if url is BatchUrl.CHAT:
        return {
            "index": 0,
            "message": _message(completion),
            "logprobs": None if logprobs is None else {"content": _chat_logprobs(logprobs)},
            "finish_reason": completion.finish_reason,
        }
    return {
        "index": 0,
        "text": completion.text,
        "logprobs": None if logprobs is None else _completion_logprobs(logprobs),
        "finish_reason": completion.finish_reason,
    }


def _message(completion: Completion) -> dict[str, object]:
    if not completion.tool_calls:
        return {"role": "assistant", "content": completion.text}
    calls = [call.model_dump(mode="json") for call in completion.tool_calls]
    return {"role": "assistant", "content": completion.text or None, "tool_calls": calls}


def _chat_logprobs(logprobs: tuple[TokenLogprob, ...]) -> list[dict[str, object]]:
    return [
        {
            "token": _token(each.token_id, each.text),
            "logprob": each.logprob,
            "bytes": None,
            "top_logprobs": [{"token": token, "logprob": value, "bytes": None} for token, value in _top(each)],
        }
        for each in logprobs
    ]


def _completion_logprobs(logprobs: tuple[TokenLogprob, ...]) -> dict[str, object]:
    return {
        "tokens": [_token(each.token_id, each.text) for each in logprobs],
        "token_logprobs": [each.logprob for each in logprobs],
        "top_logprobs": [dict(_top(each)) for each in logprobs],
        "text_offset": None,
    }


def _top(each: TokenLogprob) -> list[tuple[str, float]]:
    texts = each.top_texts if len(each.top_texts) == len(each.top) else (None,) * len(each.top)
    return [(_token(token_id, text), value) for (token_id, value), text in zip(each.top, texts, strict=True)]


def _token(token_id: int, text: str | None) -> str:
    """Return a token's text; its number where the worker does not tell the text."""
    return f"token_id:{token_id}" if text is None else text


def _json(record: dict[str, object]) -> str:
    return json.dumps(record, ensure_ascii=False)
