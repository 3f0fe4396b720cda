"""Other clients of OpenAI's API that only had their address changed."""

from __future__ import annotations

from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from pydantic import SecretStr

from tests.client.acting_worker import MODEL
from tests.gateway.running_gateway import AnsweringWorker, RunningGateway


def langchain(gateway: RunningGateway, **options: object) -> ChatOpenAI:
    given = {"temperature": 0.5, "max_retries": 0, "timeout": 40, **options}
    return ChatOpenAI(model=MODEL, base_url=f"{gateway.url}/v1", api_key=SecretStr("none"), **given)  # type: ignore[arg-type]  # any of its options


def test_langchain_chats(gateway: RunningGateway, answering: AnsweringWorker) -> None:
    turns = [SystemMessage("Be brief."), HumanMessage("Hi"), AIMessage("Yes?"), HumanMessage("And?")]

    answer = langchain(gateway).invoke(turns)

    assert answer.text == "Hello there"
    assert answer.usage_metadata is not None
    assert answer.usage_metadata["total_tokens"] == 6
    assert answer.response_metadata["finish_reason"] == "stop"


def test_langchain_streams(gateway: RunningGateway, answering: AnsweringWorker) -> None:
    chunks = list(langchain(gateway, stream_usage=True).stream("Hi"))

    assert "".join(chunk.text for chunk in chunks) == "Hello there"
    assert sum((chunk.usage_metadata or {}).get("total_tokens", 0) for chunk in chunks) == 6


async def test_langchain_streams_asynchronously(gateway: RunningGateway, answering: AnsweringWorker) -> None:
    pieces = [chunk.text async for chunk in langchain(gateway).astream("Hi")]

    assert "".join(pieces) == "Hello there"


def test_langchain_uses_responses(gateway: RunningGateway, answering: AnsweringWorker) -> None:
    model = langchain(gateway, use_responses_api=True)

    first = model.invoke("Hi")
    chunks = list(model.stream("Hi"))

    assert first.text == "Hello there"
    assert "".join(chunk.text for chunk in chunks) == "Hello there"
