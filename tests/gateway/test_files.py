"""Files over HTTP, with OpenAI's own SDK as the client: whole or not at all, each key's own, and bounded."""

from __future__ import annotations

import http.client
import json
import socket
from collections.abc import Callable, Iterator
from pathlib import Path

import openai
import pytest

from lamella.embedded import EmbeddedServer
from tests.gateway.conftest import MakeKey
from tests.gateway.running_gateway import RunningGateway
from tests.waiting import wait_until

CONTENT = b'{"custom_id": "a"}\n'


@pytest.fixture(scope="module")
def refusing(session_server: EmbeddedServer) -> Iterator[RunningGateway]:
    """A gateway for requests that leave nothing behind."""
    with RunningGateway(session_server.url) as gateway:
        yield gateway


@pytest.fixture(scope="module")
def refused(refusing: RunningGateway) -> Iterator[openai.OpenAI]:
    """The SDK's client of `refusing`."""
    with refusing.client() as client:
        yield client


def kept(root: Path) -> list[str]:
    """What lies on the gateway's disk, but for locks."""
    return sorted(path.name for path in root.rglob("*") if path.is_file() and path.name != "lock")


def upload(sdk: openai.OpenAI, content: bytes = CONTENT, name: str = "in.jsonl") -> str:
    return sdk.files.create(file=(name, content), purpose="batch").id


def post_form(gateway: RunningGateway, body: bytes, kind: str = "multipart/form-data; boundary=x") -> tuple[int, str]:
    connection = http.client.HTTPConnection(gateway.url.removeprefix("http://"), timeout=40)
    connection.request("POST", "/v1/files", body, {"Content-Type": kind})
    answer = connection.getresponse()
    said = answer.read().decode()
    connection.close()
    return answer.status, said


def part(name: str, value: str, *, end: str = "") -> bytes:
    return f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n{end}'.encode()


def test_a_file_is_uploaded_told_listed_read_and_deleted(sdk: openai.OpenAI, gateway: RunningGateway) -> None:
    content = bytes(range(256)) * 20_000

    made = sdk.files.create(file=("in.jsonl", content), purpose="batch")
    told = sdk.files.retrieve(made.id)
    read = sdk.files.content(made.id).read()
    listed = sdk.files.list().data
    gone = sdk.files.delete(made.id)

    assert (made.bytes, made.filename, made.purpose, made.status) == (len(content), "in.jsonl", "batch", "processed")
    assert told == made
    assert read == content
    assert listed == [made]
    assert (gone.deleted, gone.id) == (True, made.id)
    with pytest.raises(openai.NotFoundError, match="there is no file"):
        sdk.files.content(made.id)
    assert kept(gateway.settings.files_root) == []


async def test_the_async_client_does_the_same(gateway: RunningGateway) -> None:
    async with openai.AsyncOpenAI(base_url=f"{gateway.url}/v1", api_key="none", timeout=40) as sdk:
        made = await sdk.files.create(
            file=("a.jsonl", CONTENT), purpose="batch", expires_after={"anchor": "created_at", "seconds": 7200}
        )
        read = await sdk.files.content(made.id)
        listed = [file.id async for file in sdk.files.list(limit=1)]

    assert read.content == CONTENT
    assert listed == [made.id]
    assert made.expires_at == made.created_at + 7200


@pytest.mark.parametrize(
    ("fields", "param", "said"),
    [
        ({"purpose": "fine-tune"}, "purpose", "use batch"),
        ({"purpose": "batch", "expires_after": {"anchor": "created_at", "seconds": 5}}, "seconds", "3600"),
        ({"purpose": "batch", "expires_after": {"anchor": "now", "seconds": 7200}}, "anchor", "created_at"),
        ({"purpose": "batch", "extra_body": {"colour": "red"}}, "colour", "unknown field"),
    ],
    ids=["purpose", "seconds", "anchor", "unknown"],
)
def test_what_cannot_be_is_refused_by_field(
    refused: openai.OpenAI, refusing: RunningGateway, fields: dict[str, object], param: str, said: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=said) as caught:
        refused.files.create(file=("a", CONTENT), **fields)  # type: ignore[arg-type]  # wrong on purpose

    assert param in str(caught.value.param)
    assert kept(refusing.settings.files_root) == []


@pytest.mark.parametrize(
    ("body", "status", "said"),
    [
        (part("purpose", "batch", end="--x--\r\n"), 400, "'file' is missing"),
        (part("file", "abc", end="--x--\r\n"), 400, "'purpose' is missing"),
        (part("purpose", "batch") + part("file", "abc"), 400, "before its closing boundary"),
        (part("file", "a") + part("file", "b", end="--x--\r\n"), 400, "more than one file"),
        (part("purpose", "batch") + part("purpose", "batch", end="--x--\r\n"), 400, "given twice"),
        (part("purpose", "b" * 5000, end="--x--\r\n"), 400, "more than 1000 bytes"),
        (b"--x\r\nnonsense\r\n\r\n", 400, "cannot be read"),
        (b"--x\r\nContent-Disposition: attachment\r\n\r\na\r\n--x--\r\n", 400, "has no name"),
        (b"", 400, "cannot be read"),
    ],
    ids=["no-file", "no-purpose", "cut", "two-files", "twice", "long", "header", "nameless", "empty"],
)
def test_a_form_that_cannot_be_read_leaves_nothing(
    refusing: RunningGateway, body: bytes, status: int, said: str
) -> None:
    answered, text = post_form(refusing, body)

    assert (answered, said in json.loads(text)["error"]["message"]) == (status, True)
    assert kept(refusing.settings.files_root) == []


def test_what_is_no_form_is_told_so(refusing: RunningGateway) -> None:
    answered, text = post_form(refusing, b"{}", "application/json")

    assert (answered, json.loads(text)["error"]["code"]) == (415, "not_a_form")


def test_an_upload_that_breaks_off_leaves_nothing(gateway: RunningGateway) -> None:
    host, port = gateway.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=40) as connection:
        head = "POST /v1/files HTTP/1.1\r\nHost: localhost\r\nContent-Type: multipart/form-data; boundary=x\r\n"
        connection.sendall(f"{head}Content-Length: 9999999\r\n\r\n".encode() + part("file", "a" * 100_000))
        wait_until(lambda: any(name.endswith(".part") for name in kept(gateway.settings.files_root)))

    wait_until(lambda: kept(gateway.settings.files_root) == [])


NAMES = ["../../../etc/passwd", "/etc/passwd", "a\x00b.jsonl", "..", "x" * 2000, "ü\n\r.jsonl"]
IDS = ["file-", "file-../x", "../../etc/passwd", "file-" + "g" * 24, "lock", "%2e%2e"]


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_name_is_shown_and_is_no_path(sdk: openai.OpenAI, gateway: RunningGateway, name: str) -> None:
    made = sdk.files.create(file=(name, CONTENT), purpose="batch")

    assert made.filename.isprintable()
    assert len(made.filename) <= 255
    assert kept(gateway.settings.files_root) == [f"{made.id}.data", f"{made.id}.json"]
    assert sdk.files.content(made.id).read() == CONTENT


@pytest.mark.parametrize("given", IDS, ids=range(len(IDS)))
def test_an_id_that_cannot_be_one_finds_nothing(refused: openai.OpenAI, given: str) -> None:
    with pytest.raises(openai.NotFoundError):
        refused.files.retrieve(given)


def test_a_list_comes_in_pages_in_both_orders(sdk: openai.OpenAI) -> None:
    ids = [upload(sdk) for _ in range(5)]

    first = sdk.files.list(limit=2)
    rest = sdk.files.list(limit=3, after=first.data[-1].id)
    oldest = sdk.files.list(limit=2, order="asc")

    assert [file.id for file in first.data] == ids[:2:-1]
    assert (first.has_more, rest.has_more) == (True, False)
    assert [file.id for file in rest.data] == ids[2::-1]
    assert [file.id for file in oldest.data] == ids[:2]
    assert [file.id for file in sdk.files.list(limit=1)] == ids[::-1]
    assert sdk.files.list(purpose="batch_output").data == []
    assert len(sdk.files.list(purpose="batch").data) == 5


@pytest.mark.parametrize("query", [{"limit": 0}, {"after": "x"}, {"order": "up"}, {"purpose": "x"}])
def test_a_page_that_cannot_be_is_refused(refused: openai.OpenAI, query: dict[str, object]) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        refused.files.list(**query)  # type: ignore[arg-type]  # wrong on purpose

    assert caught.value.param == next(iter(query))


def test_a_file_and_all_of_a_keys_files_are_bounded(embedded_server: EmbeddedServer, new_key: MakeKey) -> None:
    with (
        RunningGateway(embedded_server.url, requires_key=True, max_file_bytes=3000, max_storage_bytes=6000) as gateway,
        gateway.client(new_key("ada")) as ada,
        gateway.client(new_key("eve")) as eve,
    ):
        with pytest.raises(openai.APIStatusError, match="larger than 3000") as too_large:
            upload(ada, b"x" * 3001)
        first = upload(ada, b"x" * 2800)
        upload(ada, b"x" * 2700)
        with pytest.raises(openai.APIStatusError, match="delete some") as full:
            upload(ada, b"x" * 1000)
        upload(eve, b"x" * 3000)
        ada.files.delete(first)
        upload(ada, b"x" * 1000)

    assert (too_large.value.status_code, too_large.value.code) == (413, "file_too_large")
    assert (full.value.status_code, full.value.code) == (413, "storage_full")


def test_a_key_sees_its_own_files_only(guarded: RunningGateway, new_key: MakeKey) -> None:
    with guarded.client(new_key("ada")) as ada, guarded.client(new_key("ada")) as other:
        made = upload(ada)
        tries: list[Callable[[str], object]] = [other.files.retrieve, other.files.content, other.files.delete]
        for attempt in tries:
            with pytest.raises(openai.NotFoundError):
                attempt(made)

        assert other.files.list().data == []
        assert [file.id for file in ada.files.list()] == [made]


def test_a_key_needs_the_endpoint(guarded: RunningGateway, new_key: MakeKey) -> None:
    with guarded.client(new_key("eve", endpoints=("chat",))) as eve:
        with pytest.raises(openai.PermissionDeniedError):
            upload(eve)
        with pytest.raises(openai.PermissionDeniedError):
            eve.batches.list()


def test_a_disk_that_cannot_be_written_is_said_so(embedded_server: EmbeddedServer, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file where the directory should be")

    with (
        RunningGateway(embedded_server.url, files_dir=tmp_path / "taken") as gateway,
        gateway.client() as sdk,
        pytest.raises(openai.InternalServerError, match="cannot keep files now") as caught,
    ):
        upload(sdk)

    assert (caught.value.status_code, caught.value.code) == (503, "storage_unavailable")
