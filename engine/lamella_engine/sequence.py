"""One live sequence: its tokens, how far it has been computed, and when it ends.

Changed by the sweep thread only; the `scheduler` decides when it rides, the `engine` hands it what a sweep brought. A
resumed sequence replays the tokens of its earlier life, and a preempted one keeps its own, so that text pieces,
penalties, random draws and formats continue as if nothing had happened. Several samples of one prompt are a sequence
each. Tokens that a format leaves no choice about are appended as soon as they are known: they need no sweep of their
own but ride the next one with the token before them, as a prompt's do.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import replace
from typing import Protocol

from lamella_engine.adjustments import Draw
from lamella_engine.detokenizer import Detokenizer
from lamella_engine.errors import SequenceError
from lamella_engine.grammar import GrammarWalk
from lamella_engine.packing import Span
from lamella_engine.sampler import Choice
from lamella_engine.sequence_types import (
    FinishReason,
    Sampling,
    SequenceFinished,
    SequencePrefill,
    SequenceRequest,
    SequenceTokens,
    TokenLogprobs,
    ToolFormat,
)
from lamella_engine.stepwise import StepSpan


class Table(Protocol):
    """A sequence's place in memory: its pages in the key-value cache, or its state and the pages that stand for it."""

    def span(self, token_ids: tuple[int, ...], start: int) -> Span | StepSpan:
        """These tokens, which come behind `start` others, for one sweep."""


class Sequence:
    """State of one sequence from submission to its last event.

    Attributes:
        sequence_id: the caller's name for it; all samples of a request have the same.
        sample: which of the request's samples it is.
        siblings: samples that start once this one has read the prompt they share; they run nowhere before.
        prompt_ids, generated_ids: its tokens.
        computed: tokens whose keys and values are in the cache.
        table: its place in memory while it runs, else None.
        tool_format: how its model writes calls, where tools are offered; told with its first token.
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
        sample: int = 0,
        walk: GrammarWalk | None = None,
    ) -> None:
        self.sequence_id = request.sequence_id
        self.sample = sample
        self.siblings: list[Sequence] = []
        self.sampling = sampling_of(request.sampling, sample)
        self.prompt_ids = prompt_ids
        self.generated_ids: list[int] = []
        self.computed = 0
        self.table: Table | None = None
        self.reason: FinishReason | None = None
        self.sweeps = 0
        self.streamed_bytes = 0
        self._detokenizer = detokenizer
        self._end_ids = frozenset(request.sampling.stop_token_ids)
        if not request.sampling.ignore_eos:
            self._end_ids |= end_ids
        self._limit = min(len(prompt_ids) + request.sampling.max_tokens, context_length)
        self._told = 0  # tokens of which a prefill event told; what is computed again after a preemption is no news
        self._began = time.monotonic()
        self._walk = walk
        self.tool_format: ToolFormat | None = None
        for token_id in request.generated_ids:
            self._append(token_id)
        self._logprobs: tuple[TokenLogprobs, ...] | None = None  # of tokens not told of
        self._emitted = len(self.generated_ids)  # generated tokens of which an event told
        self._unsent = self._append_forced()  # their text

    @property
    def places(self) -> int:
        """Sequences it stands for: itself and the siblings to come."""
        return 1 + len(self.siblings)

    @property
    def length(self) -> int:
        """Tokens it has now, prompt included."""
        return len(self.prompt_ids) + len(self.generated_ids)

    @property
    def pending(self) -> int:
        """Tokens not computed yet, all of which must be before the next one is chosen."""
        return self.length - self.computed

    @property
    def first_step(self) -> int:
        """Tokens that come first where a prompt must be read in one step: all of it, and nothing that was generated."""
        return len(self.prompt_ids)

    @property
    def is_reading(self) -> bool:
        """True while some of its tokens are being read in chunks: the prompt, or all it had after a preemption."""
        return self.pending > 1

    def span(self, count: int) -> Span | StepSpan:
        """Its next `count` tokens, for one sweep."""
        assert self.table is not None, "only an admitted sequence rides"
        end = self.computed + count
        split = len(self.prompt_ids)
        tokens = (
            self.prompt_ids[self.computed : end]
            + self.generated_ids[max(self.computed - split, 0) : max(end - split, 0)]
        )
        return self.table.span(tuple(tokens), self.computed)

    def ride(self, count: int, streamed_bytes: int) -> None:
        """Take note of a sweep that computed `count` of its tokens and moved `streamed_bytes` of weights."""
        self.computed += count
        self.sweeps += 1
        self.streamed_bytes += streamed_bytes

    def prefilled(self) -> SequencePrefill | None:
        """The event that tells how far it has been read; None where an earlier one said as much."""
        if self.computed <= self._told:
            return None
        self._told = self.computed
        return SequencePrefill(self.sequence_id, self.computed, self.length)

    def draw(self) -> Draw:
        """What the sampler must know to choose its next token."""
        return Draw(self.sampling, self.prompt_ids, self.generated_ids, self._walk)

    def accept(self, choice: Choice) -> None:
        """Take the chosen token, and those that must follow. May set `reason`.

        Raises:
            SequenceError: its format cannot be followed further.
        """
        self._unsent += self._append(choice.token_id)
        self._logprobs = None if choice.logprobs is None else (self._spelled(choice.logprobs),)
        self._unsent += self._append_forced()
        self._told = self.length

    def _spelled(self, found: TokenLogprobs) -> TokenLogprobs:
        """Log-probabilities with the texts of their tokens."""
        if self._detokenizer is None:
            return found
        tops = tuple(self._detokenizer.alone(token_id) for token_id, _ in found.top)
        return replace(found, text=self._detokenizer.alone(found.token_id), top_texts=tops)

    def news(self) -> SequenceTokens | None:
        """The event that tells of its tokens that no event told of yet; None if there are none."""
        position = self._emitted
        token_ids = tuple(self.generated_ids[position:])
        if not token_ids:
            return None
        text, logprobs = self._unsent, self._logprobs
        self._emitted, self._unsent, self._logprobs = len(self.generated_ids), "", None
        tool_format = self.tool_format if position == 0 else None
        return SequenceTokens(self.sequence_id, position, token_ids, text, logprobs, self.sample, tool_format)

    def finished(
        self, reason: FinishReason, error_code: str | None = None, error: str | None = None
    ) -> SequenceFinished:
        """Its last event; it ends for that reason."""
        self.reason = reason
        return SequenceFinished(
            sequence_id=self.sequence_id,
            reason=reason,
            prompt_tokens=len(self.prompt_ids),
            completion_tokens=len(self.generated_ids),
            sweeps=self.sweeps,
            streamed_bytes=self.streamed_bytes,
            run_s=time.monotonic() - self._began,
            error_code=error_code,
            error=error,
            sample=self.sample,
        )

    def _append(self, token_id: int) -> str:
        """Add a generated token and return the text it shows; sets `reason` where it is the last one."""
        self.generated_ids.append(token_id)
        text, is_stopped, is_end = "", False, token_id in self._end_ids
        if self._detokenizer is not None and not is_end:
            text, is_stopped = self._detokenizer.push(token_id)
        if self._walk is not None and token_id not in self.sampling.stop_token_ids:
            self._walk.take(token_id)
            is_end = is_end or self._walk.is_complete
        if is_stopped or is_end:
            self.reason = FinishReason.STOP
        elif self.length >= self._limit:
            self.reason = FinishReason.LENGTH
        if self.reason is not None and self._detokenizer is not None and not is_stopped:
            text += self._detokenizer.flush()
        return text

    def _append_forced(self) -> str:
        """Add the tokens that must come next and return their text; none for one whose logits are asked for."""
        text = ""
        if self._walk is None or self.sampling.logprobs is not None:
            return text
        while self.reason is None and (forced := self._walk.forced()):
            for token_id in forced:
                if self.reason is None:
                    text += self._append(token_id)
        return text


def sampling_of(sampling: Sampling, sample: int) -> Sampling:
    """`sampling` for one sample of several: the first draws as a single one does, each other from a seed of its own."""
    if sample == 0 or sampling.seed is None:
        return sampling
    digest = hashlib.blake2b(sample.to_bytes(8, "little"), digest_size=8, key=sampling.seed.to_bytes(16, "little"))
    return replace(sampling, seed=int.from_bytes(digest.digest(), "little"))


def check_samples(request: SequenceRequest, max_sequences: int) -> None:
    """Raise SequenceError where an engine of `max_sequences` cannot run as many samples as `request` asks for."""
    if not 1 <= request.num_samples <= max_sequences:
        raise SequenceError(
            "bad_request",
            f"num_samples is {request.num_samples}; this engine runs 1 to {max_sequences} sequences side by "
            "side (engine option max_sequences), and each sample is one. Ask for fewer samples.",
        )
    if request.num_samples > 1 and request.generated_ids:
        raise SequenceError(
            "bad_request",
            "generated_ids say how one sample went on, but num_samples is "
            f"{request.num_samples}; resume samples one by one, or leave generated_ids empty",
        )
