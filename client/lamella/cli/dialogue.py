"""A dialogue on the terminal: questions and answers in turn, and the commands that begin with a slash.

Owns the loop and the commands; a mistake or a failed job is told, and the dialogue goes on. Neighbours: `line_input`
(what is typed), `conversation` (the turns), `follow` (an answer as it comes), `chat` (which opens it).
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass

import typer

from lamella.cli.conversation import LAST, Conversation, chat_path, chats_dir, saved_names
from lamella.cli.follow import Answer, echo_figures, follow
from lamella.cli.line_input import line_editing, read_input
from lamella.cli.output import printable
from lamella.client import Client
from lamella.errors import JobCancelled, LamellaError, RequestError
from lamella.messages import check_model_name
from lamella.request_draft import SubmitOptions, draft_request
from lamella.service_state import state_dir

SETTINGS = ("max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "repetition_penalty")
HELP = (
    ("/help", "show this"),
    ("/system [TEXT]", "show or set the instructions; '/system -' takes them away"),
    ("/model [NAME]", "show what is served, or ask another model"),
    ("/set [KEY VALUE]", f"show or set how tokens are drawn: {', '.join(SETTINGS)}; '-' for the default"),
    ("/reset", "forget the conversation, not the instructions"),
    ("/undo", "forget the last question and its answer"),
    ("/retry", "ask the last question again"),
    ("/save [NAME]", "keep the conversation under a name, or in a file if the name has a slash"),
    ("/load [NAME]", "go on with a kept conversation; without a name, list them"),
    ("/stats", "tokens and speed of this chat and of the last answer"),
    ("/quit", "end, like Ctrl-D"),
)
COMMANDS = tuple(name.split()[0] for name, _ in HELP)


@dataclass
class _Totals:
    answers: int = 0
    tokens: int = 0
    seconds: float = 0.0


class Dialogue:
    """One dialogue; changed only by its own commands.

    Args:
        client: the service.
        conversation: what was said before.
        request: options of every question.
        timeout_s: how long an answer is waited for.
        stats: print figures after each answer.
        keeps: write conversation and input history to disk.
    """

    def __init__(
        self,
        client: Client,
        conversation: Conversation,
        request: SubmitOptions,
        timeout_s: float,
        *,
        stats: bool,
        keeps: bool,
    ) -> None:
        self._client = client
        self.conversation = conversation
        self._request = request
        self._timeout_s = timeout_s
        self._with_stats = stats
        self._keeps = keeps
        self._totals = _Totals()
        self._last: Answer | None = None
        self._question: str | None = None  # the last one, also if it was cancelled
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": self._help,
            "/system": self._system,
            "/model": self._model,
            "/set": self._set,
            "/reset": self._reset,
            "/undo": self._undo,
            "/retry": self._retry,
            "/save": self._save,
            "/load": self._load,
            "/stats": self._stats,
        }

    def run(self) -> None:
        """Answer input after input until its end or /quit."""
        _say('Ctrl-C cancels an answer, Ctrl-D ends the chat, /help lists commands; """ begins several lines.')
        with line_editing(state_dir() / "chat_history" if self._keeps else None, COMMANDS):
            while True:
                try:
                    text = read_input().strip()
                except EOFError:
                    _say("")
                    return
                except KeyboardInterrupt:
                    _say("\n(Ctrl-D ends the chat)")
                    continue
                if text in ("/quit", "/exit"):
                    return
                if text:
                    self._handle(text)

    def _handle(self, text: str) -> None:
        try:
            if not text.startswith("/"):
                self._ask(text)
                return
            name, _, rest = text.partition(" ")
            command = self._commands.get(name)
            if command is None:
                known = ", ".join(COMMANDS)
                raise RequestError(f"there is no command {name[:40]!r}; there are {known}. A space before it sends it.")
            command(rest.strip())
        except JobCancelled:
            _say("(cancelled; /retry asks again)")
        except KeyboardInterrupt:
            _say("\n(interrupted)")
        except (LamellaError, OSError) as error:
            _say(f"error: {error}")

    def _ask(self, text: str) -> None:
        self._question = text
        request = self._request.copy()
        request["messages"] = self.conversation.asking(text)
        request["model"] = self.conversation.model
        job = self._client.submit(**request)
        answer = follow(job, after=0, timeout_s=self._timeout_s, cancel_on_interrupt=True)
        self.conversation.add(text, answer.text)
        self._last = answer
        self._totals.answers += 1
        self._totals.tokens += answer.tokens
        self._totals.seconds += answer.seconds
        if answer.done is not None and answer.done.finish_reason == "length":
            _say("(cut off at max_tokens; /set max_tokens N allows more)")
        if self._with_stats and answer.done is not None:
            echo_figures(self._client, job, answer.done)
        self._keep()

    def _keep(self) -> None:
        if not self._keeps:
            return
        try:
            self.conversation.save(chat_path(LAST))
        except OSError as error:
            _say(f"the conversation could not be kept: {error}")

    def _help(self, rest: str) -> None:
        for name, what in HELP:
            _say(f"{name:<18} {what}")

    def _system(self, rest: str) -> None:
        if rest:
            self.conversation.system = None if rest == "-" else rest
        _say(f"instructions: {self.conversation.system or 'none'}")

    def _model(self, rest: str) -> None:
        served = [model.name for model in self._client.models()]
        if rest:
            try:
                check_model_name(rest)
            except ValueError as error:
                raise RequestError(f"model {error}") from error
            if rest not in served:
                raise RequestError(f"no live worker serves {rest!r}; served now: {', '.join(served) or 'none'}")
            self.conversation.model = rest
        _say(
            f"model: {self.conversation.model or 'the only one that is served'}; served: {', '.join(served) or 'none'}"
        )

    def _set(self, rest: str) -> None:
        key, _, value = rest.partition(" ")
        if key:
            self._request = _changed(self._request, key, value.strip())
        given = {name: value for name, value in self._request.items() if name in SETTINGS}
        _say(", ".join(f"{name} {value}" for name, value in given.items()) or "all as the service has them")

    def _reset(self, rest: str) -> None:
        self.conversation.turns.clear()
        _say("the conversation is forgotten")

    def _undo(self, rest: str) -> None:
        question = self.conversation.take_back()
        _say("there is nothing to undo" if question is None else f"forgotten: {question[:60]}")

    def _retry(self, rest: str) -> None:
        turns = self.conversation.turns
        was_answered = bool(turns) and turns[-2].content == self._question
        question = self.conversation.take_back() if was_answered or self._question is None else self._question
        if question is None:
            raise RequestError("there is no question to ask again")
        self._ask(question)

    def _save(self, rest: str) -> None:
        path = chat_path(rest or time.strftime("chat-%Y%m%d-%H%M%S"))
        self.conversation.save(path)
        _say(f"kept in {path}")

    def _load(self, rest: str) -> None:
        if not rest:
            _say(f"kept in {chats_dir()}: {', '.join(saved_names()) or 'none'}")
            return
        self.conversation = Conversation.load(chat_path(rest))
        self._question = None
        _say(f"going on with {len(self.conversation.turns) // 2} questions")
        self.show_last()

    def show_last(self) -> None:
        """Show the last turn, so that one sees where a conversation stands."""
        for turn in self.conversation.turns[-2:]:
            _say(f"{'> ' if turn.role == 'user' else ''}{turn.content}")

    def _stats(self, rest: str) -> None:
        totals, last = self._totals, self._last
        speed = totals.tokens / totals.seconds if totals.seconds > 0 else 0.0
        _say(f"{totals.answers} answers, {totals.tokens} tokens in {totals.seconds:.1f} s, {speed:.1f} tokens/s")
        if last is not None:
            first = "" if last.first_s is None else f", the first after {last.first_s:.2f} s"
            _say(f"the last one: {last.tokens} tokens in {last.seconds:.2f} s{first}")


def _changed(request: SubmitOptions, key: str, value: str) -> SubmitOptions:
    if key not in SETTINGS:
        raise RequestError(f"there is no setting {key[:40]!r}; there are {', '.join(SETTINGS)}")
    if not value:
        raise RequestError(f"give a value: /set {key} VALUE, or '-' for the default")
    options: dict[str, object] = dict(request)
    if value == "-":
        options.pop(key, None)
    else:
        options[key] = _number(key, value)
    draft_request("checked", {name: each for name, each in options.items() if name in SETTINGS})
    changed: SubmitOptions = options  # type: ignore[assignment]  # checked above
    return changed


def _number(key: str, text: str) -> object:
    try:
        number = json.loads(text)
    except ValueError as error:
        raise RequestError(f"{key} is {text[:40]!r}; use a number") from error
    if isinstance(number, bool) or not isinstance(number, int | float) or not math.isfinite(number):
        raise RequestError(f"{key} is {text[:40]!r}; use a number")
    is_whole = key in ("max_tokens", "top_k", "seed")
    return number if is_whole or isinstance(number, float) or abs(number) > 10**6 else float(number)


def _say(text: str) -> None:
    typer.echo(printable(text), err=True)
