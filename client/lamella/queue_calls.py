"""The scripts that move the queue as a whole: a worker's slots, what may be sent, deadlines, a job's outlook.

Owns their arguments and replies, like `registry_calls` for the scripts about one job. Does no I/O. The heartbeat calls
`serve_call`, the reconciler `tend_call` and `expire_call`, a client's status `outlook_call`.
"""

from __future__ import annotations

from typing import NamedTuple

from lamella import keys as wire_keys
from lamella.keys import Keys
from lamella.script_call import ScriptCall, ScriptName, read_integer, read_items, script_call


class ServeReply(NamedTuple):
    """Answer to a serve: the slots of all live workers of the model, and how many jobs were sent to them now."""

    slots: int
    sent: int


class Outlook(NamedTuple):
    """A waiting job's prospects, estimated; seconds count from now, None is what cannot be told.

    `position` counts the jobs expected to start before it; None once the job has ended.
    """

    position: int | None
    starts_in_s: float | None
    ends_in_s: float | None
    slots: int = 0
    tokens_per_s: float = 0.0
    samples: int = 0

    @property
    def basis(self) -> str:
        """What the estimate stands on, in words."""
        if self.slots == 0:
            return "no live worker serves the model"
        if self.samples == 0:
            return f"no job of the model has ended yet, so its pace is not known; {self.slots} slots"
        return (
            f"an estimate: fair shares of what waits, {self.slots} slots, and {self.tokens_per_s:.3g} tokens/s a slot "
            f"(prompts included; mean of the latest of {self.samples} jobs)"
        )


def serve_call(keys: Keys, worker: str, model: str, slots: int) -> ScriptCall[ServeReply]:
    """Tell that a worker runs at most `slots` jobs at once (0: takes none any more), and send what may be sent."""
    args = (worker, model, slots, int(wire_keys.WORKER_TTL_S * 1000))
    return script_call(ScriptName.SERVE, keys, (keys.serving(model),), args, _decode_serve)


def tend_call(keys: Keys, model: str) -> ScriptCall[int]:
    """Send what may be sent of a model's jobs, also of users whose limit was raised; answers how many were."""
    return script_call(ScriptName.TEND, keys, (keys.queues,), (model,), read_integer)


def expire_call(keys: Keys, most: int) -> ScriptCall[int]:
    """End waiting jobs whose deadline has passed, `most` at a time; answers how many deadlines were looked at."""
    return script_call(ScriptName.EXPIRE, keys, (keys.deadlines,), (most,), read_integer)


def outlook_call(keys: Keys, job_id: str) -> ScriptCall[Outlook]:
    """Ask where a job stands in the queue, and when it may start and end."""
    return script_call(ScriptName.OUTLOOK, keys, (keys.job(job_id),), (job_id,), _decode_outlook)


def _decode_serve(raw: object) -> ServeReply:
    slots, sent = map(read_integer, read_items(raw, "serve", 2))
    return ServeReply(slots, sent)


def _decode_outlook(raw: object) -> Outlook:
    position, start_ms, end_ms, slots, rate, samples = map(read_integer, read_items(raw, "outlook", 6))
    where = position if position >= 0 else None
    return Outlook(where, _seconds(start_ms), _seconds(end_ms), slots, rate / 1000, samples)


def _seconds(milliseconds: int) -> float | None:
    return milliseconds / 1000 if milliseconds >= 0 else None
