"""Takes the ids of jobs whose record has expired off the listing of jobs, so that nothing of a job outlives its keep.

Owns a walk over the listing in bounded pages; the records and streams themselves expire on the server. Called by the
`reconciler`, whose holder is one worker at a time; two at once do no harm.
"""

from __future__ import annotations

from typing import cast

import redis

from lamella.keys import Keys

PAGE = 500  # jobs looked at in one tick


class ListingSweep:
    """The walk; `sweep` looks at the next page."""

    def __init__(self, client: redis.Redis, keys: Keys) -> None:
        self._client = client
        self._keys = keys
        self._offset = 0

    def sweep(self) -> int:
        """Drop what has expired on the next page of the listing and return how much that was.

        Raises:
            RedisError: the server did not answer.
        """
        page = cast(list[str], self._client.zrange(self._keys.jobs, self._offset, self._offset + PAGE - 1))
        if not page:
            self._offset = 0
            return 0
        with self._client.pipeline(transaction=False) as pipe:
            for job_id in page:
                pipe.exists(self._keys.job(job_id))
            is_there = cast(list[int], pipe.execute())
        expired = [job_id for job_id, found in zip(page, is_there, strict=True) if not found]
        if expired:
            self._client.zrem(self._keys.jobs, *expired)
        self._offset = 0 if len(page) < PAGE else self._offset + len(page) - len(expired)
        return len(expired)
