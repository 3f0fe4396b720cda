"""TLS from client, worker and broker to the server, and what is said when it does not come about."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest

from lamella.acl import Role
from lamella.async_client import AsyncClient
from lamella.client import Client
from lamella.errors import ConfigError, ServerRefused, ServerUnreachable
from lamella.server_url import check_url
from lamella_worker.server_check import refuse_hopeless
from lamella_worker.worker_error import WorkerError
from tests.security.certificates import Authority
from tests.security.secured_server import PASSWORDS, SecuredServer
from tests.security.secured_worker import PREFIX
from tests.security.tls_proxy import TlsProxy


def address(
    port: int, options: str = "", host: str = "localhost", scheme: str = "rediss", role: Role = Role.CLIENT
) -> str:
    login = f"lamella-{role.value}:{quote(PASSWORDS[role], safe='')}"
    return f"{scheme}://{login}@{host}:{port}/0{options}"


def refusal(url: str) -> str:
    with (
        Client(url, prefix=PREFIX, timeout_s=20.0) as client,
        pytest.raises((ServerRefused, ServerUnreachable)) as caught,
    ):
        client.workers()
    assert PASSWORDS[Role.CLIENT] not in str(caught.value)
    return str(caught.value)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("authority"), "ca")


@pytest.fixture(scope="module")
def proxy(authority: Authority, secured: SecuredServer) -> Iterator[TlsProxy]:
    with TlsProxy(secured.socket, authority.sign("server", hosts=("localhost",))) as proxy:
        yield proxy


def test_a_client_speaks_tls_to_a_server_it_can_check(authority: Authority, proxy: TlsProxy) -> None:
    with Client(address(proxy.port, f"?ssl_ca_certs={authority.file}"), prefix=PREFIX) as client:
        assert client.jobs() is not None


async def test_an_asyncio_client_does_as_well(authority: Authority, proxy: TlsProxy) -> None:
    async with AsyncClient(address(proxy.port, f"?ssl_ca_certs={authority.file}"), prefix=PREFIX) as client:
        assert await client.jobs() is not None


def test_an_authority_that_is_not_known_is_told_and_how_to_name_it(tmp_path: Path, proxy: TlsProxy) -> None:
    other = Authority(tmp_path, "other")

    for options in ("", f"?ssl_ca_certs={other.file}"):
        said = refusal(address(proxy.port, options))

        assert "not signed by an authority that this machine trusts" in said
        assert "ssl_ca_certs=" in said


def test_a_certificate_for_another_host_is_refused(authority: Authority, proxy: TlsProxy) -> None:
    said = refusal(address(proxy.port, f"?ssl_ca_certs={authority.file}", host="127.0.0.1"))

    assert "certificate is for another host name" in said


def test_an_expired_certificate_is_refused(authority: Authority, secured: SecuredServer) -> None:
    with TlsProxy(secured.socket, authority.sign("old", hosts=("localhost",), days=-1)) as expired:
        said = refusal(address(expired.port, f"?ssl_ca_certs={authority.file}"))

    assert "has expired" in said


def test_a_plain_connection_to_a_tls_port_is_told_to_use_rediss(proxy: TlsProxy) -> None:
    assert "begin the URL with rediss://" in refusal(address(proxy.port, scheme="redis"))


def test_tls_to_a_port_without_it_is_told_to_use_redis(authority: Authority, secured: SecuredServer) -> None:
    with TlsProxy(secured.socket, None) as plain:
        said = refusal(address(plain.port, f"?ssl_ca_certs={authority.file}"))

    assert "does not speak TLS, begin the URL with redis://" in said


def test_a_client_certificate_is_shown_where_one_is_asked_for(
    authority: Authority, secured: SecuredServer, tmp_path: Path
) -> None:
    certificate, key = authority.sign("a-client")
    stranger, stranger_key = Authority(tmp_path, "strangers").sign("stranger")
    trusting = f"?ssl_ca_certs={authority.file}"
    with TlsProxy(secured.socket, authority.sign("asking", hosts=("localhost",)), authority.file) as asking:
        shown = address(asking.port, f"{trusting}&ssl_certfile={certificate}&ssl_keyfile={key}")
        with Client(shown, prefix=PREFIX) as client:
            assert client.jobs() is not None
        without = refusal(address(asking.port, trusting))
        wrong = refusal(address(asking.port, f"{trusting}&ssl_certfile={stranger}&ssl_keyfile={stranger_key}"))

    assert "asks for a client certificate" in without
    assert "does not trust the client certificate" in wrong


def test_a_worker_ends_at_once_with_what_to_do(authority: Authority, proxy: TlsProxy) -> None:
    trusting = f"?ssl_ca_certs={authority.file}"
    with pytest.raises(WorkerError, match="not signed by an authority"):
        refuse_hopeless(address(proxy.port, role=Role.WORKER), PREFIX, 20.0)
    with pytest.raises(WorkerError, match="user name or password"):
        refuse_hopeless(f"rediss://lamella-worker:no@localhost:{proxy.port}/0{trusting}", PREFIX, 20.0)
    for role, prefix in ((Role.MONITOR, PREFIX), (Role.CLIENT, PREFIX), (Role.WORKER, "another:")):
        with pytest.raises(WorkerError, match="may not do that"):
            refuse_hopeless(address(proxy.port, trusting, role=role), prefix, 20.0)


def test_a_worker_waits_for_a_server_that_is_away(caplog: pytest.LogCaptureFixture) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closing:
        port = closing.getsockname()[1]

    refuse_hopeless(f"redis://u:hush-hush@127.0.0.1:{port}/0", PREFIX, 5.0)

    assert "no answer from the server" in caplog.text
    assert "hush" not in caplog.text


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ("?ssl_ca_certs=/nowhere/ca.pem", "cannot be read"),
        ("?ssl_certfile={here}", "needs both"),
        ("?ssl_cert_reqs=maybe", "none of required"),
        ("?ssl_check_hostname=perhaps", "neither true nor false"),
    ],
)
def test_options_that_cannot_work_are_refused_before_connecting(options: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "here").write_text("")
    with pytest.raises(ConfigError, match=complaint):
        check_url("rediss://host/0" + options.format(here=tmp_path / "here"), "the URL")


def test_options_for_tls_without_tls_are_refused() -> None:
    with pytest.raises(ConfigError, match="begin it with rediss"):
        check_url("redis://host/0?ssl_cert_reqs=required", "the URL")
