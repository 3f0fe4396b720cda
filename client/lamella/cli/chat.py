"""`lamella chat`: one answer, or a dialogue; brings its own service when none is running."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from lamella.cli import options
from lamella.cli.conversation import LAST, Conversation, chat_path
from lamella.cli.dialogue import Dialogue
from lamella.cli.follow import echo_figures, follow
from lamella.cli.jobs import read_prompt
from lamella.cli.output import echo_json
from lamella.cli.temporary_service import temporary_service
from lamella.client import Client
from lamella.errors import JobCancelled, RequestError, ServerError
from lamella.job import Job
from lamella.messages import check_model_name
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
    goes_on: Annotated[bool, typer.Option("--continue", "-c", help="Go on with the last dialogue.")] = False,
    keeps: Annotated[
        bool, typer.Option("--history/--no-history", help="Keep dialogue and input on disk, readable by you only.")
    ] = True,
    max_tokens: options.MaxTokens = None,
    temperature: options.Temperature = None,
    top_p: options.TopP = None,
    seed: options.Seed = None,
    stats: options.WithStats = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one answer as JSON, when it is whole.")] = False,
    timeout_s: options.TimeoutS = DEFAULT_WAIT_S,
    device: Annotated[
        str, typer.Option("--device", help="Where a worker started here runs: cpu, cuda:N, auto.")
    ] = "auto",
    store: options.Store = None,
    redis_url: options.RedisUrl = None,
    prefix: options.Prefix = options.DEFAULT,
) -> None:
    """Chat with a model on the terminal; without a running service, one is started for the length of the chat.

    Ctrl-C cancels the answer. Without a prompt, and on a terminal, a dialogue goes on until Ctrl-D; /help lists its
    commands.
    """
    is_dialogue = prompt is None and sys.stdin.isatty()
    text = "" if is_dialogue else read_prompt(prompt)
    if not is_dialogue and not text:
        raise RequestError("the prompt is empty; give at least one character")
    if is_dialogue and as_json:
        raise RequestError("--json is for one answer; give a prompt, or pass it through a pipe")
    request = options.sampling_options(max_tokens=max_tokens, temperature=temperature, top_p=top_p, seed=seed)
    conversation = Conversation.load(chat_path(LAST)) if goes_on else Conversation()
    conversation.system = system or conversation.system
    asked_model = model or conversation.model
    with _service(redis_url, prefix, asked_model, device=device, store=store) as (client, served_model):
        conversation.model = served_model
        if not is_dialogue:
            request["messages"] = conversation.asking(text)
            request["model"] = served_model
            _answer(client, request, timeout_s, stats=stats, as_json=as_json)
            return
        dialogue = Dialogue(client, conversation, request, timeout_s, stats=stats, keeps=keeps)
        dialogue.show_last()
        dialogue.run()


def _answer(client: Client, request: SubmitOptions, timeout_s: float, *, stats: bool, as_json: bool) -> None:
    """Ask once, and write the answer as it comes, or as JSON when it is whole."""
    job = client.submit(**request)
    if as_json:
        echo_json(_whole_answer(job, timeout_s))
        return
    done = follow(job, after=0, timeout_s=timeout_s, cancel_on_interrupt=True).done
    if stats and done is not None:
        echo_figures(client, job, done)


def _whole_answer(job: Job, timeout_s: float) -> dict[str, object]:
    try:
        completion = job.result(timeout_s)
    except KeyboardInterrupt:
        job.cancel()
        raise JobCancelled(job.id) from None
    return {
        "job_id": job.id,
        "text": completion.text,
        "finish_reason": completion.finish_reason,
        "usage": completion.usage.model_dump(mode="json"),
    }


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
