"""The worker's settings: one frozen value, read once when the process starts.

Owns the tables ``[redis]`` and ``[engine]``, their defaults, and what makes a value unusable; the table ``[worker]`` is
in `worker_table`, ``[telemetry]`` in `telemetry_config`, ``[security]`` in `security_table`. A setting comes from the
command line, else the environment (`ENVIRONMENT`), else the file, else its default; secrets never from the command
line. Opens no connection and loads no engine; `cli` reads it and hands it to everything else.
"""

from __future__ import annotations

import difflib
import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal
from urllib.parse import parse_qsl, urlsplit

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    SecretStr,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic_core import ErrorDetails

from lamella.errors import ConfigError
from lamella.keep_time import KEEP_VARIABLE
from lamella.key_ring import KEYS_VARIABLE
from lamella.keys import DEFAULT_PREFIX
from lamella.secret_sources import secret_from, with_password
from lamella.server_url import tls_complaint
from lamella_engine.errors import OptionError
from lamella_engine.peer_address import PEERS_VARIABLE, Peers, split_peers
from lamella_worker.security_table import SecurityTable
from lamella_worker.telemetry_config import TelemetryTable
from lamella_worker.worker_table import NO_MODEL, WorkerTable

DEFAULT_REDIS_URL = "redis://127.0.0.1:6379/0"
DEFAULT_STORE = "~/.cache/lamella/shards"

TABLES = ("redis", "worker", "engine", "telemetry", "security")
FLAGS = {
    "redis.url": "--redis-url",
    "redis.prefix": "--prefix",
    "worker.model": "--model",
    "worker.models": "--model",
    "worker.device": "--device",
    "worker.name": "--name",
    "worker.lease_s": "--lease-s",
    "worker.drain_s": "--drain-s",
    "worker.isolation": "--isolation",
    "engine.store": "--store",
    "engine.dtype": "--dtype",
    "engine.max_sequences": "--slots",
    "engine.vram": "--vram",
    "engine.ram": "--ram",
    "engine.offline": "--offline",
    "telemetry.metrics_port": "--metrics-port",
    "telemetry.log_format": "--log-format",
}
ENVIRONMENT = {
    "redis.url": "LAMELLA_REDIS_URL",
    "engine.store": "LAMELLA_STORE",
    "engine.peers": PEERS_VARIABLE,
    "security.keep_s": KEEP_VARIABLE,
    "security.encryption_keys_file": KEYS_VARIABLE,
}

_EITHER = {"worker.model": "models", "worker.models": "model"}  # each takes the place of the other
_BUDGET = re.compile(r"auto|\d+(\.\d+)?\s*([kmgt]?i?b|%)|\d+", re.ASCII | re.IGNORECASE)
_PREFIX = re.compile(r"[A-Za-z0-9_.:-]{1,64}", re.ASCII)


def _as_path(value: object) -> object:
    if not isinstance(value, str | Path):
        return value
    if not str(value).strip():
        raise ValueError("the path is empty")
    try:
        return Path(value).expanduser().absolute()
    except RuntimeError as error:
        raise ValueError(f"'~' cannot be expanded: {error}") from error


def _as_addresses(value: object) -> object:
    given = split_peers(value) if isinstance(value, str) else value
    if not isinstance(given, list | tuple) or not all(isinstance(each, str) for each in given):
        raise ValueError('it is not a list of addresses such as ["http://host:9530"]')
    try:
        return tuple(str(address) for address in Peers.named(given, {}).addresses)
    except OptionError as error:
        raise ValueError(str(error)) from error


def _as_budget(value: object) -> object:
    text = str(value).strip() if isinstance(value, int | str) and not isinstance(value, bool) else ""
    if not _BUDGET.fullmatch(text):
        raise ValueError('it is not an amount of memory; use bytes, "4GiB", "80%" or "auto"')
    return text


class _Table(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False, hide_input_in_errors=True)


class RedisTable(_Table):
    """Where the queue, the job records and the streams live."""

    url: SecretStr = Field(
        default=SecretStr(DEFAULT_REDIS_URL),
        description="redis://HOST:PORT/DB, rediss://... for TLS, or unix:///path/to/socket?db=0",
    )
    prefix: str = Field(
        default=DEFAULT_PREFIX,
        description="what every key starts with, the same for all clients and workers: letters, digits and _ . : -",
    )

    @field_validator("url")
    @classmethod
    def _usable_url(cls, secret: SecretStr) -> SecretStr:
        value = secret.get_secret_value()
        parts = urlsplit(value)
        if parts.scheme not in ("redis", "rediss", "unix"):
            raise ValueError(f"its scheme is {parts.scheme!r}, not redis, rediss or unix")
        if parts.scheme == "unix" and (parts.hostname or not parts.path.startswith("/") or parts.path == "/"):
            raise ValueError("it names no socket; a socket's path is absolute, so three slashes follow unix:")
        if parts.scheme != "unix":
            try:
                port, database = parts.port, parts.path.strip("/")
            except ValueError as error:
                raise ValueError(f"its port is unusable: {error}") from error
            if not parts.hostname or port == 0:
                raise ValueError("it names no host and port")
            if database and not database.isdigit():
                raise ValueError("its path is not the number of a database")
        if complaint := tls_complaint(parts.scheme, dict(parse_qsl(parts.query, keep_blank_values=True))):
            raise ValueError(f"it {complaint}")
        return secret

    @field_validator("prefix")
    @classmethod
    def _usable_prefix(cls, value: str) -> str:
        if not _PREFIX.fullmatch(value):
            raise ValueError("it must be 1 to 64 letters, digits or any of _ . : -")
        return value


class EngineTable(_Table):
    """The engine's dials; `max_sequences` is also the number of jobs taken at once."""

    store: Annotated[Path, BeforeValidator(_as_path)] = Field(
        default=Path(DEFAULT_STORE), validate_default=True, description="directory of the shard cache; ~ is expanded"
    )
    dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        default=None, description="compute type: float32, bfloat16 or float16; left out, the type stored"
    )
    max_sequences: int = Field(default=8, ge=1, le=4096, description="jobs that share a sweep at most (the slots)")
    sweep_tokens: int | None = Field(
        default=None, ge=16, le=65536, description="tokens a sweep carries at most; left out, as many as ride for free"
    )
    kv_tokens: int | None = Field(
        default=None, ge=16, description="tokens of key-value cache for all jobs together; left out, derived"
    )
    vram: Annotated[str, BeforeValidator(_as_budget)] = Field(
        default="auto", description='device memory it may take: bytes, "4GiB", "80%" of the card, or "auto"'
    )
    ram: Annotated[str, BeforeValidator(_as_budget)] = Field(
        default="auto", description="host memory for weights, in the same forms; 0 keeps no layer in RAM"
    )
    expert_cache: str = Field(
        default="auto",
        pattern=r"^(auto|[0-9]+(\.[0-9]+)?%)$",
        description='share of the memory for layers that the most visited experts get, such as "50%", or "auto"',
    )
    shared_memory: Annotated[Path | None, BeforeValidator(_as_path)] = Field(
        default=None, description="directory in memory where this host's workers share weights; left out, /dev/shm"
    )
    offline: bool = Field(default=False, description="true never asks the hub")
    peers: Annotated[tuple[str, ...], BeforeValidator(_as_addresses)] = Field(
        default=(), description='hosts that share their stores, asked before the hub: ["http://host:9530"]'
    )

    @model_validator(mode="after")
    def _fits_together(self) -> EngineTable:
        if self.sweep_tokens is not None and self.sweep_tokens < self.max_sequences:
            raise ValueError(
                f"sweep_tokens ({self.sweep_tokens}) is below max_sequences ({self.max_sequences}), so not every job "
                f"could get a token in a sweep; raise sweep_tokens to at least {self.max_sequences} or lower "
                "max_sequences"
            )
        if self.kv_tokens is not None and self.kv_tokens < 2 * self.max_sequences:
            raise ValueError(
                f"kv_tokens ({self.kv_tokens}) leaves less than 2 tokens to each of max_sequences "
                f"({self.max_sequences}); raise kv_tokens or lower max_sequences"
            )
        return self


class WorkerConfig(_Table):
    """Everything a worker process is told."""

    redis: RedisTable = RedisTable()
    worker: WorkerTable
    engine: EngineTable = EngineTable()
    telemetry: TelemetryTable = TelemetryTable()
    security: SecurityTable = SecurityTable()

    @property
    def slots(self) -> int:
        """Jobs of a model that this worker runs at once: the sequences of the model's engine."""
        return self.engine.max_sequences


def load_config(
    path: Path | None,
    flags: Mapping[str, object],
    environ: Mapping[str, str] | None = None,
    defaults: Mapping[str, object] | None = None,
) -> WorkerConfig:
    """Read the settings: `flags` (dotted key to value, None where not given), environment, file, `defaults`.

    Raises:
        ConfigError: a key is unknown, a value cannot work, or values cannot work together; the message names the
            place, the dotted key, why, and the fix, one line for each.
    """
    tables: dict[str, object] = {}
    for key, value in (defaults or {}).items():
        _override(tables, key, value, path)
    _merge(tables, _read_file(path) if path is not None else {})
    origins: dict[str, str] = {}
    env = os.environ if environ is None else environ
    for key, variable in ENVIRONMENT.items():
        if value := secret_from(env, variable) if key == "redis.url" else env.get(variable):
            is_number = key == "security.keep_s" and value.isascii() and value.isdecimal() and len(value) < 12
            _override(tables, key, int(value) if is_number else value, path)
            origins[key] = f"environment variable {variable}"
    for key, value in flags.items():
        if value is not None:
            _override(tables, key, value, path)
            origins[key] = f"option {FLAGS.get(key, key)}"
    _complete_url(tables, env)
    try:
        return WorkerConfig.model_validate(tables)
    except ValidationError as error:
        raise ConfigError("\n".join(_explain(detail, path, origins) for detail in error.errors())) from error


def _read_file(path: Path) -> dict[str, object]:
    try:
        with path.open("rb") as file:
            return tomllib.load(file)
    except FileNotFoundError as error:
        raise ConfigError(f"{path}: there is no such file; give --config the path of a TOML file") from error
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read ({error.strerror}); give --config a readable TOML file") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: is not valid TOML: {error}; correct that place") from error


def _merge(tables: dict[str, object], file: dict[str, object]) -> None:
    for table, section in file.items():
        below = tables.get(table)
        if table == "worker" and isinstance(below, dict) and isinstance(section, dict) and "models" in section:
            below = {key: value for key, value in below.items() if key != "model"}
        tables[table] = {**below, **section} if isinstance(below, dict) and isinstance(section, dict) else section


def _override(tables: dict[str, object], dotted: str, value: object, path: Path | None) -> None:
    table, key = dotted.split(".")
    section = tables.setdefault(table, {})
    if not isinstance(section, dict):
        raise ConfigError(f"{path}: {table} is a value, but must be a table; write [{table}] on a line of its own")
    section[key] = value
    if dotted in _EITHER:
        section.pop(_EITHER[dotted], None)


def _complete_url(tables: dict[str, object], env: Mapping[str, str]) -> None:
    """Give the server's URL its password; what is wrong with the URL or its table is said by the validation."""
    section = tables.setdefault("redis", {})
    if isinstance(section, dict) and isinstance(url := section.get("url", DEFAULT_REDIS_URL), str):
        section["url"] = with_password(url, env)


def known_keys() -> dict[str, str]:
    """Every setting as dotted key, with what it is."""
    tables: tuple[tuple[str, type[BaseModel]], ...] = (
        ("redis", RedisTable),
        ("worker", WorkerTable),
        ("engine", EngineTable),
        ("telemetry", TelemetryTable),
        ("security", SecurityTable),
    )
    return {f"{table}.{key}": field.description or "" for table, t in tables for key, field in t.model_fields.items()}


def _explain(detail: ErrorDetails, path: Path | None, origins: Mapping[str, str]) -> str:
    dotted = ".".join(str(part) for part in detail["loc"])
    default_place = str(path) if path is not None else "settings"
    place = origins.get(dotted, default_place)
    if detail["type"] == "extra_forbidden":
        return f"{place}: {dotted} is not a setting; {_nearest(dotted)}"
    if dotted == "worker" and detail["type"] in ("missing", NO_MODEL):
        return f'{place}: worker.model is not set; give --model NAME, or write model = "NAME" under [worker]'
    why = detail["msg"].removeprefix("Value error, ")
    why = why[:1].lower() + why[1:] if why.startswith("Input") else why
    meaning = known_keys().get(dotted)
    if meaning is None:  # a whole table: its values do not fit together, or it is no table
        found = sorted({where for key, where in origins.items() if key.startswith(f"{dotted}.")})
        if detail["type"] == "model_type":
            return f"{place}: {dotted} is a value, but must be a table; write [{dotted}] on a line of its own"
        return f"{', '.join([default_place, *found])}: [{dotted}] cannot work: {why}"
    shown = "" if dotted == "redis.url" else f" = {_show(detail['input'])}"
    return f"{place}: {dotted}{shown} cannot be used: {why}. It is: {meaning}"


def _show(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _nearest(dotted: str) -> str:
    known = known_keys()
    table, _, leaf = dotted.partition(".")
    if leaf and (same := [key for key in known if key.endswith(f".{leaf}")]):
        return f"{leaf} belongs to the table [{same[0].split('.')[0]}]: write it there"
    if not leaf:
        if same := [key for key in known if key.endswith(f".{table}")]:
            return f"{table} belongs to the table [{same[0].split('.')[0]}]: write it there"
        near = difflib.get_close_matches(table, TABLES, n=1, cutoff=0.5)
        return f"did you mean [{near[0]}]?" if near else f"the tables are {', '.join(f'[{name}]' for name in TABLES)}"
    mine = [key for key in known if key.startswith(f"{table}.")]
    for keys in (mine, list(known)):
        leaves = {key.split(".")[1]: key for key in keys}
        if near := difflib.get_close_matches(leaf, leaves, n=1, cutoff=0.6):
            return f"did you mean {leaves[near[0]]}?"
    return f"known here: {', '.join(mine or known)}"
