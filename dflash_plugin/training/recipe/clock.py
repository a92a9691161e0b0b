"""Time of a stage: its progress bar, when it is over, and what it has taken so far."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from tqdm import tqdm

from ...errors import UsageError

_UNITS = {"s": 1, "m": 60, "h": 3600}


class Clock:
    """Of one stage; ``allowed`` in seconds, those of earlier tries included (None: any)."""

    def __init__(
        self,
        allowed: float | None = None,
        spent: float = 0.0,
        save: Callable[[float], None] = lambda seconds: None,
    ) -> None:
        self.allowed, self._before, self._save = allowed, spent, save
        self._start = time.monotonic()

    @property
    def spent(self) -> float:
        """Seconds of this stage, in this process and before."""
        return self._before + time.monotonic() - self._start

    @property
    def left(self) -> float | None:
        """Seconds; None where there is no limit."""
        return None if self.allowed is None else self.allowed - self.spent

    def over(self) -> bool:
        """Whether the time is up; asked between pieces of work, which are then kept."""
        self._save(self.spent)
        return self.left is not None and self.left <= 0

    @contextmanager
    def progress(self, unit: str, total: int, done: int = 0) -> Iterator[Callable[..., None]]:
        """A bar on a terminal, a line now and then elsewhere; yields ``told(done, **facts)``."""
        terminal = sys.stderr.isatty()
        every = 0.1 if terminal else 30.0
        with tqdm(
            total=total, initial=done, unit=unit, mininterval=every, maxinterval=every,
            file=sys.stderr,
        ) as bar:  # fmt: skip

            def told(now: int, **facts: Any) -> None:
                bar.set_postfix(facts, refresh=False)
                bar.update(now - bar.n)

            yield told


def seconds(text: str) -> float:
    """``90s``, ``10m`` or ``1.5h`` in seconds.

    Raises:
        UsageError: not such a text.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not match or float(match[1]) <= 0:
        raise UsageError(f"--budget is {text!r}", hint="such as 90s, 10m or 1.5h")
    return float(match[1]) * _UNITS[match[2]]
