"""The scripts that the server must hold for those who may run scripts but not load them: clients and monitors.

Owns the list and the look whether all of it is there. A server that was started anew has forgotten its scripts, so the
heartbeat looks again each time. Neighbours: `registry` (which runs a worker's own), `lamella.acl` (who may do what).
"""

from __future__ import annotations

import hashlib
from functools import cache

import redis
from kombu.transport import redis as kombu_redis
from redis.lock import Lock

from lamella.script_call import ScriptName, script_source


@cache
def served_scripts() -> dict[str, str]:
    """Return every such script by the SHA-1 under which the server knows it: the registry's and kombu's."""
    kombus = (kombu_redis.REFRESH_BINDING, kombu_redis.SWEEP_BINDINGS, Lock.LUA_RELEASE_SCRIPT)
    sources = (*(script_source(name) for name in ScriptName), *kombus)
    return {_digest(source): source for source in sources}


def _digest(source: str) -> str:
    return hashlib.sha1(source.encode(), usedforsecurity=False).hexdigest()


def load_scripts(client: redis.Redis) -> None:
    """Have the server hold every script that it lacks.

    Raises:
        RedisError: the server did not take them.
    """
    scripts = served_scripts()
    for (_, source), is_held in zip(scripts.items(), client.script_exists(*scripts), strict=True):
        if not is_held:
            client.script_load(source)
