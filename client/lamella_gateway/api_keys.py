"""API keys: what they look like, what one may do, and how they are made, listed and revoked.

A key is ``sk-lamella-<id>-<secret>``; Redis holds the SHA-256 of its secret (192 random bits, so that no slow hash is
needed), never the key. Does no I/O: operations are driven by a connection. Neighbours: `access` (checks a request's
key), `keys_cli` (makes them), ``lua/admit.lua`` (holds requests to their quotas).
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
import secrets
import time
from collections.abc import Sequence
from enum import StrEnum
from typing import NamedTuple

from pydantic import Field, ValidationError, field_validator

from lamella.errors import DecodeError, RequestError
from lamella.keys import Keys
from lamella.messages import Wire, check_model_name
from lamella.queue_terms import check_user
from lamella.steps import Operation, answers, commands

MAX_KEYS_LISTED = 10_000
_KEY = re.compile(r"sk-lamella-([0-9a-f]{12})-([0-9a-f]{48})", re.ASCII)
_ID = re.compile(r"[0-9a-f]{12}", re.ASCII)


class Endpoint(StrEnum):
    """What a key can be allowed to call; listing models is allowed with any key."""

    CHAT = "chat"
    COMPLETIONS = "completions"
    RESPONSES = "responses"
    JOBS = "jobs"
    EMBEDDINGS = "embeddings"
    BATCHES = "batches"


class ApiKey(Wire):
    """What is known of a key; None is no restriction. An admin sees workers and all jobs. Times are Unix seconds."""

    key_id: str
    name: str = Field(min_length=1, max_length=100)
    user: str
    models: tuple[str, ...] | None = None
    endpoints: tuple[Endpoint, ...] | None = None
    requests_per_minute: int | None = Field(default=None, ge=1, le=1_000_000)
    tokens_per_day: int | None = Field(default=None, ge=1, le=10**15)
    is_admin: bool = False
    created_at: float
    revoked_at: float | None = None

    @field_validator("user")
    @classmethod
    def _user(cls, value: str) -> str:
        try:
            return check_user(value)
        except RequestError as error:
            raise ValueError(str(error)) from error

    @field_validator("name")
    @classmethod
    def _name(cls, value: str) -> str:
        if not value.isprintable():
            raise ValueError("use printable characters")
        return value

    @field_validator("models")
    @classmethod
    def _models(cls, value: tuple[str, ...] | None) -> tuple[str, ...] | None:
        return None if value is None else tuple(check_model_name(name) for name in value)

    def allows_model(self, model: str) -> bool:
        """Return whether the key may use a model."""
        return self.models is None or model in self.models

    def allows(self, endpoint: Endpoint) -> bool:
        """Return whether the key may call an endpoint."""
        return self.endpoints is None or endpoint in self.endpoints


class KeyUse(NamedTuple):
    """What a key has used: since it was made, and today (reserved tokens included)."""

    requests: int
    prompt_tokens: int
    completion_tokens: int
    tokens_today: int
    last_used_at: float | None


class StoredKey(NamedTuple):
    """A key and the hash of its secret."""

    key: ApiKey
    secret_hash: str

    def is_opened_by(self, secret: str) -> bool:
        """Compare a secret in constant time."""
        return hmac.compare_digest(self.secret_hash, hash_secret(secret))


def hash_secret(secret: str) -> str:
    """Return what is stored of a secret."""
    return hashlib.sha256(secret.encode()).hexdigest()


def split_key(text: str) -> tuple[str, str] | None:
    """Return a key's id and secret, or None if the text is no key."""
    found = _KEY.fullmatch(text)
    return None if found is None else (found[1], found[2])


def make_key(name: str, user: str, **scopes: object) -> tuple[ApiKey, str]:
    """Return a new key and its secret, which is shown once; `scopes` are the restrictions of `ApiKey`.

    Raises:
        RequestError: a name or a restriction cannot be.
    """
    key_id, secret = secrets.token_hex(6), secrets.token_hex(24)
    given = {name: value for name, value in scopes.items() if value is not None}
    try:
        key = ApiKey.model_validate(
            {"key_id": key_id, "name": name, "user": user, "created_at": time.time(), **given}, strict=False
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"])
        raise RequestError(f"key {where}: {first['msg'].removeprefix('Value error, ')}") from error
    return key, secret


def shown_key(key: ApiKey, secret: str) -> str:
    """Return the key as its user gives it."""
    return f"sk-lamella-{key.key_id}-{secret}"


def store_key(keys: Keys, key: ApiKey, secret: str) -> Operation[None]:
    """Keep a new key."""
    fields: dict[str, str] = {"hash": hash_secret(secret), "user": key.user, "key": key.model_dump_json()}
    if key.requests_per_minute is not None:
        fields["requests_per_minute"] = str(key.requests_per_minute)
    if key.tokens_per_day is not None:
        fields["tokens_per_day"] = str(key.tokens_per_day)
    flat = [part for pair in fields.items() for part in pair]
    yield commands(
        ("HSET", keys.api_key(key.key_id), *flat), ("ZADD", keys.api_keys, int(key.created_at * 1000), key.key_id)
    )


def read_key(keys: Keys, key_id: str) -> Operation[StoredKey | None]:
    """Return a key by its id, None if there is none."""
    return (yield from _read(keys, [key_id]))[0]


def list_keys(keys: Keys) -> Operation[list[ApiKey]]:
    """Return all keys, oldest first."""
    raw = yield commands(("ZRANGE", keys.api_keys, 0, MAX_KEYS_LISTED - 1))
    ids = [str(key_id) for key_id in answers(answers(raw)[0])]
    found = (yield from _read(keys, ids)) if ids else []
    return [stored.key for stored in found if stored is not None]


def revoke_key(keys: Keys, key_id: str) -> Operation[ApiKey]:
    """Make a key useless at once; what it used stays known.

    Raises:
        RequestError: there is no such key.
    """
    stored = (yield from _read(keys, [key_id]))[0] if _ID.fullmatch(key_id) else None
    if stored is None:
        raise RequestError(f"there is no key {key_id[:40]!r}; `lamella keys list` shows the ids of all")
    key = stored.key
    if key.revoked_at is None:
        key = key.model_copy(update={"revoked_at": time.time()})
        yield commands(("HSET", keys.api_key(key_id), "key", key.model_dump_json()))
    return key


def read_use(keys: Keys, key_ids: Sequence[str]) -> Operation[list[KeyUse]]:
    """Return what each of the keys has used."""
    if not key_ids:
        return []
    day = int(time.time() // 86400)
    asked = [("HMGET", keys.api_use(k), *KeyUse._fields[:3], "last_used_at") for k in key_ids]
    raw = answers((yield commands(*asked, ("MGET", *(keys.api_day(key_id, day) for key_id in key_ids)))))
    *uses, today = (answers(each) for each in raw)
    return [_use(use, tokens) for use, tokens in zip(uses, today, strict=True)]


def _use(use: Sequence[object], today: object) -> KeyUse:
    requests, prompt, completion, last_used = (None if value is None else int(str(value)) for value in use)
    return KeyUse(
        requests or 0,
        prompt or 0,
        completion or 0,
        int(str(today or 0)),
        None if last_used is None else last_used / 1000,
    )


def _read(keys: Keys, key_ids: Sequence[str]) -> Operation[list[StoredKey | None]]:
    raw = yield commands(*(("HMGET", keys.api_key(key_id), "hash", "key") for key_id in key_ids))
    return [_decoded(*answers(each)[:2]) for each in answers(raw)]


def _decoded(secret_hash: object, text: object) -> StoredKey | None:
    if secret_hash is None or text is None:
        return None
    try:
        return StoredKey(ApiKey.model_validate(json.loads(str(text)), strict=False), str(secret_hash))
    except ValueError as error:
        raise DecodeError("an API key's record is not of a form this version reads") from error
