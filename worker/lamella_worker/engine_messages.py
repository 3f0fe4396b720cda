"""What the worker and its engine process say to each other: frozen data, as JSON, checked on arrival.

Owns the messages and their form; `channel` carries them. Their contents are the engine's own plain types::

    worker -> engine process    Open, then Submit, Cancel, Taken, and at last Close
    engine process -> worker    Progress..., then Opened or Refused; then Answer, Sweep, Beat, and Broken where it ends
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Discriminator, Field, PlainValidator, Tag, TypeAdapter, ValidationError
from pydantic_core import to_json

from lamella_engine.sequence_types import (
    EngineCounters,
    EngineFacts,
    SequenceEmbeddings,
    SequenceFinished,
    SequencePrefill,
    SequenceRequest,
    SequenceTokens,
)
from lamella_worker.channel import ChannelBroken
from lamella_worker.config import EngineTable
from lamella_worker.engine_port import ServedModel


@dataclass(frozen=True)
class Open:
    """Open the engines; `child` counts the engine processes of this worker from 0."""

    models: tuple[ServedModel, ...]
    # Strict types take a path from JSON as text only, but the table's own check has made it one by then.
    engine: Annotated[EngineTable, PlainValidator(EngineTable.model_validate)]
    device: str
    child: int
    kind: Literal["open"] = "open"


@dataclass(frozen=True)
class Submit:
    """Take a sequence; the answer has the same `model` and `call`."""

    model: str
    call: int
    request: SequenceRequest
    kind: Literal["submit"] = "submit"


@dataclass(frozen=True)
class Cancel:
    """End a sequence at the next sweep boundary."""

    model: str
    sequence_id: str
    kind: Literal["cancel"] = "cancel"


@dataclass(frozen=True)
class Taken:
    """The events of one of the model's sweeps have been taken, so there is room for those of another."""

    model: str
    kind: Literal["taken"] = "taken"


@dataclass(frozen=True)
class Close:
    """Close the engines and end."""

    kind: Literal["close"] = "close"


@dataclass(frozen=True)
class Progress:
    """Opening goes on: bytes done and in all of one phase."""

    phase: str
    done_bytes: int
    total_bytes: int
    kind: Literal["progress"] = "progress"


@dataclass(frozen=True)
class Opened:
    """The engines are open; their facts by model."""

    facts: Mapping[str, EngineFacts]
    kind: Literal["opened"] = "opened"


@dataclass(frozen=True)
class Refused:
    """The engines cannot be opened; the process ends."""

    message: str
    is_out_of_memory: bool
    kind: Literal["refused"] = "refused"


@dataclass(frozen=True)
class Answer:
    """What became of a submit; `code` is None where the sequence was taken."""

    model: str
    call: int
    code: str | None = None
    message: str = ""
    kind: Literal["answer"] = "answer"


def _event_kind(value: object) -> str:
    names = value if isinstance(value, Mapping) else vars(value)
    if "token_ids" in names:
        return "tokens"
    if "values" in names:
        return "embeddings"
    return "prefill" if "prefilled_tokens" in names else "finished"


Event = Annotated[
    Annotated[SequenceTokens, Tag("tokens")]
    | Annotated[SequencePrefill, Tag("prefill")]
    | Annotated[SequenceEmbeddings, Tag("embeddings")]
    | Annotated[SequenceFinished, Tag("finished")],
    Discriminator(_event_kind),
]


@dataclass(frozen=True)
class Sweep:
    """What one sweep produced, and its engine's totals after it; `sweep_seconds` as in SweepEvents."""

    model: str
    events: tuple[Event, ...]
    counters: EngineCounters
    sweep_seconds: tuple[float, ...] = ()
    kind: Literal["sweep"] = "sweep"


@dataclass(frozen=True)
class Beat:
    """A sign of life of one engine; `is_stalled` says that it waits for its events to be taken."""

    model: str
    counters: EngineCounters
    is_stalled: bool
    kind: Literal["beat"] = "beat"


@dataclass(frozen=True)
class Broken:
    """An engine cannot go on in this process, which ends."""

    message: str
    kind: Literal["broken"] = "broken"


Order = Open | Submit | Cancel | Taken | Close
Report = Progress | Opened | Refused | Answer | Sweep | Beat | Broken

_ORDER: TypeAdapter[Order] = TypeAdapter(Annotated[Order, Field(discriminator="kind")])
_REPORT: TypeAdapter[Report] = TypeAdapter(Annotated[Report, Field(discriminator="kind")])


def encode(message: Order | Report) -> bytes:
    """The message as JSON; numbers that are none (infinite log-probabilities) are kept."""
    return to_json(message, inf_nan_mode="constants")


def decode_order(frame: bytes) -> Order:
    """Read what the worker says.

    Raises:
        ChannelBroken: it is no order.
    """
    try:
        return _ORDER.validate_json(frame)
    except ValidationError as error:
        raise ChannelBroken(f"not an order: {error.errors(include_input=False)[0]['msg']}") from error


def decode_report(frame: bytes) -> Report:
    """Read what the engine process says.

    Raises:
        ChannelBroken: it is no report.
    """
    try:
        return _REPORT.validate_json(frame)
    except ValidationError as error:
        raise ChannelBroken(f"not a report: {error.errors(include_input=False)[0]['msg']}") from error


def plain(text: str) -> str:
    """`text` with whatever UTF-8 cannot say replaced; error messages may quote file names that are not text."""
    return text.encode("utf-8", "replace").decode()
