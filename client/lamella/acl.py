"""What each role may do on the server, as lines of a Redis ACL file: client, gateway, worker, monitor,
metrics.

Owns the keys, channels and commands of each role. The commands that the registry's scripts run are read from the
scripts themselves, since the server checks them under the user who calls the script; the rest is listed here and held
against a real service by the tests. Needs Redis 7 or Valkey (key permissions and selectors). Neighbours: `keys`,
`registry_calls`, the command ``lamella acl``.

What the roles are trusted with is in ``docs/threat-model.md``. In short: a client submits, follows and cancels jobs of
the whole prefix, but cannot take jobs, pose as a worker or load scripts; a gateway is a client that also reads API
keys and books what they use; a worker does all of a client's and its own, and nothing outside the prefix; a monitor
sees workers and the lengths of queues, but no prompt and no token; metrics change nothing, but read jobs' records, in
which prompts are. API keys are made by the administrator alone.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from lamella.errors import ConfigError
from lamella.script_call import ScriptName, script_source

_PREFIX = re.compile(r"[A-Za-z0-9_.:-]{1,64}", re.ASCII)
_CALL = re.compile(r"redis\.p?call\(\s*['\"]([A-Za-z]+)['\"]")


class Role(StrEnum):
    """Who speaks to the server."""

    CLIENT = "client"
    GATEWAY = "gateway"
    WORKER = "worker"
    MONITOR = "monitor"
    METRICS = "metrics"


# fmt: off
# What every connection of redis-py, and of kombu on top of it, says.
_CONNECT = (
    "auth", "hello", "ping", "select", "client|setinfo", "client|setname", "client|info", "multi", "exec", "discard",
    "subscribe", "unsubscribe", "info",
)

# What those say that neither change anything nor follow anyone.
_ASK = ("auth", "hello", "ping", "select", "client|setinfo", "client|setname")

# Jobs, and the queues in front of them. Clients write them as well: scripts run with the rights of their caller.
_JOBS = ("job:*", "tok:*", "active", "jobs", "deadlines")
_QUEUES = (
    "generate.*", "queues", "ready:*", "held:*", "spent:*", "flight:*", "queue:*", "share:*", "serving:*", "capacity:*",
)
_LIMITS = ("limits", "limits:*")
_WORKERS = ("worker:*", "workers")
_PULLS = ("pulls:*", "pull:*")

# What the HTTP gateway books; API keys themselves it only reads.
_BOOKS = ("apirate:*", "apiday:*", "apiuse:*", "unbilled", "httpretry:*")
_API_KEYS = ("apikey:*", "apikeys")

# Celery's own: routing tables, unacknowledged deliveries, mailboxes of remote control and of events, their channels.
_ROUTES = ("_kombu.binding*",)
_LOOKING_ROUTES = ("_kombu.binding*celery.pidbox", "_kombu.binding*celeryev*", "_kombu.binding_deadlines")
_DELIVERIES = ("unacked", "unacked_index", "unacked_mutex")
_MAILBOXES = ("*.celery.pidbox*", "celeryev.*")
# By name, with the number of the database: a pattern does not allow to subscribe to patterns, which is what kombu does.
_BROADCASTS = ("/{db}.celery.pidbox", "/{db}.celeryev/*")
_MAIL = ("brpop", "rpop", "lpush", "llen", "del", "exists", "sadd", "srem", "smembers", "scard", "watch", "unwatch")

_FOLLOW = ("hmget", "xrange", "zrange", "zrevrange")
_REGISTRY = (
    "evalsha", "script|load", "script|exists", "hget", "hmget", "mget", "get", "set", "del", "pexpire", "pttl", "sscan",
    "xrange", "zrange", "zrevrange", "exists", "zadd", "zrem", "publish", "lpop",
)
_BROKER = (*_MAIL, "time", "zrangebyscore", "rpush", "hset", "hdel", "zrevrangebyscore", "psubscribe", "punsubscribe")
# What kombu's own scripts and its care for deliveries take; workers load the scripts.
_BINDING = ("evalsha", "script|exists", "time", "zadd", "zrem", "zrange", "zrangebyscore", "set", "get")
_COUNTS = ("llen", "zcard", "hlen", "scard")
_BOOKKEEPING = ("hgetall", "hscan", "hsetnx", "get")
# fmt: on

# What only the gateway runs.
_GATEWAY_SCRIPTS = frozenset((ScriptName.ADMIT, ScriptName.ATTACH, ScriptName.SETTLE))

# What only workers run.
_WORKER_SCRIPTS = frozenset(
    (
        *(ScriptName.CLAIM, ScriptName.EMIT, ScriptName.RELEASE, ScriptName.NUDGE),
        *(ScriptName.SERVE, ScriptName.TEND, ScriptName.EXPIRE),
    )
)


@dataclass(frozen=True)
class Grant:
    """Some commands on some keys and channels (names after the prefix); `reads` are keys that are only read."""

    commands: tuple[str, ...]
    keys: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    channels: tuple[str, ...] = ()

    def rules(self, prefix: str, database: int) -> list[str]:
        """Return the grant as ACL rules."""
        written = [f"~{prefix}{key}" for key in self.keys]
        read = [f"%R~{prefix}{key}" for key in self.reads]
        channels = [f"&{prefix}{channel.format(db=database)}" for channel in self.channels]
        return [*written, *read, *channels, "-@all", *(f"+{command}" for command in sorted(set(self.commands)))]


def script_commands(names: frozenset[ScriptName]) -> tuple[str, ...]:
    """Return the commands that the given scripts run, in small letters."""
    return tuple(sorted({command.lower() for name in names for command in _CALL.findall(script_source(name))}))


def grants(role: Role) -> tuple[Grant, ...]:
    """Return what a role is granted: first its main part, then what holds for fewer keys."""
    match role:
        case Role.CLIENT | Role.GATEWAY:
            scripts = script_commands(frozenset(ScriptName) - _WORKER_SCRIPTS - _GATEWAY_SCRIPTS)
            commands: tuple[str, ...] = (*_CONNECT, *_FOLLOW, "evalsha", *scripts)
            keys: tuple[str, ...] = (*_JOBS, *_QUEUES, "idem:*")
            reads: tuple[str, ...] = _LIMITS
            if role is Role.GATEWAY:
                commands = (*commands, *_BOOKKEEPING, *script_commands(_GATEWAY_SCRIPTS))
                keys, reads = (*keys, *_BOOKS), (*reads, *_API_KEYS)
            jobs = Grant(commands, keys, reads, channels=("ch:*",))
            looks = Grant(("mget", "zrange", "zrevrange"), reads=_WORKERS)
            if role is Role.GATEWAY:
                return jobs, looks
            asked = Grant(("rpush", "ltrim", "expire", "llen"), keys=_PULLS[:1])
            return jobs, looks, asked, Grant(("exists", "get"), reads=("worker:*", _PULLS[1]))
        case Role.WORKER:
            registry = (*_JOBS, *_QUEUES, *_LIMITS, *_WORKERS, *_PULLS, "idem:*", "reconciler")
            broker = (*_ROUTES, *_DELIVERIES, *_MAILBOXES)
            everything = (*_CONNECT, *_REGISTRY, *_BROKER, *script_commands(frozenset(ScriptName) - _GATEWAY_SCRIPTS))
            return (Grant(everything, keys=(*registry, *broker), channels=("ch:*", *_BROADCASTS)),)
        case Role.MONITOR:
            mail = (*_CONNECT, *_MAIL, *_BINDING, "psubscribe", "punsubscribe", "publish")
            return (
                Grant(mail, keys=(*_LOOKING_ROUTES, *_MAILBOXES), channels=_BROADCASTS),
                Grant(("mget", "zrevrange", "zrange"), reads=_WORKERS),
                Grant(_COUNTS, reads=(*_QUEUES, "active", "jobs", "deadlines")),
            )
        case Role.METRICS:
            # State and model of a job are fields of its record; the server knows no rights on fields.
            return (Grant((*_ASK, "time", "zrange", "hmget", "mget"), reads=(*_WORKERS, "active", "jobs", "job:*")),)


def user_line(role: Role, prefix: str, passwords: Sequence[str], database: int = 0) -> str:
    """Return the line of an ACL file for a role's user, ``lamella-client`` and so on.

    Passwords are written as hashes; several of them are valid at once, so that one can be exchanged while both work.
    Without any the user is off.

    Raises:
        ConfigError: the prefix cannot be one.
    """
    if not _PREFIX.fullmatch(prefix):
        raise ConfigError(f"the prefix is {prefix[:80]!r}; use 1 to 64 letters, digits or any of _ . : -")
    whole, *narrower = grants(role)
    selectors = [f"({' '.join(grant.rules(prefix, database))})" for grant in narrower]
    state = "on" if passwords else "off"
    rules = ["reset", state, *_hashes(passwords), *whole.rules(prefix, database), *selectors]
    return f"user lamella-{role.value} {' '.join(rules)}"


def admin_lines(passwords: Sequence[str]) -> list[str]:
    """Return the lines that close the server to those without a login, and open it to an administrator if any."""
    admin = [f"user lamella-admin reset on {' '.join(_hashes(passwords))} ~* &* +@all"] if passwords else []
    return ["user default reset", *admin]


def _hashes(passwords: Sequence[str]) -> list[str]:
    return [f"#{hashlib.sha256(password.encode()).hexdigest()}" for password in passwords]
