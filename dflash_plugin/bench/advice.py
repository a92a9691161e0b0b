"""Which K to use at which concurrency, and from where on DFlash loses.

A few values of K are measured beside ``base``. From each: the cost of a step (draft, verify
and what comes with them, seconds) and the share of steps that accept each position. A
step's cost lies on a line between measured K; a position's share is that of the nearest
measured K that drafts it. Then, with c requests at a time,

    tokens/s(c, K) = c * AL(K) / cost(c, K)        AL(K) = 1 + sum of shares up to K

for every K. Rates are medians of ratios to ``base`` in the same round, times base's rate,
so that a machine that slows down between two groups of servers does not count.
"""

from __future__ import annotations

import hashlib
import json
import statistics
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from .. import engines, hardware, launch
from ..acceptance import AcceptanceStats
from ..cache import atomic_write_text, cache_dir
from ..errors import UsageError
from .analysis import Line, rate
from .plan import BASE, DFLASH
from .records import Level, Pass, passes

PREFIX = DFLASH + "-k"
CHECKED = 3
"""So many predictions are held against a measurement."""


def arm_name(k: int, *, check: bool = False) -> str:
    """The arm of a sweep that drafts K tokens; ``check``: of the second look at it."""
    return f"{PREFIX}{k}" + ("-check" if check else "")


def first_values(most: int) -> list[int]:
    """The K to measure for the model: the ends, and two between them."""
    return sorted({1, max(1, most // 4), max(1, most // 2), most})


@dataclass(frozen=True)
class Measured:
    """What one K came to at one concurrency.

    ``ratio``: to base, median over rounds; ``step_seconds``: of one step of one request.
    """

    concurrency: int
    k: int
    ratio: float
    rate: float
    step_seconds: float


@dataclass(frozen=True)
class Model:
    """Costs and shares, from which every K is predicted."""

    base: Mapping[int, float]
    measured: tuple[Measured, ...]
    shares: Mapping[int, tuple[float, ...]]

    def al(self, k: int) -> float:
        """Expected tokens per step at K."""
        near = min((m for m in self.shares if m >= k), default=max(self.shares))
        return 1.0 + sum(self.shares[near][:k])

    def step_seconds(self, concurrency: int, k: int) -> float:
        """Cost of a step: on the line between the nearest measured K."""
        points = sorted((m.k, m.step_seconds) for m in self.measured
                        if m.concurrency == concurrency)  # fmt: skip
        if len(points) == 1:
            return points[0][1]
        for (low, a), (high, b) in pairwise(points):
            if k <= high or (high, b) == points[-1]:
                return a + (b - a) * (k - low) / (high - low)
        raise AssertionError("unreachable: the last two points always return")

    def rate(self, concurrency: int, k: int) -> float:
        """Predicted tokens per second."""
        return concurrency * self.al(k) / self.step_seconds(concurrency, k)

    def best(self, most: int, count: int = CHECKED) -> list[int]:
        """The K to check: the best of each concurrency first, then the best on the whole."""
        levels = sorted({m.concurrency for m in self.measured})
        values = range(1, most + 1)
        chosen = [max(values, key=lambda k, c=c: self.rate(c, k)) for c in levels]  # type: ignore[misc]

        def on_the_whole(k: int) -> float:
            return statistics.fmean(self.rate(c, k) / self.base[c] for c in levels)

        chosen += sorted(values, key=on_the_whole, reverse=True)
        return list(dict.fromkeys(chosen))[:count]


def fit(lines: Iterable[Line]) -> Model:
    """The model of a sweep's records.

    Raises:
        UsageError: no base, or no K with counters, was measured.
    """
    rounds = passes(lines)
    shares = {k: s.rate_per_position or () for k, s in _stats(rounds).items() if s.drafts}
    base = base_rates(rounds)
    found = [m for m in measured(rounds, shares) if m.k in shares]
    if not found:
        raise UsageError(
            "no K was measured beside base with acceptance counters",
            hint="the sweep needs an engine that tells them (vLLM), and at least one whole round",
        )
    return Model(base, tuple(found), shares)


def base_rates(rounds: Mapping[Pass, Sequence[Line]]) -> dict[int, float]:
    """Tokens per second without speculation, by concurrency; medians over rounds."""
    found: dict[int, list[float]] = {}
    for (_, width), by_arm in _pooled(rounds).items():
        if by_arm.get(BASE):
            found.setdefault(width, []).append(by_arm[BASE])
    return {width: statistics.median(values) for width, values in found.items()}


def measured(
    rounds: Mapping[Pass, Sequence[Line]],
    shares: Mapping[int, Sequence[float]],
    *,
    check: bool = False,
) -> list[Measured]:
    """Every K at every concurrency, by concurrency and K."""
    ratios: dict[tuple[int, int], list[float]] = {}
    for (_, width), by_arm in _pooled(rounds).items():
        for arm, value in by_arm.items():
            k = _k(arm, check)
            if k is not None and by_arm.get(BASE):
                ratios.setdefault((width, k), []).append(value / by_arm[BASE])
    base = base_rates(rounds)
    rows = []
    for (width, k), values in sorted(ratios.items()):
        ratio = statistics.median(values)
        speed = ratio * base[width]
        al = 1.0 + sum(shares.get(k, ()))
        rows.append(Measured(width, k, ratio, speed, width * al / speed))
    return rows


def advise(lines: Sequence[Line], most: int) -> dict[str, Any]:
    """The advice, JSON-ready.

    Returns:
        ``levels``: per concurrency ``k`` (the measured best), its ``speedup``, whether it
        ``pays``, ``predicted`` and ``measured`` tokens/s; ``loses_from``: the lowest
        measured concurrency from which on no K pays, or None; ``predictions``, ``costs``
        and ``checks``: what it rests on.
    """
    model, rounds = fit(lines), passes(lines)
    checks = measured(rounds, model.shares, check=True)
    levels: list[dict[str, Any]] = []
    for width in sorted(model.base):
        here = [m for m in checks if m.concurrency == width]
        here = here or [m for m in model.measured if m.concurrency == width]
        if not here:
            continue
        best = max(here, key=lambda m: m.ratio)
        levels.append(
            {"concurrency": width, "k": best.k, "speedup": best.ratio, "pays": best.ratio > 1,
             "measured": best.rate, "predicted": model.rate(width, best.k),
             "base": model.base[width]}
        )  # fmt: skip
    loses = None
    for row in reversed(levels):
        if row["pays"]:
            break
        loses = row["concurrency"]
    widths: list[int] = [row["concurrency"] for row in levels]
    return {
        "levels": levels,
        "loses_from": loses,
        "al": {k: model.al(k) for k in range(1, most + 1)},
        "predictions": {
            c: {k: model.rate(c, k) for k in range(1, most + 1)} for c in widths
        },
        "costs": [asdict(m) for m in model.measured],
        "checks": [
            {**asdict(m), "predicted": model.rate(m.concurrency, m.k),
             "error": model.rate(m.concurrency, m.k) / m.rate - 1}
            for m in checks
        ],
    }  # fmt: skip


def text(advice: Mapping[str, Any]) -> list[str]:
    """The advice in sentences, one a line."""
    lines = []
    for row in advice["levels"]:
        verb = "use" if row["pays"] else "DFlash does not pay; the best would be"
        lines.append(
            f"concurrency {row['concurrency']}: {verb} K {row['k']} "
            f"({row['speedup']:.2f}x, {row['measured']:.0f} tokens/s measured, "
            f"{row['predicted']:.0f} predicted)"
        )
    if advice["loses_from"] is not None:
        lines.append(f"DFlash loses from concurrency {advice['loses_from']} on")
    else:
        lines.append("DFlash pays at every concurrency measured")
    return lines


def key_of(engine: engines.Installed, resolved: launch.ResolvedPair) -> dict[str, str]:
    """What advice belongs to: the pair, the engine's release and this machine."""
    weights = (resolved.draft_sha256 or {}).get("model.safetensors")
    return {
        "target": resolved.target,
        "draft": weights or f"{resolved.draft}@{resolved.draft_revision}",
        "engine": f"{engine.name} {engine.base_version}",
        "hardware": hardware.describe(cpu=engine.platform == "cpu"),
    }


def for_serving(engine: engines.Installed, resolved: launch.ResolvedPair, concurrency: int) -> int:
    """The K to serve with; says on stderr where it comes from. Raises as :func:`stored`."""
    row = stored(key_of(engine, resolved), concurrency)
    line = f"K {row['k']}: {row['speedup']:.2f}x measured at concurrency {row['concurrency']}"
    if not row["pays"]:
        line += "; DFlash is slower than plain decoding there"
    print(line, file=sys.stderr)
    return int(row["k"])


def path_of(key: Mapping[str, Any]) -> Path:
    """Where the advice for a pair, engine release and machine is kept."""
    name = hashlib.sha256(json.dumps(dict(key), sort_keys=True).encode()).hexdigest()[:16]
    return cache_dir() / "advice" / f"{name}.json"


def store(key: Mapping[str, Any], advice: Mapping[str, Any]) -> Path:
    """Keep it for ``serve --num-speculative-tokens auto``; raises ``CacheError``."""
    path = path_of(key)
    atomic_write_text(path, json.dumps({"key": dict(key), **advice}, indent=1) + "\n")
    return path


def stored(key: Mapping[str, Any], concurrency: int) -> dict[str, Any]:
    """The row of the highest concurrency measured that is not above this one, else the lowest.

    Raises:
        UsageError: nothing is kept for this pair, engine and machine, or it is damaged.
    """
    path = path_of(key)
    try:
        levels = json.loads(path.read_text(encoding="utf-8"))["levels"]
        rows = sorted(levels, key=lambda row: int(row["concurrency"]))
        below = [row for row in rows if row["concurrency"] <= concurrency] or rows[:1]
        row: dict[str, Any] = dict(below[-1])
        row.update(k=int(row["k"]), speedup=float(row["speedup"]), pays=bool(row["pays"]))
    except FileNotFoundError as err:
        raise UsageError(
            "no advice on K is kept for " + ", ".join(f"{k} {v}" for k, v in key.items()),
            hint="measure it with `dflash-plugin bench --serve --sweep-k`, or give a number",
        ) from err
    except (OSError, ValueError, KeyError, TypeError, IndexError) as err:
        raise UsageError(
            f"{path}: not advice on K ({type(err).__name__})", hint="delete it and sweep again"
        ) from err
    return row


def _k(arm: str, check: bool) -> int | None:
    number = arm.removeprefix(PREFIX)
    if number == arm or number.endswith("-check") != check:
        return None
    number = number.removesuffix("-check")
    return int(number) if number.isdigit() else None


def _pooled(rounds: Mapping[Pass, Sequence[Line]]) -> dict[tuple[int, int], dict[str, float]]:
    """(round, concurrency) -> arm -> tokens per second over all data sets together."""
    lines: dict[tuple[int, int], dict[str, list[Line]]] = {}
    for key, some in rounds.items():
        width = Level.parse(key.level).concurrency
        if width is not None:
            lines.setdefault((key.round, width), {}).setdefault(key.arm, []).extend(some)
    return {
        place: {arm: value for arm, some in by_arm.items() if (value := rate(some))}
        for place, by_arm in lines.items()
    }


def _stats(rounds: Mapping[Pass, Sequence[Line]]) -> dict[int, AcceptanceStats]:
    found: dict[int, AcceptanceStats] = {}
    for key, lines in rounds.items():
        k = _k(key.arm, False)
        k = _k(key.arm, True) if k is None else k
        for line in lines:
            if k is not None and line["type"] == "pass" and line["acceptance"]:
                stats = AcceptanceStats.from_dict(line["acceptance"])
                found[k] = stats + found[k] if k in found else stats
    return found
