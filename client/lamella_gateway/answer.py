"""One choice's answer while it grows: text and calls of tools in order, log-probabilities, how it ended, what it cost.

Owns which of a job's text is an answer's text and which a call; `lamella.tool_calls` finds the calls. Neighbours: the
routes (which fill it), `chat_shapes`, `response_shapes` (which show it).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from lamella import Cancelled, Completion, Done, Failed, Progress, TokenEvent, TokenLogprob, Usage
from lamella.tool_calls import AnswerDelta, CallDelta, ToolCallParser


@dataclass
class TextItem:
    """A stretch of text, with the log-probabilities of its tokens."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.texts)


@dataclass
class CallItem:
    """A call of a tool; its arguments are JSON text that may be cut short."""

    call_id: str
    name: str
    pieces: list[str] = field(default_factory=list)

    @property
    def arguments(self) -> str:
        """All of them."""
        return "".join(self.pieces)


Item = TextItem | CallItem


class Added(NamedTuple):
    """What an event adds, in this order: more of the call that was open, text with its log-probabilities, new calls."""

    more: tuple[CallDelta, ...] = ()
    text: str = ""
    logprobs: tuple[TokenLogprob, ...] = ()
    calls: tuple[CallDelta, ...] = ()


@dataclass
class Answer:
    """Filled by the one that follows the job.

    Attributes:
        job_id: what the ids of calls are made from.
        one_call: whether only the first call is told.
        items: what came, in order.
        has_begun: whether a token has come, be it without text.
        stop_reason: how its tokens ended, whatever they were.
    """

    job_id: str
    one_call: bool = False
    items: list[Item] = field(default_factory=list)
    usage: Usage = field(default_factory=lambda: Usage(prompt_tokens=0, completion_tokens=0))
    has_begun: bool = False
    stop_reason: Literal["stop", "length"] = "stop"
    _parser: ToolCallParser | None = None
    _calls: list[CallItem] = field(default_factory=list)
    _untold: list[TokenLogprob] = field(default_factory=list)  # of tokens that may be text or a call

    @classmethod
    def of(cls, completion: Completion, *, one_call: bool = False) -> Answer:
        """Return a finished job's answer; with calls, whose tokens are not told apart, without log-probabilities."""
        calls = completion.tool_calls[:1] if one_call else completion.tool_calls
        told = () if completion.tool_calls else completion.logprobs or ()
        made = cls(completion.job_id, one_call, usage=completion.usage, has_begun=bool(completion.token_ids))
        made.stop_reason = "length" if completion.finish_reason == "length" else "stop"
        if completion.text or told:
            made.items.append(TextItem([completion.text], list(told)))
        made._calls = [CallItem(call.id, call.function.name, [call.function.arguments]) for call in calls]
        made.items += made._calls
        return made

    @property
    def text(self) -> str:
        """All text, without calls."""
        return "".join(item.text for item in self.items if isinstance(item, TextItem))

    @property
    def logprobs(self) -> list[TokenLogprob]:
        """Log-probabilities of the text's tokens; those of calls are not told."""
        return [each for item in self.items if isinstance(item, TextItem) for each in item.logprobs]

    @property
    def calls(self) -> tuple[CallItem, ...]:
        """The calls so far."""
        return tuple(self._calls)

    @property
    def may_call(self) -> bool:
        """Whether the job has tools, as far as its events tell."""
        return self._parser is not None

    @property
    def finish_reason(self) -> Literal["stop", "length", "tool_calls"]:
        """How it ended."""
        return "tool_calls" if self.stop_reason == "stop" and self._calls else self.stop_reason

    def add(self, event: TokenEvent | Done | Failed | Cancelled | Progress) -> Added:
        """Take the next event and return what it adds."""
        match event:
            case TokenEvent(text=text, logprobs=logprobs, tool_format=tool_format):
                self.has_begun = True
                self._untold.extend(logprobs or ())
                if tool_format is not None:
                    self._parser = ToolCallParser(tool_format, self.job_id)
                return self._keep(AnswerDelta(text) if self._parser is None else self._parser.push(text))
            case Done(finish_reason=reason, usage=usage):
                self.stop_reason, self.usage = reason, usage
                return self._end()
            case Failed() | Cancelled():
                return self._end()
            case Progress():
                return Added()

    def _end(self) -> Added:
        return Added() if self._parser is None else self._keep(self._parser.end(), is_end=True)

    def _keep(self, delta: AnswerDelta, *, is_end: bool = False) -> Added:
        told = [call for call in delta.calls if call.index == 0 or not self.one_call]
        more = [call for call in told if call.id is None]
        new = tuple(call for call in told if call.id is not None)
        for call in more:
            self._calls[call.index].pieces.append(call.arguments)
        if delta.text or new or is_end:
            more += self._without_arguments()
        logprobs: tuple[TokenLogprob, ...] = ()
        if delta.text or (self._untold and self._parser is None):
            logprobs = self._keep_text(delta.text)
        if delta.calls:
            self._untold.clear()
        for call in new:
            item = CallItem(call.id or "", call.name or "", [call.arguments])
            self._calls.append(item)
            self.items.append(item)
        return Added(tuple(more), delta.text, logprobs, new)

    def _without_arguments(self) -> list[CallDelta]:
        """A call that ended without arguments has an empty object of them, so that they are JSON."""
        if not self._calls or self._calls[-1].arguments:
            return []
        self._calls[-1].pieces.append("{}")
        return [CallDelta(len(self._calls) - 1, None, None, "{}")]

    def _keep_text(self, text: str) -> tuple[TokenLogprob, ...]:
        last = self.items[-1] if self.items else None
        if not isinstance(last, TextItem):
            last = TextItem()
            self.items.append(last)
        logprobs = tuple(self._untold)
        self._untold.clear()
        last.texts.append(text)
        last.logprobs.extend(logprobs)
        return logprobs
