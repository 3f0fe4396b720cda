"""Talks to a gateway through litellm and writes what came as JSON, in an environment of its own, without Lamella."""

import asyncio
import json
import sys
from typing import Any

import litellm  # type: ignore[import-not-found]  # it lives elsewhere


async def streamed(given: dict[str, Any]) -> str:
    """The pieces of an asynchronous stream, joined."""
    chunks = await litellm.acompletion(stream=True, **given)
    return "".join([chunk.choices[0].delta.content or "" async for chunk in chunks])


def main(base: str, model: str) -> dict[str, Any]:
    """Ask in every way that litellm's users do."""
    given = {"model": f"openai/{model}", "api_base": base, "api_key": "none", "timeout": 40, "num_retries": 0}
    chat = {**given, "messages": [{"role": "user", "content": "Hi"}]}
    whole = litellm.completion(**chat)
    usage = {"stream_options": {"include_usage": True}}
    chunks = list(litellm.completion(stream=True, **chat, **usage))
    text = litellm.text_completion(prompt="Hi", **{**given, "model": f"text-completion-openai/{model}"})
    try:
        litellm.completion(**{**chat, "model": "openai/nobody/serves"})
        refused = "nothing"
    except litellm.NotFoundError as error:
        refused = type(error).__name__
    return {
        "whole": whole.choices[0].message.content,
        "tokens": whole.usage.total_tokens,
        "finish_reason": whole.choices[0].finish_reason,
        "streamed": "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices),
        "streamed_tokens": sum(chunk.usage.total_tokens for chunk in chunks if getattr(chunk, "usage", None)),
        "asynchronous": asyncio.run(streamed(chat)),
        "text": text.choices[0].text,
        "refused": refused,
    }


if __name__ == "__main__":
    litellm.suppress_debug_info = True
    sys.stdout.write(json.dumps(main(*sys.argv[1:])) + "\n")
