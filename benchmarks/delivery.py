"""How long a token is under way from its engine's sweep to a client, which is a process of its own, without torch.

    python -m benchmarks.delivery URL MODEL STREAMS SWEEP_S

The worker at URL has to be `stamped_worker`, whose tokens say when they were made; prints JSON. The collector spares
what importing made, as in a server that reads streams (docs/scale.md). Neighbour: `latency`, which starts both.
"""

from __future__ import annotations

import asyncio
import json
import sys
import time
from collections.abc import Sequence
from contextlib import aclosing
from typing import Any

from lamella import AsyncClient
from lamella.collector import spare_started
from lamella.messages import TokenEvent

STREAM_S = 600.0
TOKENS = 120  # of each stream


async def delivery(url: str, model: str, streams: int, sweep_s: float) -> dict[str, Any]:
    """Milliseconds from an engine's sweep to the client, of every token made once all `streams` streams had begun."""
    taken: list[tuple[float, float]] = []
    begun: dict[int, float] = {}

    async def read(client: AsyncClient, number: int) -> None:
        job = await client.submit(f"stream {number}", model=model, max_tokens=TOKENS, ignore_eos=True)
        async with aclosing(job.stream(timeout_s=STREAM_S)) as items:
            async for _, event in items:
                if isinstance(event, TokenEvent):
                    now, made = time.monotonic(), int(event.text) / 1e9
                    begun.setdefault(number, now)
                    taken.append((made, now - made))

    async with AsyncClient(url) as client:
        await asyncio.gather(*(read(client, number) for number in range(streams)))
    counted = [seconds for made, seconds in taken if made > max(begun.values())]
    return {"streams": streams, "sweep_s": sweep_s, "tokens": len(counted), **quantiles_ms(counted)}


def quantiles_ms(seconds: Sequence[float]) -> dict[str, float]:
    """Percentiles in milliseconds."""
    ordered = sorted(1000 * each for each in seconds)
    places = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
    found = {name: round(ordered[min(len(ordered) - 1, int(at * len(ordered)))], 2) for name, at in places.items()}
    return {"min": round(ordered[0], 2), **found, "max": round(ordered[-1], 2)}


if __name__ == "__main__":
    spare_started()
    found = asyncio.run(delivery(sys.argv[1], sys.argv[2], int(sys.argv[3]), float(sys.argv[4])))
    sys.stdout.write(json.dumps(found) + "\n")
