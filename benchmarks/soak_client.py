"""A client process of a soak: ``python -m benchmarks.soak_client PLAN ANSWERS``.

Submits its jobs through the asyncio client, follows each live to its end, and writes down every event with its time.
Prints a line for each job that has ended, so that the soak knows how far it is. Judges nothing.
"""

from __future__ import annotations

import asyncio
import sys
import time
from pathlib import Path

from benchmarks.soak_plan import MODEL, SoakAnswer, SoakPlan, write_answers
from lamella import AsyncClient
from lamella.errors import LamellaError
from lamella.messages import Done, TokenEvent

HEAL_S = 60.0


class Follower:
    """Carries out one plan.

    Attributes:
        answers: what came so far.
    """

    def __init__(self, plan: SoakPlan, client: AsyncClient) -> None:
        self.answers: list[SoakAnswer] = []
        self._plan = plan
        self._client = client
        self._room = asyncio.Semaphore(plan.concurrency)

    async def run(self) -> None:
        """Ask for everything, and follow it to its end."""
        async with asyncio.TaskGroup() as tasks:
            for number, request in self._plan.jobs:
                await self._room.acquire()
                tasks.create_task(self._job(number, request))

    async def _job(self, number: int, request: int) -> None:
        try:
            self.answers.append(await self._follow(number, request))
        finally:
            self._room.release()
            sys.stdout.write(f"{number}\n")
            sys.stdout.flush()

    async def _follow(self, number: int, request: int) -> SoakAnswer:
        asked = self._plan.requests[request]
        job_id, ended, usage = "", "", (0, 0)
        seqs: list[int] = []
        at_s: list[float] = []
        token_ids: list[int] = []
        text = ""
        try:
            job = await self._client.submit(
                asked.prompt,
                model=MODEL,
                max_tokens=asked.max_tokens,
                temperature=asked.temperature,
                seed=asked.seed,
                ignore_eos=True,
                require_worker=False,
                idempotency_key=f"soak-{number}",
            )
            job_id = job.id
            async for seq, event in job.stream(timeout_s=self._plan.timeout_s):
                if seq is None:
                    continue
                seqs.append(seq)
                at_s.append(round(time.monotonic(), 4))
                if isinstance(event, TokenEvent):
                    token_ids.extend(event.token_ids)
                    text += event.text
                else:
                    ended = f"{ended} {event.type}".strip()
                    if isinstance(event, Done):
                        usage = (event.usage.prompt_tokens, event.usage.completion_tokens)
        except LamellaError as error:
            ended = f"{type(error).__name__}: {error}"
        return SoakAnswer(number, request, job_id, tuple(seqs), tuple(at_s), tuple(token_ids), text, ended, usage)


async def follow(plan: SoakPlan) -> list[SoakAnswer]:
    """Carry out a plan and return what came."""
    async with AsyncClient(plan.url, heal_s=HEAL_S) as client:
        follower = Follower(plan, client)
        await follower.run()
        return follower.answers


def main(plan: str, answers: str) -> int:
    """Carry out the plan in a file, and write what came to another."""
    write_answers(Path(answers), asyncio.run(follow(SoakPlan.read(Path(plan)))))
    return 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
