"""One pass of load over one server: so many requests at a time, or arriving at random."""

from __future__ import annotations

import asyncio
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Protocol

from ..errors import RequestError
from .client import Answer, Messages, Sampling
from .datasets import Item
from .records import INTERRUPTED, LOST, TIMEOUT, Level

GIVE_UP = 3
"""So many answers in a row that never came (or one of each request at a time, if those
are more): the server is taken to be gone."""


class Answers(Protocol):
    """What a pass needs of a client."""

    def answer(self, messages: Messages, sampling: Sampling) -> Awaitable[Answer]:
        """One answer; failures are in it."""
        ...


Note = Callable[[Item, int, float, Answer], None]
"""Called with prompt, turn, seconds since the pass began, and the answer."""


async def run(
    client: Answers,
    items: Sequence[Item],
    level: Level,
    sampling: Sampling,
    note: Note,
    *,
    seed: int = 0,
) -> float:
    """Ask every prompt once, each turn after the answer to the one before it.

    Returns wall seconds. ``note`` is called for every request, also for those that a
    cancellation interrupts.

    Raises:
        RequestError: the server is gone; what it answered before is noted.
    """
    one = _Pass(client, sampling, note, max(GIVE_UP, level.concurrency or 0))
    if level.concurrency is not None:
        queue = deque(items)

        async def worker() -> None:
            while queue:
                await one.converse(queue.popleft())

        await one.all([worker() for _ in range(min(level.concurrency, len(items)))])
    else:
        assert level.rate is not None
        chance = random.Random(seed)  # the same arrivals for every arm
        at, arrivals = 0.0, []
        for item in items:
            arrivals.append(one.converse(item, at))
            at += chance.expovariate(level.rate)
        await one.all(arrivals)
    return one.now


class _Pass:
    def __init__(self, client: Answers, sampling: Sampling, note: Note, patience: int) -> None:
        self.client, self.sampling, self.note = client, sampling, note
        self.origin, self.lost, self.patience = time.perf_counter(), 0, patience

    @property
    def now(self) -> float:
        return time.perf_counter() - self.origin

    async def converse(self, item: Item, at: float = 0.0) -> None:
        if at > self.now:
            await asyncio.sleep(at - self.now)
        messages: list[dict[str, str]] = []
        for turn, text in enumerate(item.turns):
            messages.append({"role": "user", "content": text})
            start = self.now
            answer = await self.client.answer(messages, self.sampling)
            self.note(item, turn, start, answer)
            if answer.error == INTERRUPTED:
                raise asyncio.CancelledError
            self.lost = self.lost + 1 if answer.error in (*LOST, TIMEOUT) else 0
            if self.lost >= self.patience:
                raise RequestError(
                    f"{self.lost} requests in a row were not answered ({answer.error}: "
                    f"{answer.detail})",
                    hint="see the server's log; --resume continues the run",
                )
            if answer.error is not None:
                return
            messages.append({"role": "assistant", "content": answer.text})

    async def all(self, parts: Sequence[Awaitable[None]]) -> None:
        """Wait for all; the first that raises ends the others, and they get to note that."""
        tasks = [asyncio.ensure_future(part) for part in parts]
        try:
            await asyncio.gather(*tasks)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
