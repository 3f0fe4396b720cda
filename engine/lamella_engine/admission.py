"""From a request to sequences that are sure to fit: the prompt's tokens, and what an engine refuses, with the reason.

Owns the checks at the door, in the caller's thread; `engine` submits through it, `scheduler` decides when what it made
rides. It changes nothing, so it may be called from many threads at once.
"""

from __future__ import annotations

from typing import Protocol

from lamella_engine.detokenizer import Detokenizer
from lamella_engine.embedding_job import EmbeddingJob
from lamella_engine.errors import SequenceError
from lamella_engine.family_path import FamilyPath
from lamella_engine.grammar import Grammars, GrammarWalk
from lamella_engine.kv_shape import context_tokens
from lamella_engine.options import EngineOptions
from lamella_engine.prompt_step import check_step, step_tokens
from lamella_engine.sequence import Sequence, check_samples
from lamella_engine.sequence_types import AnswerFormat, EmbeddingTerms, Sampling, SequenceRequest, ToolFormat
from lamella_engine.sweep import SweepModel
from lamella_engine.text import TextCodec
from lamella_engine.tool_format import forced_call, tool_format_of

MAX_EMBEDDING_BYTES = 3 * 2**20  # of one job's vectors; as base64 they take a third more, in one event


class Room(Protocol):
    """The memory that sequences run in."""

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence it holds alone."""


class Admission:
    """Makes the sequences of one engine.

    Args:
        model: what runs them.
        codec: its tokenizer, or None if it ships none.
        room: where they run.
        options: the engine's.
        end_ids: tokens that end a text.
    """

    def __init__(
        self, model: SweepModel, codec: TextCodec | None, room: Room, options: EngineOptions, end_ids: frozenset[int]
    ) -> None:
        self._model = model
        self._codec = codec
        self._room = room
        self._options = options
        self._end_ids = end_ids
        self._context_length = context_tokens(model.config)
        self._vocabulary = int(model.config.vocab_size)
        self._grammars = Grammars(codec, self._vocabulary, end_ids)

    def admit(self, request: SequenceRequest) -> Sequence | EmbeddingJob:
        """What rides for `request`: its first sample, with the others as its siblings; or its texts.

        Raises:
            SequenceError: it cannot run here; ``code`` says why.
        """
        return self._sequence(request) if request.embedding is None else self._texts(request, request.embedding)

    def _texts(self, request: SequenceRequest, terms: EmbeddingTerms) -> EmbeddingJob:
        """Texts are sequences that only read; the context may be full of one."""
        if self._model.path is FamilyPath.STEPWISE:
            raise SequenceError(
                "embeddings_unsupported",
                f"{self._model.sharded.name} is of a family ({self._model.family}) whose hidden states stay inside its "
                "own forward, so no embeddings can be had of it; ask a model that runs in packed sweeps",
            )
        width = int(self._model.config.hidden_size)
        most = MAX_EMBEDDING_BYTES // (4 * width)
        if not 1 <= len(terms.texts) <= most:
            raise SequenceError(
                "too_many_texts",
                f"there are {len(terms.texts)} texts; of vectors of {width} numbers one job returns 1 to {most}. "
                "Spread them over several jobs.",
            )
        room = min(self._context_length, self._room.longest)
        texts = [self._text(request.sequence_id, place, text, room) for place, text in enumerate(terms.texts)]
        return EmbeddingJob(request.sequence_id, texts, terms.pooling, is_normalised=terms.is_normalised)

    def _text(self, sequence_id: str, place: int, text: str, room: int) -> Sequence:
        request = SequenceRequest(sequence_id, prompt=text)
        try:
            ids = self._prompt_ids(request)
        except SequenceError as error:
            raise SequenceError(error.code, f"text {place}: {error}") from error
        if len(ids) > room:
            raise SequenceError(
                "prompt_too_long",
                f"text {place} has {len(ids)} tokens; {self._model.sharded.name} reads {room} at most. Shorten it.",
            )
        return Sequence(request, ids, None, self._end_ids, room + 1, place)

    def _sequence(self, request: SequenceRequest) -> Sequence:
        prompt_ids = self._prompt_ids(request)
        room = self._check_room(prompt_ids)
        check_samples(request, self._options.max_sequences)
        self._check_sampling(request.sampling)
        tool_format, answer_format = self._formats(request)
        walk = None if answer_format is None else self._grammars.walk(answer_format)
        first, *siblings = [
            self._sample(request, prompt_ids, room, index, None if walk is None else walk.copy())
            for index in range(request.num_samples)
        ]
        for sample in (first, *siblings):
            sample.tool_format = tool_format
        first.siblings = siblings
        return first

    def _sample(
        self, request: SequenceRequest, prompt_ids: list[int], room: int, index: int, walk: GrammarWalk | None
    ) -> Sequence:
        detokenizer = None
        if self._codec is not None:
            decode = self._codec.decode if request.tool_chat is None else self._codec.decode_marked
            detokenizer = Detokenizer(decode, request.sampling.stop)
        return Sequence(request, prompt_ids, detokenizer, self._end_ids, room, index, walk)

    def _formats(self, request: SequenceRequest) -> tuple[ToolFormat | None, AnswerFormat | None]:
        """How calls are written, where tools are offered; and what the answer must look like."""
        chat = request.tool_chat
        if chat is None or chat.tools is None or self._codec is None:
            return None, request.answer_format
        tool_format = tool_format_of(self._codec.chat_template(with_tools=True))
        return tool_format, forced_call(self._codec, tool_format, chat) or request.answer_format

    def _check_room(self, prompt_ids: list[int]) -> int:
        """The tokens that a sequence of this prompt may have at most."""
        room = min(self._context_length, self._room.longest)
        if self._model.reads_whole:
            check_step(len(prompt_ids), self._model, self._room, self._options, self._context_length)
            room = room if self._model.keeps_state else min(room, step_tokens(self._model, self._options))
        if len(prompt_ids) >= room:
            what = "context" if room == self._context_length else "key-value cache (engine option kv_tokens)"
            raise SequenceError(
                "prompt_too_long",
                f"the prompt has {len(prompt_ids)} tokens; the {what} of {self._model.sharded.name} holds {room}, "
                "and at least one must be left for the answer. Shorten the prompt.",
            )
        return room

    def _check_sampling(self, sampling: Sampling) -> None:
        if sampling.temperature > 0 and sampling.seed is None:
            raise SequenceError("no_seed", "a sequence with temperature > 0 needs a seed")
        if sampling.stop and self._codec is None:
            raise SequenceError("no_tokenizer", "stop strings need a tokenizer, which this model does not ship")
        self._check_tokens([token_id for token_id, _ in sampling.logit_bias or ()])

    def _prompt_ids(self, request: SequenceRequest) -> list[int]:
        if request.prompt_ids is not None:
            ids = list(request.prompt_ids)
        elif self._codec is None:
            raise SequenceError("no_tokenizer", "this model ships no tokenizer; submit token ids")
        elif request.messages is not None:
            ids = self._codec.encode_chat(request.messages)
        elif request.tool_chat is not None:
            ids = self._codec.encode_tool_chat(request.tool_chat)
        else:
            ids = self._codec.encode_prompt(request.prompt or "")
        if not ids:
            raise SequenceError("prompt_empty", "the prompt has no tokens; give at least one character of text")
        self._check_tokens([*ids, *request.generated_ids])
        return ids

    def _check_tokens(self, token_ids: list[int]) -> None:
        for token_id in token_ids:
            if not 0 <= token_id < self._vocabulary:
                raise SequenceError("bad_token", f"token id {token_id} is outside the vocabulary of {self._vocabulary}")
