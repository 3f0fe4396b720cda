"""What an answer must look like: a format compiled for one model's tokens, and a sequence's way through it.

Owns everything that speaks to llguidance, which reads the formats and says which tokens may come next. The grammar of
an answer is compiled where a sequence is taken in, so that what cannot be enforced is refused there; its walk is then
changed by the sweep thread only. `sequence` takes tokens through it, `adjustments` asks it for masks.

llguidance forces bytes that leave no choice by masking all but the canonical token, so the tokens that `forced` gives
are those that drawing under the masks, one by one, would give as well.
"""

from __future__ import annotations

import json
import threading
from typing import TYPE_CHECKING

import torch

from lamella_engine.errors import SequenceError
from lamella_engine.sequence_types import AnswerFormat, FormatKind
from lamella_engine.text import TextCodec

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer
    from llguidance._lib import JsonCompileOptions

UNSUPPORTED = "response_format_unsupported"  # this worker or model has no formats
REFUSED = "bad_response_format"  # this one format cannot be enforced
STUCK = "response_format_stuck"  # the answer cannot go on in its format
MAX_REASON_CHARS = 300
MAX_LEXER_STATES = 50_000  # of one answer, 1 to 2 kB each; what people write has some hundred
# JSON as json.dumps writes it: what is not left to the model costs no sweep, and no model loses itself in spaces.
_JSON_FORM: JsonCompileOptions = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}


class Grammars:
    """Compiles formats for one model; callable from any thread.

    Args:
        codec: the model's tokenizer, or None if it ships none.
        vocabulary: tokens that the model's logits have.
        end_ids: tokens that end a text.
    """

    def __init__(self, codec: TextCodec | None, vocabulary: int, end_ids: frozenset[int]) -> None:
        self._codec = codec
        self._vocabulary = vocabulary
        self._end_ids = end_ids
        self._lock = threading.Lock()
        self._tokens: LLTokenizer | None = None
        added = [] if codec is None else codec.tokenizer.added_tokens_decoder.values()
        self._special = [str(token) for token in added if token.special]

    def walk(self, answer_format: AnswerFormat) -> GrammarWalk:
        """The beginning of a way through `answer_format`.

        Raises:
            SequenceError: the format cannot be enforced, or none can be here; with the reason.
        """
        tokens = self._read_tokens()
        from llguidance import LLMatcher, LLParserLimits

        try:
            grammar = _unforced(answer_format) if self._names_special(answer_format) else _grammar(answer_format)
        except (ValueError, RecursionError) as error:
            raise _refused(answer_format, str(error)) from error
        limits = LLParserLimits(verbose_errors=False, max_lexer_states=MAX_LEXER_STATES)
        matcher = LLMatcher(tokens, grammar, log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()  # some are found to be too large here only
        if matcher.is_error():
            raise _refused(answer_format, matcher.get_error())
        return GrammarWalk(matcher, forces=tokens.is_canonical)

    def _names_special(self, answer_format: AnswerFormat) -> bool:
        """Whether the text of a special token may be part of the answer.

        Where such text leaves no choice llguidance would force the token itself, which is not that text.
        """
        source = answer_format.source
        spellings = [source, source.replace("\\", "")]
        if answer_format.kind in (FormatKind.JSON_SCHEMA, FormatKind.CHOICE):
            spellings.append(json.dumps(json.loads(source), ensure_ascii=False))
        return any(token in spelling for token in self._special for spelling in spellings)

    def _read_tokens(self) -> LLTokenizer:
        """The tokenizer as llguidance has it, read once: a second for 50,000 tokens, when first needed."""
        if self._codec is None:
            raise SequenceError(UNSUPPORTED, "a response format needs a tokenizer, which this model does not ship")
        with self._lock:
            if self._tokens is None:
                self._tokens = _tokenizer(self._codec, self._vocabulary, self._end_ids)
            return self._tokens


class GrammarWalk:
    """How far one sequence has come in its format; used by one thread at a time."""

    def __init__(self, matcher: LLMatcher, *, forces: bool) -> None:
        self._matcher = matcher
        self._forces = forces

    def copy(self) -> GrammarWalk:
        """Another walk that goes on from here."""
        return GrammarWalk(self._matcher.deep_copy(), forces=self._forces)

    @property
    def is_complete(self) -> bool:
        """True once nothing may follow."""
        return self._matcher.is_stopped() and not self._matcher.is_error()

    def take(self, token_id: int) -> None:
        """Go on by one token.

        Raises:
            SequenceError: the format does not allow it here, or became too large to follow.
        """
        if not self._matcher.consume_token(token_id):
            raise self._stuck()

    def forced(self) -> list[int]:
        """The tokens that must come next; none where there is a choice."""
        if not self._forces:
            return []
        tokens = self._matcher.compute_ff_tokens()
        return tokens[: self._matcher.validate_tokens(tokens)] if tokens else []

    def bits(self) -> torch.Tensor:
        """A bit for each token that may come next, uint8 on the host, lowest bit first.

        Raises:
            SequenceError: the format became too large to follow.
        """
        bits = self._matcher.compute_bitmask()
        if self._matcher.is_error():
            raise self._stuck()
        return torch.frombuffer(bytearray(bits), dtype=torch.uint8)

    def _stuck(self) -> SequenceError:
        reason = self._matcher.get_error()[:MAX_REASON_CHARS] or "a token is not allowed there"
        return SequenceError(STUCK, f"the answer cannot go on in its response format: {reason}")


def _tokenizer(codec: TextCodec, vocabulary: int, end_ids: frozenset[int]) -> LLTokenizer:
    try:
        from llguidance.hf import from_tokenizer
    except ImportError as error:
        raise SequenceError(
            UNSUPPORTED, "response formats need llguidance on the worker's host: pip install 'lamella[structured]'"
        ) from error
    size = max(vocabulary, len(codec.tokenizer))
    try:
        return from_tokenizer(codec.tokenizer, n_vocab=size, eos_token=sorted(end_ids) or None)
    except (ValueError, TypeError, OSError, AttributeError) as error:
        raise SequenceError(
            UNSUPPORTED,
            f"response formats cannot be enforced with this model's tokenizer: {str(error)[:MAX_REASON_CHARS]}",
        ) from error


def _grammar(answer_format: AnswerFormat) -> str:
    """The format in llguidance's own form; raises ValueError for text that is no JSON where it must be."""
    from llguidance import LLMatcher

    source = answer_format.source
    match answer_format.kind:
        case FormatKind.JSON_OBJECT:
            return LLMatcher.grammar_from_json_schema('{"type": "object"}', defaults=_JSON_FORM)
        case FormatKind.JSON_SCHEMA:
            anything = json.loads(source) is True
            return LLMatcher.grammar_from_json_schema("{}" if anything else source, defaults=_JSON_FORM)
        case FormatKind.REGEX:
            return LLMatcher.grammar_from_regex(source)
        case FormatKind.CHOICE:
            choices = [json.dumps(choice, ensure_ascii=False) for choice in json.loads(source)]
            return LLMatcher.grammar_from_lark("start: " + " | ".join(choices))
        case FormatKind.LARK:
            return LLMatcher.grammar_from_lark(source)


def _unforced(answer_format: AnswerFormat) -> str:
    """As `_grammar`, but nothing is ever forced."""
    from llguidance import LLMatcher, regex_to_lark

    source = answer_format.source
    match answer_format.kind:
        case FormatKind.JSON_SCHEMA if source.strip().startswith("{"):
            schema: dict[str, object] = {"x-guidance": dict(_JSON_FORM)} | json.loads(source)
            lark = f"start: %json {json.dumps(schema)}"
        case FormatKind.REGEX:
            lark = f"start: /{regex_to_lark(source, '')}/"
        case FormatKind.CHOICE:
            lark = "start: " + " | ".join(json.dumps(choice, ensure_ascii=False) for choice in json.loads(source))
        case FormatKind.LARK if "%llguidance" not in source:
            lark = source
        case _:
            return _grammar(answer_format)
    return LLMatcher.grammar_from_lark(f'%llguidance {{"no_forcing": true}}\n{lark}')


def _refused(answer_format: AnswerFormat, reason: str) -> SequenceError:
    what = answer_format.kind.value
    return SequenceError(
        REFUSED,
        f"the response format ({what}) cannot be enforced: {reason[:MAX_REASON_CHARS].strip()}. Change it, or leave it "
        "out and describe it in the prompt.",
    )
