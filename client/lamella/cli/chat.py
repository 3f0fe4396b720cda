"""`lamella chat`: one answer, or a conversation; brings its own service when none is running."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Annotated

import typer

from lamella.cli import options
from lamella.cli.follow import echo_figures, follow
from lamella.cli.jobs import read_prompt
from lamella.cli.temporary_service import temporary_service
from lamella.client import Client
from lamella.errors import JobCancelled, JobError, RequestError, ServerError
from lamella.messages import ChatMessage, check_model_name
from lamella.request_draft import SubmitOptions
from lamella.server_url import DEFAULT_URL, is_named
from lamella.stream_clock import DEFAULT_WAIT_S

PROBE_TIMEOUT_S = 1.0


def chat(  # noqa: PLR0913  one argument for each option
    prompt: Annotated[
        str | None, typer.Argument(help="What to say; '-' reads stdin, nothing starts a dialogue.")
    ] = None,
    model: options.Model = None,
    system: Annotated[str | None, typer.Option("--system", help="Instructions that precede the conversation.")] = None,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    stats: options.WithStats = False,
    timeout_s: options.TimeoutS = DEFAULT_WAIT_S,
    device: Annotated[
        str, typer.Option("--device", help="Where a worker started here runs: cpu, cuda:N, auto.")
    ] = "auto",
    store: options.Store = None,
    redis_url: options.RedisUrl = None,
    prefix: options.Prefix = options.DEFAULT,
) -> None:
    """Chat with a model on the terminal; without a running service, one is started for the length of the chat.

    Ctrl-C cancels the answer. Without a prompt, and on a terminal, a dialogue goes on until Ctrl-D.
    """
    is_dialogue = prompt is None and sys.stdin.isatty()
    text = "" if is_dialogue else read_prompt(prompt)
    if not is_dialogue and not text:
        raise RequestError("the prompt is empty; give at least one character")
    request = options.sampling_options(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    with _service(redis_url, prefix, model, device=device, store=store) as (client, served_model):
        request["model"] = served_model
        conversation = _Conversation(client, request, system, timeout_s, stats)
        if is_dialogue:
            conversation.dialogue()
        else:
            conversation.answer(text)


class _Conversation:
    """The turns so far, and how the next one is asked."""

    def __init__(
        self, client: Client, request: SubmitOptions, system: str | None, timeout_s: float, with_stats: bool
    ) -> None:
        self._client = client
        self._request = request
        self._timeout_s = timeout_s
        self._with_stats = with_stats
        self._turns = [ChatMessage(role="system", content=system)] if system else []

    def answer(self, text: str) -> None:
        """Ask, and write the answer as it comes; a turn without an answer is forgotten."""
        asked = [*self._turns, ChatMessage(role="user", content=text)]
        request = self._request.copy()
        request["messages"] = asked
        job = self._client.submit(**request)
        answer, done = follow(job, after=0, timeout_s=self._timeout_s, cancel_on_interrupt=True)
        self._turns = [*asked, ChatMessage(role="assistant", content=answer)]
        if self._with_stats and done is not None:
            echo_figures(self._client, job, done)

    def dialogue(self) -> None:
        """Answer line after line until the end of input."""
        with suppress(ImportError):
            importlib.import_module("readline")  # gives `input` its line editing
        typer.echo("Ctrl-C cancels an answer, Ctrl-D ends the chat.", err=True)
        while True:
            try:
                line = input("> ")
            except (EOFError, KeyboardInterrupt):
                typer.echo("", err=True)
                return
            if not line.strip():
                continue
            try:
                self.answer(line)
            except JobCancelled:
                typer.echo("(cancelled)", err=True)
            except JobError as error:
                typer.echo(f"error: {error}", err=True)


@contextmanager
def _service(
    redis_url: str | None, prefix: str, model: str | None, *, device: str, store: str | None
) -> Iterator[tuple[Client, str | None]]:
    """Yield a client of the running service, or of one started for this chat, and the model to ask for."""
    if _is_service_there(redis_url, prefix):
        with options.open_client(redis_url, prefix) as client:
            yield client, model
        return
    if model is None:
        raise RequestError(
            "no service is running, so one is started for this chat, and it needs a model: "
            "`lamella chat --model OWNER/NAME ...`"
        )
    with temporary_service(_checked(model), device=device, store=store) as url, options.open_client(url) as client:
        yield client, model


def _is_service_there(redis_url: str | None, prefix: str) -> bool:
    """A server that was named counts as one; the default address only if a worker announces itself there."""
    if is_named(redis_url):
        return True
    try:
        with Client(DEFAULT_URL, prefix=prefix, timeout_s=PROBE_TIMEOUT_S) as client:
            return bool(client.workers())
    except ServerError:
        return False


def _checked(model: str) -> str:
    try:
        return check_model_name(model)
    except ValueError as error:
        raise RequestError(f"model {error}") from error
