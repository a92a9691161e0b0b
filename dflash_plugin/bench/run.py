"""The passes of a benchmark, each written down as it is measured."""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from tqdm import tqdm

from ..acceptance import AcceptanceStats
from ..errors import RequestError
from . import load
from .client import Answer, Sampling
from .datasets import Item
from .plan import Plan
from .records import Level, Pass, Store
from .sides import Side

WARM_UP_TOKENS = 16


def todo(plan: Plan, store: Store) -> bool:
    """Whether anything of the plan is not in the store yet."""
    for dataset in plan.datasets:
        ids = {item.id for item in dataset.items}
        for level in plan.levels:
            for number in plan.numbers:
                for arm in plan.arms:
                    if ids - store.done(Pass(dataset.name, str(level), number, arm.name)):
                        return True
    return False


def measure(plan: Plan, sides: Mapping[str, Side], store: Store) -> None:
    """Run what of the plan is not in the store yet; ``sides``: by the arm's name.

    Raises:
        RequestError: a server is gone, or refuses the warm-up; what was measured is kept.
    """
    total = len(plan.levels) * plan.rounds * len(plan.arms)
    total *= sum(len(dataset.items) for dataset in plan.datasets)
    with tqdm(total=total, desc="bench", unit="prompt", disable=None) as bar:
        warm: set[tuple[str, str]] = set()
        for dataset in plan.datasets:
            for level in plan.levels:
                for number in plan.numbers:
                    for arm in plan.order(number):
                        key = Pass(dataset.name, str(level), number, arm.name)
                        done = store.done(key)
                        bar.update(len(done))
                        left = [item for item in dataset.items if item.id not in done]
                        if not left:
                            continue
                        one = _One(sides[arm.name], plan, level, store, key, bar)
                        cold = (arm.name, str(level)) not in warm
                        asyncio.run(one.run(left, warm_up=cold))
                        warm.add((arm.name, str(level)))


class _One:
    """One pass."""

    def __init__(  # noqa: PLR0917 - all of them are needed and none is optional
        self,
        side: Side,
        plan: Plan,
        level: Level,
        store: Store,
        key: Pass,
        bar: tqdm[Any],
    ) -> None:
        self.side, self.plan, self.level, self.store, self.key = side, plan, level, store, key
        self.bar, self.segment = bar, store.segment()

    async def run(self, items: Sequence[Item], *, warm_up: bool) -> None:
        plan, level = self.plan, self.level
        async with self.side.client() as client:
            if warm_up:
                await self._warm_up(client, items[: level.concurrency or 1])
            before = self.side.acceptance()
            wall = await load.run(client, items, level, plan.sampling, self.note, seed=plan.seed)
        stats = _difference(before, self.side.acceptance())
        self.store.append(
            "pass", self.key,
            {"segment": self.segment, "wall": wall,
             "acceptance": stats.to_dict() if stats is not None else None},
        )  # fmt: skip

    async def _warm_up(self, client: load.Answers, items: Sequence[Item]) -> None:
        """Untimed: what an engine does once is done. A first error is the user's to see."""
        short = Sampling(**{**asdict(self.plan.sampling), "max_tokens": WARM_UP_TOKENS})

        def note(_item: Item, _turn: int, _start: float, answer: Answer) -> None:
            if answer.error is not None:
                raise RequestError(
                    f"{self.key.arm}: {self.side.label}: the warm-up failed: "
                    f"{answer.error} {answer.detail}",
                    hint="see the server's log",
                )

        first = [Item(item.id, item.kind, item.turns[:1]) for item in items]
        await load.run(client, first, Level(concurrency=len(first)), short, note)

    def note(self, item: Item, turn: int, start: float, answer: Answer) -> None:
        """Write a request down."""
        values = asdict(answer)
        del values["text"]  # the token ids say as much
        last = turn == len(item.turns) - 1 or answer.error is not None
        self.store.append(
            "request", self.key,
            {"segment": self.segment, "id": item.id, "turn": turn, "last": last,
             "start": round(start, 6), **values, "seconds": round(answer.seconds, 6)},
        )  # fmt: skip
        if last:
            self.bar.update()


def _difference(
    before: AcceptanceStats | None, after: AcceptanceStats | None
) -> AcceptanceStats | None:
    if before is None or after is None:
        return None
    try:
        found = after - before
    except ValueError:
        return None  # the server was restarted meanwhile
    return found if found.drafts else None
