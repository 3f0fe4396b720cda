"""Key files, boxes, and jobs that are closed with them."""

from __future__ import annotations

import base64
from pathlib import Path

import pytest
from typer.testing import CliRunner

from lamella.cli.app import app
from lamella.errors import ConfigError, DecodeError, EncryptionError
from lamella.job_seal import JobSeal, Sealed, seal_request
from lamella.key_ring import KeyRing, load_key_ring, new_key_line
from lamella.messages import Done, TokenEvent, Usage

KEY, OTHER = bytes(range(32)), bytes(32)
RING = KeyRing({"a": KEY})
TOKEN = TokenEvent(token_ids=(1, 2), text="hé\0llo")


def opened_for_events(ring: KeyRing = RING, job_id: str = "job") -> JobSeal:
    seal = JobSeal(ring)
    seal.open_request(seal_request(ring, job_id, "{}"))
    return seal


def test_what_was_closed_is_opened_again_and_not_twice_the_same() -> None:
    seal = opened_for_events()

    first, second = seal.encode(1, TOKEN), seal.encode(1, TOKEN)

    assert first != second
    assert "llo" not in first
    assert (
        JobSeal(RING).open_event(1, first)
        == JobSeal(RING).open_event(1, second)
        == TOKEN.model_dump_json(exclude_none=True)
    )


def test_ends_of_jobs_stay_readable() -> None:
    done = Done(finish_reason="stop", usage=Usage(prompt_tokens=1, completion_tokens=1))

    assert opened_for_events().encode(3, done) == done.model_dump_json(exclude_none=True)


def test_a_job_that_was_asked_in_the_open_is_answered_in_the_open() -> None:
    seal = JobSeal(RING)

    assert seal.open_request('{"model":"m"}') == '{"model":"m"}'
    assert seal.encode(1, TOKEN) == TOKEN.model_dump_json(exclude_none=True)


def test_boxes_cannot_change_places_within_a_job() -> None:
    box = opened_for_events().encode(1, TOKEN)

    with pytest.raises(EncryptionError, match="altered"):
        JobSeal(RING).open_event(2, box)


def test_boxes_cannot_move_to_another_job() -> None:
    foreign = opened_for_events(job_id="theirs").encode(1, TOKEN)
    renamed = Sealed.model_validate_json(foreign).model_copy(update={"origin": "job"}).model_dump_json()

    with pytest.raises(EncryptionError, match="another job"):
        opened_for_events().open_event(1, foreign)
    with pytest.raises(EncryptionError, match="altered"):
        opened_for_events().open_event(1, renamed)


@pytest.mark.parametrize("box", ["", "AAAA", "no base64 !", base64.b64encode(bytes(40)).decode()])
def test_a_broken_box_is_told(box: str) -> None:
    stored = Sealed(key_id="a", origin="job", box=box).model_dump_json()

    with pytest.raises(EncryptionError, match="'a'"):
        JobSeal(RING).open_request(stored)


@pytest.mark.parametrize("text", ['{"type":"sealed",', '{"type":"sealed","box":1}', '{"type":"sealed","version":2}'])
def test_what_is_no_box_is_told(text: str) -> None:
    with pytest.raises(DecodeError):
        JobSeal(RING).open_request(text)


def test_a_missing_and_a_wrong_key_are_told_with_what_to_do() -> None:
    stored = seal_request(RING, "job", "{}")

    with pytest.raises(EncryptionError, match="LAMELLA_ENCRYPTION_KEYS_FILE"):
        JobSeal(None).open_request(stored)
    with pytest.raises(EncryptionError, match="Add that key"):
        JobSeal(KeyRing({"b": KEY})).open_request(stored)
    with pytest.raises(EncryptionError, match="does not open"):
        JobSeal(KeyRing({"a": OTHER})).open_request(stored)


def test_events_are_closed_with_the_key_of_the_request() -> None:
    rotated = KeyRing({"new": OTHER, "a": KEY})
    seal = JobSeal(rotated)
    seal.open_request(seal_request(RING, "job", "{}"))

    assert JobSeal(RING).open_event(1, seal.encode(1, TOKEN)) == TOKEN.model_dump_json(exclude_none=True)


def test_fingerprints_tell_nothing_without_the_key_and_know_old_keys() -> None:
    assert KeyRing({"b": OTHER}).fingerprints("x") != RING.fingerprints("x")
    assert RING.fingerprints("x")[0] in KeyRing({"b": OTHER, "a": KEY}).fingerprints("x")


def test_a_key_file_is_read_with_its_first_key_in_use(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"# new\n{new_key_line('k2')}\n\n{new_key_line('k1')}\n")

    ring = load_key_ring(tmp_path / "keys")

    assert ring is not None
    assert ring.key_id == "k2"
    assert repr(ring) == "KeyRing(k2, k1)"
    assert load_key_ring(None) is None


@pytest.mark.parametrize(
    "content",
    ["", "k1\n", "k1 c2hvcnQ=\n", "k1 ***\n", f"{'x' * 65} {base64.b64encode(KEY).decode()}\n", "a b c\n", "é x\n"],
)
def test_a_file_that_is_no_key_file_is_refused_without_its_content(tmp_path: Path, content: str) -> None:
    (tmp_path / "keys").write_text(content)

    with pytest.raises(ConfigError) as caught:
        load_key_ring(tmp_path / "keys")

    assert "lamella key ID" in str(caught.value)
    assert "c2hvcnQ" not in str(caught.value)


def test_an_id_that_is_there_twice_is_refused(tmp_path: Path) -> None:
    (tmp_path / "keys").write_text(f"{new_key_line('k')}\n{new_key_line('k')}\n")

    with pytest.raises(ConfigError, match="twice"):
        load_key_ring(tmp_path / "keys")


def test_the_command_prints_a_line_that_the_file_takes(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["key", "prod-1"])
    (tmp_path / "keys").write_text(result.output)

    assert repr(load_key_ring(tmp_path / "keys")) == "KeyRing(prod-1)"
    assert CliRunner().invoke(app, ["key", "a b"]).exit_code == 2
