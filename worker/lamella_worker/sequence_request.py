"""From a job's request, as the wire has it, to a sequence, as the engine takes it."""

from __future__ import annotations

from lamella.messages import GenerateRequest
from lamella_engine.sequence_types import Sampling, SequenceRequest


def sequence_request(sequence_id: str, request: GenerateRequest, generated_ids: tuple[int, ...]) -> SequenceRequest:
    """Return the engine's form of `request`, to go on after the tokens its stream already holds."""
    messages = None
    if request.messages is not None:
        messages = tuple((message.role, message.content) for message in request.messages)
    return SequenceRequest(
        sequence_id=sequence_id,
        sampling=Sampling(**dict(request.sampling)),
        prompt=request.prompt,
        messages=messages,
        generated_ids=generated_ids,
    )
