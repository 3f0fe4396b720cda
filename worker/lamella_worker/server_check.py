"""One look at the server before a worker opens its model: what waiting cannot mend is said at once.

Owns nothing but the judgement. A server that is away or starting is left to the worker's own patience; a wrong
certificate, password or port, or a user who may not do a worker's work, ends the worker with what to do.
"""

from __future__ import annotations

import logging

from redis.exceptions import NoPermissionError, RedisError

from lamella.keys import Keys
from lamella.server_errors import is_passing, translated
from lamella_worker.registry import open_redis
from lamella_worker.scripts import load_scripts
from lamella_worker.worker_error import WorkerError

log = logging.getLogger(__name__)


def refuse_hopeless(url: str, prefix: str, timeout_s: float) -> None:
    """Connect once, load the scripts, and touch what only a worker of this prefix may.

    Raises:
        WorkerError: the server refuses this worker for a reason that does not pass by itself.
    """
    client = open_redis(url, timeout_s)
    try:
        load_scripts(client)
        client.get(Keys(prefix).reconciler)
    except (RedisError, OSError) as error:
        said = translated(error, url)
        if is_passing(error) or not _is_hopeless(error, str(said)):
            log.warning("%s", said)
            return
        raise WorkerError(str(said)) from None
    finally:
        client.close()


def _is_hopeless(error: Exception, said: str) -> bool:
    signs = ("no connection to the server", "user name or password", "asks for a password", "refused the login")
    return isinstance(error, NoPermissionError) or any(sign in said for sign in signs)
