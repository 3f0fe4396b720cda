"""A real worker behind TLS whose jobs are encrypted and soon forgotten: all of a job's life, and what is left of it."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import quote

import pytest
import redis

from lamella.acl import Role
from lamella.async_client import AsyncClient
from lamella.client import Client
from lamella.errors import EncryptionError, JobNotFound
from lamella.key_ring import new_key_line
from lamella.keys import Keys
from lamella.messages import Done, JobState, TokenEvent
from lamella_engine import ShardStore
from tests.security.certificates import Authority
from tests.security.secured_server import PASSWORDS, SecuredServer
from tests.security.secured_worker import PREFIX, SecuredWorker
from tests.security.tls_proxy import TlsProxy
from tests.waiting import wait_until

PRIVATE = "tiny-private"
PROMPT = "The unmistakable river runs"
KEEP_S = 2
KEYS = Keys(PREFIX)


@pytest.fixture(scope="module")
def key_files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Key files: `old`, `new` (rotated, the worker's), `other` with a foreign key of the same id, and `unknown`."""
    directory = tmp_path_factory.mktemp("keys")
    lines = {"old": new_key_line("k1")}
    lines["new"] = f"# since today\n{new_key_line('k2')}\n{lines['old']}"
    lines["other"] = new_key_line("k1")
    lines["unknown"] = new_key_line("k9")
    for name, text in lines.items():
        (directory / name).write_text(text + "\n")
    return {name: directory / name for name in lines}


@pytest.fixture(scope="module")
def private_worker(
    secured: SecuredServer, tiny_llama_dir: Path, key_files: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[SecuredWorker]:
    directory = tmp_path_factory.mktemp("private")
    ShardStore(directory / "store").ensure(PRIVATE, source=tiny_llama_dir)
    authority = Authority(directory, "ca")
    certificate, key = authority.sign("worker")
    with TlsProxy(secured.socket, authority.sign("server", hosts=("localhost",)), authority.file) as proxy:
        options = f"ssl_ca_certs={authority.file}&ssl_certfile={certificate}&ssl_keyfile={key}"
        environment = {
            "LAMELLA_REDIS_URL": f"rediss://lamella-worker@localhost:{proxy.port}/0?{options}",
            "LAMELLA_REDIS_PASSWORD": PASSWORDS[Role.WORKER],
            "LAMELLA_ENCRYPTION_KEYS_FILE": str(key_files["new"]),
            "LAMELLA_KEEP_S": str(KEEP_S),
        }
        worker = SecuredWorker(directory / "store", directory / "log", environment, model=PRIVATE)
        worker.start()
        try:
            worker.wait_until_served(secured.url(Role.CLIENT))
            yield worker
        finally:
            worker.stop()


def everything(server: SecuredServer, job_id: str) -> str:
    """All that the server holds of a job, as one text."""
    with server.admin() as admin:
        record = admin.hgetall(KEYS.job(job_id))
        events = admin.xrange(KEYS.stream(job_id))
        return json.dumps([record, events])


def private_client(server: SecuredServer, key_file: Path | None) -> Client:
    return Client(server.url(Role.CLIENT), prefix=PREFIX, encryption_keys_file=key_file, keep_s=KEEP_S)


def test_an_encrypted_job_is_served_and_nothing_readable_of_it_is_stored(
    secured: SecuredServer, private_worker: SecuredWorker, key_files: dict[str, Path]
) -> None:
    with private_client(secured, key_files["new"]) as client, private_client(secured, None) as open_client:
        job = client.submit(PROMPT, model=PRIVATE, max_tokens=12, ignore_eos=True, idempotency_key="private")
        stored = everything(secured, job.id)
        live = [item for item in job.stream(timeout_s=40) if item.seq is not None]
        stored += everything(secured, job.id)
        replayed = [item for item in job.stream(timeout_s=40) if item.seq is not None]
        completion = job.result(40)
        readable = open_client.generate(PROMPT, model=PRIVATE, max_tokens=12, ignore_eos=True, timeout_s=40)

    assert live == replayed
    assert isinstance(live[-1].event, Done)
    assert all(isinstance(item.event, TokenEvent) for item in live[:-1])
    assert completion.text == readable.text != ""
    assert "unmistakable" not in stored
    assert "token_ids" not in stored
    assert stored.count("sealed") >= 2
    assert PASSWORDS[Role.WORKER] not in private_worker.log()


async def test_asyncio_clients_encrypt_as_well_and_rotation_keeps_old_jobs_readable(
    secured: SecuredServer, private_worker: SecuredWorker, key_files: dict[str, Path]
) -> None:
    url = secured.url(Role.CLIENT)
    async with AsyncClient(url, prefix=PREFIX, encryption_keys_file=key_files["old"]) as before:
        job = await before.submit(PROMPT, model=PRIVATE, max_tokens=4, idempotency_key="rotated")
        text = (await job.result(40)).text
        async with AsyncClient(url, prefix=PREFIX, encryption_keys_file=key_files["new"]) as after:
            again = await after.submit(PROMPT, model=PRIVATE, max_tokens=4, idempotency_key="rotated")
            reread = (await after.job(job.id).result(40)).text

    assert again.id == job.id
    assert reread == text


def test_a_missing_or_wrong_key_is_told_and_the_job_lives_on(
    secured: SecuredServer, private_worker: SecuredWorker, key_files: dict[str, Path]
) -> None:
    with private_client(secured, key_files["new"]) as client:
        job = client.submit(PROMPT, model=PRIVATE, max_tokens=4)
        text = job.result(40).text
        with private_client(secured, None) as keyless, pytest.raises(EncryptionError, match="there is no key here"):
            keyless.job(job.id).result(40)
        with private_client(secured, key_files["unknown"]) as other, pytest.raises(EncryptionError, match="'k2'"):
            other.job(job.id).result(40)

        assert job.result(40).text == text


def test_a_worker_without_the_key_leaves_the_job_and_its_attempts(
    secured: SecuredServer, private_worker: SecuredWorker, key_files: dict[str, Path]
) -> None:
    for name, complaint in (("unknown", "'k9'"), ("other", "does not open")):
        with private_client(secured, key_files[name]) as client:
            job = client.submit(PROMPT, model=PRIVATE, max_tokens=4, require_worker=False)
            wait_until(lambda id=job.id: f"job={id} set aside" in private_worker.log())  # type: ignore[misc]  # bound
            wait_until(lambda j=job: j.status().state is JobState.QUEUED)  # type: ignore[misc]  # bound now

            assert job.status().attempts == 0
            assert complaint in private_worker.log()
            job.cancel()


def test_a_job_that_no_worker_could_open_is_refused_before_it_waits(
    secured: SecuredServer, private_worker: SecuredWorker, key_files: dict[str, Path]
) -> None:
    with private_client(secured, key_files["unknown"]) as client, pytest.raises(EncryptionError, match="k1, k2"):
        client.submit(PROMPT, model=PRIVATE)


def test_nothing_of_an_ended_job_is_left(
    secured: SecuredServer, private_worker: SecuredWorker, key_files: dict[str, Path]
) -> None:
    with private_client(secured, key_files["new"]) as client:
        done = client.submit(PROMPT, model=PRIVATE, max_tokens=2, idempotency_key="soon gone")
        done.result(40)
        too_long = client.submit("long " * 2000, model=PRIVATE, max_tokens=2)
        wait_until(lambda: too_long.status().state is JobState.FAILED)
        running = client.submit(PROMPT, model=PRIVATE, max_tokens=450, ignore_eos=True)
        next(item for item in running.stream(timeout_s=40) if item.seq is not None)
        running.cancel()
        waiting = client.submit(PROMPT, model="nobody", require_worker=False)
        waiting.cancel()
        ids = (done.id, too_long.id, running.id, waiting.id)

        wait_until(lambda: not [name for name in names(secured) if "soon gone" in name or mentions(name, ids)])
        wait_until(lambda: not {job.job_id for job in client.jobs(1000)} & set(ids))
        # The message of a job that waited for a model nobody serves holds its id until a worker takes it.
        wait_until(lambda: not mentions(contents(secured), ids[:3]))
        with pytest.raises(JobNotFound):
            done.status()


def names(server: SecuredServer) -> list[str]:
    with server.admin() as admin:
        return [str(name) for name in admin.scan_iter(count=1000)]


def contents(server: SecuredServer) -> str:
    """Every value on the server, as one text."""
    found: list[object] = []
    with server.admin() as admin:
        read = {
            "string": admin.get, "hash": admin.hgetall, "set": admin.smembers, "stream": admin.xrange,
            "zset": lambda name: admin.zrange(name, 0, -1), "list": lambda name: admin.lrange(name, 0, -1),
        }  # fmt: skip
        for name in names(server):
            if (kind := str(admin.type(name))) in read:
                try:
                    found.append(read[kind](name))
                except redis.ResponseError:
                    continue  # it expired and came back as another kind
    return repr(found)


def mentions(text: str, ids: tuple[str, ...]) -> bool:
    return any(job_id in text for job_id in ids)


@pytest.mark.skipif(sys.platform != "linux", reason="command lines are read from /proc")
def test_the_password_and_keys_show_nowhere(
    secured: SecuredServer, private_worker: SecuredWorker, key_files: dict[str, Path]
) -> None:
    secrets = [PASSWORDS[Role.WORKER], quote(PASSWORDS[Role.WORKER], safe="")]
    secrets += [line.split()[-1] for line in key_files["new"].read_text().splitlines() if not line.startswith("#")]
    shown = private_worker.log() + Path(f"/proc/{private_worker.pid}/cmdline").read_text()

    assert [secret for secret in secrets if secret in shown] == []
