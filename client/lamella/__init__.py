"""Lamella's client library: submit generation jobs to Redis and follow their tokens live.

Files in the order in which a request flows through them:

- `client`, `async_client`: the calls users make; `job`, `async_job`: a handle on one job
- `request_draft`, `answer_terms`, `embed_draft`: arguments checked; `mistakes`: named
- `operations`: what is exchanged with the registry, as `steps`; `tracing`: spans of submits, where they are asked for
- `pulls`, `pull_messages`, `candidates`, `stored_model`: models that a worker is asked to bring, and who has or could
  serve one
- `queue_terms`: whose a job is, how urgent, until when; `admission`: why one was refused; `limits`: what may wait
- `registry_calls`, `queue_calls`, `script_call`, ``lua/``: the scripts, also how a worker hears of a job; `keys`: every
  Redis name; `queue_counts`, `worker_state`: what waits and works, for those who show it
- `connection`, `command_packer`: pools, timeouts, retries; `server_url`: which server; `server_errors`: wording of its
  refusals
- `stream_order`, `stream_clock`, `stream`, `async_stream`: events in order, each once, through lost connections;
  `async_channels`: one subscribed connection for all streams of an asyncio client
- `wire`, `response_format`, `chat`, `embedding`, `messages`, `records`: what is sent and comes back, as types
- `call_scanner`, `call_section`, `tool_calls`: calls of tools in an answer; `completion`: a finished job's text
- `map_prompts`, `map_run`, `map_flight`, `map_closing`: many jobs at once, results in order; `map_sync`, `map_async`,
  `map_away`: how they are carried to the server; `map_meter`, `map_bar`: how far they are
- `batch_lines`, `batch_body`, `batch_form`, `batch_tasks`, `batch_order`: lines of a file as jobs; `batch_results`,
  `batch_files`: what is written, and where to go on; `batch_run`: all of it over a client
- `secret_sources`, `key_ring`, `job_seal`, `keep_time`, `acl`: passwords, encrypted jobs, what is kept, who may do what
- `errors`: everything that is raised
- `embedded`, `child_process`, `service_state`: a private server for `lamella up`
- `cli`: the ``lamella`` command

Importing this package loads neither torch nor celery; each name is loaded when it is first asked for, and with it
pydantic and redis, which take most of a command's first moments.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lamella.async_client import AsyncClient
    from lamella.async_job import AsyncJob
    from lamella.chat import FunctionCall, ToolCall
    from lamella.client import Client
    from lamella.completion import Completion
    from lamella.embedding import Embeddings
    from lamella.errors import (
        ConfigError,
        DeadlineHopeless,
        DecodeError,
        EncryptionError,
        IdempotencyConflict,
        JobCancelled,
        JobError,
        JobFailed,
        JobNotFound,
        LamellaError,
        NoWorkerError,
        QueueFull,
        RequestError,
        ServerError,
        ServerRefused,
        ServerUnreachable,
        UserLimitReached,
        WaitTimeout,
    )
    from lamella.job import Job
    from lamella.limits import Limits, UserLimits
    from lamella.map_meter import MapProgress
    from lamella.messages import (
        Cancelled,
        ChatMessage,
        Done,
        Failed,
        JobState,
        JobStatus,
        ModelInfo,
        Priority,
        Progress,
        SamplingParams,
        TokenEvent,
        TokenLogprob,
        Usage,
        WorkerInfo,
    )
    from lamella.registry_calls import CancelStatus
    from lamella.stream_order import StreamItem

__version__ = "0.1.0"

__all__ = [
    "AsyncClient",
    "AsyncJob",
    "CancelStatus",
    "Cancelled",
    "ChatMessage",
    "Client",
    "Completion",
    "ConfigError",
    "DeadlineHopeless",
    "DecodeError",
    "Done",
    "Embeddings",
    "EncryptionError",
    "Failed",
    "FunctionCall",
    "IdempotencyConflict",
    "Job",
    "JobCancelled",
    "JobError",
    "JobFailed",
    "JobNotFound",
    "JobState",
    "JobStatus",
    "LamellaError",
    "Limits",
    "MapProgress",
    "ModelInfo",
    "NoWorkerError",
    "Priority",
    "Progress",
    "QueueFull",
    "RequestError",
    "SamplingParams",
    "ServerError",
    "ServerRefused",
    "ServerUnreachable",
    "StreamItem",
    "TokenEvent",
    "TokenLogprob",
    "ToolCall",
    "Usage",
    "UserLimitReached",
    "UserLimits",
    "WaitTimeout",
    "WorkerInfo",
]

_HOMES = {
    "AsyncClient": "lamella.async_client",
    "AsyncJob": "lamella.async_job",
    "FunctionCall": "lamella.chat",
    "ToolCall": "lamella.chat",
    "Client": "lamella.client",
    "Completion": "lamella.completion",
    "Embeddings": "lamella.embedding",
    "ConfigError": "lamella.errors",
    "DeadlineHopeless": "lamella.errors",
    "DecodeError": "lamella.errors",
    "EncryptionError": "lamella.errors",
    "IdempotencyConflict": "lamella.errors",
    "JobCancelled": "lamella.errors",
    "JobError": "lamella.errors",
    "JobFailed": "lamella.errors",
    "JobNotFound": "lamella.errors",
    "LamellaError": "lamella.errors",
    "NoWorkerError": "lamella.errors",
    "QueueFull": "lamella.errors",
    "RequestError": "lamella.errors",
    "ServerError": "lamella.errors",
    "ServerRefused": "lamella.errors",
    "ServerUnreachable": "lamella.errors",
    "UserLimitReached": "lamella.errors",
    "WaitTimeout": "lamella.errors",
    "Job": "lamella.job",
    "Limits": "lamella.limits",
    "UserLimits": "lamella.limits",
    "MapProgress": "lamella.map_meter",
    "Cancelled": "lamella.messages",
    "ChatMessage": "lamella.messages",
    "Done": "lamella.messages",
    "Failed": "lamella.messages",
    "JobState": "lamella.messages",
    "JobStatus": "lamella.messages",
    "ModelInfo": "lamella.messages",
    "Priority": "lamella.messages",
    "Progress": "lamella.messages",
    "SamplingParams": "lamella.messages",
    "TokenEvent": "lamella.messages",
    "TokenLogprob": "lamella.messages",
    "Usage": "lamella.messages",
    "WorkerInfo": "lamella.messages",
    "CancelStatus": "lamella.registry_calls",
    "StreamItem": "lamella.stream_order",
}


def __getattr__(name: str) -> object:
    """The public name `name`, from the file that owns it; kept, so that this is asked once."""
    home = _HOMES.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
