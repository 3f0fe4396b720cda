"""What has expired leaves the listing of jobs, and nothing else does."""

from __future__ import annotations

import redis

from lamella.keys import Keys
from lamella_worker.listing_sweep import PAGE, ListingSweep


def test_expired_jobs_leave_the_listing_and_others_stay(fake_redis: redis.Redis) -> None:
    keys = Keys("t:")
    total = 2 * PAGE + 7
    fake_redis.zadd(keys.jobs, {f"job{number}": number for number in range(total)})
    kept = {f"job{number}" for number in range(0, total, 3)}
    for job_id in kept:
        fake_redis.hset(keys.job(job_id), "state", "done")
    sweep = ListingSweep(fake_redis, keys)

    dropped = sum(sweep.sweep() for _ in range(4))

    assert dropped == total - len(kept)
    assert set(fake_redis.zrange(keys.jobs, 0, -1)) == kept


def test_an_empty_listing_is_left_alone(fake_redis: redis.Redis) -> None:
    assert ListingSweep(fake_redis, Keys("t:")).sweep() == 0
