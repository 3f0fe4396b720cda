"""What a gateway keeps on its disk: how long, for whom, and what is left after a gateway that died."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from lamella.errors import DecodeError
from lamella_gateway.batch_record import BatchRecord, End, Phase
from lamella_gateway.batch_store import KEPT_S, LOST_S, BatchStore, InputGone
from lamella_gateway.file_store import ABANDONED_S, FileStore
from lamella_gateway.owned_place import Page, new_id, owner_of, page_of

OWNER = owner_of(None)


@pytest.fixture
def files(tmp_path: Path) -> FileStore:
    return FileStore(tmp_path / "kept", 1000, 5000)


@pytest.fixture
def batches(files: FileStore) -> BatchStore:
    return BatchStore(files.root)


def keep(files: FileStore, keep_s: float = 3600.0) -> str:
    upload = files.begin(OWNER)
    upload.write(b"content")
    file = upload.finish("name", "batch", keep_s)
    upload.close()
    return file.file_id


def record(**changes: object) -> BatchRecord:
    now = int(time.time())
    given = {
        "batch_id": new_id("batch_"),
        "owner": OWNER,
        "key_id": None,
        "digest": "",
        "endpoint": "/v1/completions",
        "input_file_id": new_id("file-"),
        "completion_window": "24h",
        "metadata": None,
        "default_tokens": 16,
        "keep_s": 3600.0,
        "created_at": now,
        "expires_at": now + 86400,
    }
    return BatchRecord.model_validate({**given, **changes})


def age(path: Path, seconds: float) -> None:
    os.utime(path, (time.time() - seconds,) * 2)


def test_a_file_whose_time_is_over_is_gone_before_it_is_swept(files: FileStore) -> None:
    over, stays = keep(files, -1.0), keep(files)

    found = files.read(OWNER, over)
    files.sweep()

    assert found is None
    assert [file.file_id for file in files.page(OWNER, Page(10), None)[0]] == [stays]
    assert sorted(path.stem for path in (files.root / OWNER / "files").glob("file-*")) == [stays, stays]


def test_what_a_gateway_left_that_died_is_swept_when_it_is_old(files: FileStore) -> None:
    whole, upload = keep(files), files.begin(OWNER)
    upload.write(b"half")
    place = files.root / OWNER / "files"
    (orphan := place / f"{new_id('file-')}.data").write_bytes(b"its record was never written")
    (part,) = place.glob("*.part")

    files.sweep()
    young = part.exists() and orphan.exists()
    for path in (part, orphan):
        age(path, ABANDONED_S + 1)
    files.sweep()

    assert young
    assert sorted(path.name for path in place.glob("file-*")) == [f"{whole}.data", f"{whole}.json"]
    upload.close()


def test_files_are_for_the_gateways_user_alone(files: FileStore) -> None:
    keep(files)

    assert files.root.stat().st_mode & 0o077 == 0


def test_an_output_is_adopted_once_whatever_is_repeated(files: FileStore, tmp_path: Path) -> None:
    (source := tmp_path / "out").write_text("answers\n")
    (empty := tmp_path / "none").touch()
    file_id = new_id("file-")
    keep(files)

    adopted = [files.adopt(OWNER, file_id, source, "out.jsonl", 3600.0) for _ in range(2)]

    assert (adopted, files.adopt(OWNER, new_id("file-"), empty, "e", 3600.0)) == ([True, True], False)
    assert files.data(OWNER, file_id).read_text() == "answers\n"
    assert not source.exists()


def test_a_batch_is_locked_by_one_and_free_when_that_one_is_gone(batches: BatchStore, files: FileStore) -> None:
    made = record()
    batches.create(made, files.data(OWNER, keep(files)))

    first = batches.lock(OWNER, made.batch_id)
    second = batches.lock(OWNER, made.batch_id)
    assert first is not None
    first.close()
    third = batches.lock(OWNER, made.batch_id)

    assert second is None
    assert third is not None
    third.close()
    assert batches.active() == [(OWNER, made.batch_id)]


def test_a_batch_without_its_input_is_not_made(batches: BatchStore, files: FileStore) -> None:
    with pytest.raises(InputGone):
        batches.create(record(), files.data(OWNER, new_id("file-")))

    assert batches.active() == []
    assert batches.page(OWNER, Page(10)) == ([], False)


def test_batches_that_ended_long_ago_are_forgotten(batches: BatchStore, files: FileStore) -> None:
    source = files.data(OWNER, keep(files))
    ended = {"phase": Phase.ENDED, "ends_as": End.CANCELLED}
    old = record(**ended, ended_at=int(time.time() - KEPT_S - 10))
    fresh, runs = record(**ended, ended_at=int(time.time())), record(created_at=1)
    for each in (old, fresh, runs):
        batches.create(each, source)
    half = batches.place(OWNER, f".{new_id('batch_')}")
    half.mkdir()
    age(half, LOST_S + 1)

    batches.sweep()

    assert {each.batch_id for each in batches.page(OWNER, Page(10))[0]} == {fresh.batch_id, runs.batch_id}
    assert not half.exists()


def test_a_record_that_cannot_be_read_is_said_so_and_left_out_of_lists(batches: BatchStore, files: FileStore) -> None:
    source = files.data(OWNER, keep(files))
    good, newer = record(), record()
    for each in (good, newer):
        batches.create(each, source)
    (batches.place(OWNER, newer.batch_id) / "batch.json").write_text('{"version": 2}')

    with pytest.raises(DecodeError, match="not of a form"):
        batches.read(OWNER, newer.batch_id)

    assert batches.page(OWNER, Page(10)) == ([good], False)


def test_later_ids_sort_behind_and_pages_go_on_after_ids_that_are_gone() -> None:
    ids = [new_id("file-") for _ in range(20)]

    assert sorted(ids) == ids
    assert page_of(ids[:5] + ids[6:], Page(3, after=ids[5])) == ids[4::-1]
    assert page_of(ids[:5] + ids[6:], Page(3, after=ids[5], newest_first=False)) == ids[6:]
