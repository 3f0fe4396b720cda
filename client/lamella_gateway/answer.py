"""One choice's answer while it grows: text, log-probabilities, how it ended, what it cost."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from lamella import Done, Progress, TokenEvent, TokenLogprob, Usage


@dataclass
class Answer:
    """Filled by the one that follows the job."""

    texts: list[str] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: Literal["stop", "length"] = "stop"
    usage: Usage = field(default_factory=lambda: Usage(prompt_tokens=0, completion_tokens=0))

    @property
    def text(self) -> str:
        """All of it."""
        return "".join(self.texts)

    def add(self, event: TokenEvent | Done | Progress) -> None:
        """Take the next event."""
        match event:
            case TokenEvent(text=text, logprobs=logprobs):
                self.texts.append(text)
                self.logprobs.extend(logprobs or ())
            case Done(finish_reason=reason, usage=usage):
                self.finish_reason = reason
                self.usage = usage
            case Progress():
                pass
