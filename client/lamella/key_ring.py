"""The keys under which prompts and answers lie encrypted in Redis, and the boxes they are put into.

Owns the key file, AES-256-GCM, and the derivation of one key a job, so that neither the number of boxes under one key
nor the order of a job's events can become a weakness. Knows nothing of jobs' lives; `job_seal` says what goes into a
box. Needs the package cryptography (extra ``encryption``), loaded only when a key file is.

A key file holds one key a line, ``ID KEY``: a name of letters, digits, ``_ . -``, and 32 bytes in base64. The first one
closes the boxes of new jobs, all of them open boxes, and a job's events are closed with the key of its request. To
rotate, add a new line below everywhere, then move it to the top, and take the old one away once its jobs are gone.
"""

from __future__ import annotations

import base64
import binascii
import hmac
import os
import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from lamella.errors import ConfigError, EncryptionError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

KEYS_VARIABLE = "LAMELLA_ENCRYPTION_KEYS_FILE"
KEY_BYTES = 32
NONCE_BYTES = 12
MAX_KEYS = 100
DERIVED_KEPT = 1024  # derived keys remembered, one a job
_KEY_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}", re.ASCII)


class KeyRing:
    """Encryption keys by id, the first of them in use; shows its ids and never its keys."""

    def __init__(self, keys: Mapping[str, bytes]) -> None:
        self._keys = dict(keys)
        self.key_id = next(iter(self._keys))
        self._cipher = lru_cache(maxsize=DERIVED_KEPT)(self._derive)
        self._cipher(self.key_id, "")  # finds out now whether the package is there

    def __repr__(self) -> str:
        """Show the ids."""
        return f"KeyRing({', '.join(self._keys)})"

    @property
    def key_ids(self) -> tuple[str, ...]:
        """The ids of all keys, the one in use first."""
        return tuple(self._keys)

    def close_box(self, key_id: str, origin: str, place: str, text: str) -> str:
        """Encrypt `text` for the job `origin` and its `place` in it, under a key that is here; returns base64."""
        nonce = os.urandom(NONCE_BYTES)
        sealed = self._cipher(key_id, origin).encrypt(nonce, text.encode(), place.encode())
        return base64.b64encode(nonce + sealed).decode()

    def open_box(self, key_id: str, origin: str, place: str, box: str) -> str:
        """Decrypt what `close_box` returned.

        Raises:
            EncryptionError: the key is not here, or is not the one that closed the box.
        """
        from cryptography.exceptions import InvalidTag

        if key_id not in self._keys:
            raise EncryptionError(
                f"the job is encrypted with key {key_id!r}; the keys here are {', '.join(self._keys)}. Add that key "
                "to the encryption key file"
            )
        try:
            raw = base64.b64decode(box, validate=True)
            text = self._cipher(key_id, origin).decrypt(raw[:NONCE_BYTES], raw[NONCE_BYTES:], place.encode())
            return text.decode()
        except (InvalidTag, ValueError) as error:
            raise EncryptionError(
                f"the key {key_id!r} here does not open what was encrypted with a key of that name: either it is "
                "another key, or what is stored was altered. Compare the encryption key files of client and workers"
            ) from error

    def fingerprints(self, text: str) -> tuple[str, ...]:
        """Return what stands for `text` without telling it, under each key, the one in use first."""
        return tuple(
            hmac.new(key, b"fingerprint " + text.encode(), "sha256").hexdigest() for key in self._keys.values()
        )

    def _derive(self, key_id: str, origin: str) -> AESGCM:
        try:
            from cryptography.hazmat.primitives.ciphers.aead import AESGCM
            from cryptography.hazmat.primitives.hashes import SHA256
            from cryptography.hazmat.primitives.kdf.hkdf import HKDF
        except ImportError as error:
            raise ConfigError(
                'encryption needs a package that is not installed; run `pip install "lamella[encryption]"`'
            ) from error
        derived = HKDF(algorithm=SHA256(), length=KEY_BYTES, salt=None, info=b"lamella job 1 " + origin.encode())
        return AESGCM(derived.derive(self._keys[key_id]))


def load_key_ring(path: str | Path | None, source: str = "encryption_keys_file") -> KeyRing | None:
    """Return the keys of a key file, or None where no file is named; `source` names who asked for it.

    Raises:
        ConfigError: the file cannot be read or is no key file, or the package cryptography is missing.
    """
    if path is None or not str(path):
        return None
    place = f"{source}: the key file {str(path)!r}"
    try:
        lines = Path(path).expanduser().read_text(encoding="ascii").splitlines()
    except (OSError, ValueError, RuntimeError) as error:
        why = getattr(error, "strerror", None) or "it is not text"
        raise ConfigError(f"{place} cannot be read ({why}); `lamella key ID` prints a line for one") from None
    keys: dict[str, bytes] = {}
    for number, line in enumerate(lines, start=1):
        if not line.strip() or line.startswith("#"):
            continue
        key_id, key = _parsed(line, f"{place}, line {number}")
        if key_id in keys:
            raise ConfigError(f"{place}, line {number}: the id {key_id!r} is there twice; give each key its own")
        keys[key_id] = key
    if not 1 <= len(keys) <= MAX_KEYS:
        raise ConfigError(f"{place} holds {len(keys)} keys, and must hold 1 to {MAX_KEYS}; `lamella key ID` prints one")
    return KeyRing(keys)


def new_key_line(key_id: str) -> str:
    """Return a line for a key file with a new random key.

    Raises:
        ConfigError: the id cannot be one.
    """
    if not _KEY_ID.fullmatch(key_id):
        raise ConfigError(f"{key_id!r} cannot be a key's id; use 1 to 64 letters, digits or any of _ . -")
    return f"{key_id} {base64.b64encode(os.urandom(KEY_BYTES)).decode()}"


def _parsed(line: str, place: str) -> tuple[str, bytes]:
    """Split one line; the key itself is never repeated in an error."""
    words = line.split()
    try:
        key = base64.b64decode(words[-1], validate=True)
    except (binascii.Error, ValueError):
        key = b""
    if len(words) != 2 or not _KEY_ID.fullmatch(words[0]) or len(key) != KEY_BYTES:
        raise ConfigError(
            f"{place} is not `ID KEY` with {KEY_BYTES} bytes in base64; `lamella key ID` prints such a line"
        )
    return words[0], key
