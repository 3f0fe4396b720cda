"""One live sequence: its tokens, how far it has been computed, and when it ends.

Changed by the sweep thread only. A resumed sequence replays the tokens of its earlier life, so that its text pieces,
penalties and random draws continue as if nothing had happened.
"""

from __future__ import annotations

import time

import torch

from lamella_engine.detokenizer import Detokenizer
from lamella_engine.packing import Span
from lamella_engine.sampler import Choice, Draw
from lamella_engine.sequence_types import FinishReason, SequenceFinished, SequenceRequest, SequenceTokens


class Sequence:
    """State of one sequence from submission to its last event.

    Attributes:
        sequence_id: the caller's name for it.
        prompt_ids, generated_ids: its tokens.
        computed: tokens whose keys and values are in the cache.
        slots: key-value slots while it is admitted, else None.
        reason: why it ended, None while it lives.
        sweeps, streamed_bytes: sweeps it rode and the weight bytes they moved.
    """

    def __init__(
        self,
        request: SequenceRequest,
        prompt_ids: list[int],
        detokenizer: Detokenizer | None,
        end_ids: frozenset[int],
        context_length: int,
    ) -> None:
        self.sequence_id = request.sequence_id
        self.sampling = request.sampling
        self.prompt_ids = prompt_ids
        self.generated_ids: list[int] = []
        self.computed = 0
        self.slots: torch.Tensor | None = None
        self.reason: FinishReason | None = None
        self.sweeps = 0
        self.streamed_bytes = 0
        self._detokenizer = detokenizer
        self._end_ids = frozenset(request.sampling.stop_token_ids)
        if not request.sampling.ignore_eos:
            self._end_ids |= end_ids
        self._limit = min(len(prompt_ids) + request.sampling.max_tokens, context_length)
        self._began = time.monotonic()
        for token_id in request.generated_ids:
            self._append(token_id)

    @property
    def max_length(self) -> int:
        """Tokens it can have at most, prompt included."""
        return self._limit

    @property
    def length(self) -> int:
        """Tokens it has now, prompt included."""
        return len(self.prompt_ids) + len(self.generated_ids)

    @property
    def pending(self) -> int:
        """Tokens not computed yet: one while it decodes, more while its prompt is read."""
        return self.length - self.computed

    def span(self, count: int) -> Span:
        """Its next `count` tokens, for one sweep."""
        assert self.slots is not None, "only an admitted sequence rides"
        end = self.computed + count
        split = len(self.prompt_ids)
        tokens = (
            self.prompt_ids[self.computed : end]
            + self.generated_ids[max(self.computed - split, 0) : max(end - split, 0)]
        )
        return Span(tuple(tokens), self.computed, self.slots)

    def draw(self) -> Draw:
        """What the sampler must know to choose its next token."""
        return Draw(self.sampling, self.prompt_ids, self.generated_ids)

    def accept(self, choice: Choice) -> SequenceTokens:
        """Take the chosen token; the event that tells of it. May set `reason`."""
        position = len(self.generated_ids)
        text = self._append(choice.token_id)
        logprobs = None if choice.logprobs is None else (choice.logprobs,)
        return SequenceTokens(self.sequence_id, position, (choice.token_id,), text, logprobs)

    def finished(self, error_code: str | None = None, error: str | None = None) -> SequenceFinished:
        """Its last event; `reason` must be set."""
        assert self.reason is not None, "only an ended sequence has a last event"
        return SequenceFinished(
            sequence_id=self.sequence_id,
            reason=self.reason,
            prompt_tokens=len(self.prompt_ids),
            completion_tokens=len(self.generated_ids),
            sweeps=self.sweeps,
            streamed_bytes=self.streamed_bytes,
            run_s=time.monotonic() - self._began,
            error_code=error_code,
            error=error,
        )

    def _append(self, token_id: int) -> str:
        """Add a generated token and return the text it shows; sets `reason` where it is the last one."""
        self.generated_ids.append(token_id)
        text, is_stopped = "", False
        if self._detokenizer is not None and token_id not in self._end_ids:
            text, is_stopped = self._detokenizer.push(token_id)
        if is_stopped or token_id in self._end_ids:
            self.reason = FinishReason.STOP
        elif self.length >= self._limit:
            self.reason = FinishReason.LENGTH
        if self.reason is not None and self._detokenizer is not None and not is_stopped:
            text += self._detokenizer.flush()
        return text
