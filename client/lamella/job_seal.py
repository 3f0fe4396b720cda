"""What of a job is encrypted, and how it looks in Redis: the request, every token event and the vectors; nothing else.

Owns the sealed form and where it is taken apart. Ends of jobs (Done, Failed, Cancelled), counts and times stay
readable, because the registry's scripts and every listing need them. Each box is tied to the job it was made for
(`origin`, which a retried job keeps) and to its place in it, so that boxes can be neither exchanged within the job nor
moved between jobs. Neighbours: `key_ring` (keys), `registry_calls` (which stores the text), `stream_order` and the
worker's session (which read it).
"""

from __future__ import annotations

from typing import Literal

from pydantic import ValidationError

from lamella.errors import DecodeError, EncryptionError
from lamella.key_ring import KEYS_VARIABLE, KeyRing
from lamella.messages import Cancelled, Done, Failed, JobEvent, Wire
from lamella.registry_calls import encode_event

_START = '{"type":"sealed",'
_REQUEST = "request"


class Sealed(Wire):
    """A box as it is stored: which key closed it, which job it was made for, and nonce and ciphertext in base64."""

    type: Literal["sealed"] = "sealed"
    version: Literal[1] = 1
    key_id: str
    origin: str
    box: str


class JobSeal:
    """Closes and opens the boxes of one job; a job whose request is readable stays readable.

    Args:
        ring: the keys, or None where there are none.
    """

    def __init__(self, ring: KeyRing | None) -> None:
        self._ring = ring
        self._origin: str | None = None
        self._key_id = ""  # of the request; whoever asked can read the answer, whatever key is new

    def open_request(self, stored: str) -> str:
        """Return a stored request's JSON, decrypted if need be; the job's events will be closed as it was.

        Raises:
            EncryptionError: the key is missing or another one.
            DecodeError: it is no box this version reads.
        """
        return self._open(stored, _REQUEST)

    def open_event(self, seq: int, stored: str) -> str:
        """Return the JSON of the stored or published event `seq`, decrypted if need be; raises as `open_request`."""
        return self._open(stored, f"event {seq}")

    def encode(self, seq: int, event: JobEvent) -> str:
        """Return what is stored for the event `seq`: tokens and vectors in a box if the request was in one."""
        text = encode_event(event)
        if self._origin is None or self._ring is None or isinstance(event, Done | Failed | Cancelled):
            return text
        return _sealed(self._ring, self._key_id, self._origin, f"event {seq}", text)

    def _open(self, stored: str, place: str) -> str:
        if not stored.startswith(_START):
            return stored
        try:
            sealed = Sealed.model_validate_json(stored)
        except ValidationError as error:
            raise DecodeError(f"the {place} of the job is no box that this version opens") from error
        if self._ring is None:
            raise EncryptionError(
                f"the job is encrypted with key {sealed.key_id!r}, and there is no key here; name the encryption key "
                f"file with {KEYS_VARIABLE}, Client(encryption_keys_file=...) or, for a worker, "
                "[security] encryption_keys_file"
            )
        if self._origin is None:
            self._origin, self._key_id = sealed.origin, sealed.key_id
        if sealed.origin != self._origin:
            raise EncryptionError(f"the {place} of the job was made for another job; what is stored was altered")
        return self._ring.open_box(sealed.key_id, sealed.origin, place, sealed.box)


def seal_request(ring: KeyRing, job_id: str, request_json: str) -> str:
    """Return what is stored for a request whose job is to be encrypted."""
    return _sealed(ring, ring.key_id, job_id, _REQUEST, request_json)


def _sealed(ring: KeyRing, key_id: str, origin: str, place: str, text: str) -> str:
    box = ring.close_box(key_id, origin, place, text)
    return Sealed(key_id=key_id, origin=origin, box=box).model_dump_json()
