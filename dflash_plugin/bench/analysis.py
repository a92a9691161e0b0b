"""Records -> numbers: rates, latencies, acceptance and ratios; pure Python.

The rate of a pass is every token received, by its wall time. Inter-token latency spreads
the gap before a streamed event evenly over the tokens in it. Acceptance comes from the
server's own counters, around each pass; by context length it comes from the sizes of the
streamed events, one event being one engine step.
"""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from ..acceptance import AcceptanceStats
from .plan import BASE
from .records import LOST, Pass, passes

Line = Mapping[str, Any]
PERCENTILES = (50, 90, 99)


@dataclass(frozen=True)
class Objective:
    """What a request has to keep to count for goodput; milliseconds, None: anything."""

    ttft_ms: float | None = None
    itl_ms: float | None = None

    def met(self, line: Line) -> bool:
        """Whether a finished request kept it (its mean inter-token latency, for ``itl_ms``)."""
        if line["error"] is not None:
            return False
        ttft, itl = first_token(line), inter_token(line)
        if self.ttft_ms is not None and (ttft is None or 1e3 * ttft > self.ttft_ms):
            return False
        return self.itl_ms is None or not itl or 1e3 * statistics.fmean(itl) <= self.itl_ms


def summarise(
    settings: Mapping[str, Any], lines: Iterable[Line], objective: Objective | None = None
) -> dict[str, Any]:
    """All of a run's numbers, JSON-ready: by data set, by level, by arm.

    Returns:
        ``datasets``: name -> level -> ``arms`` (see :func:`arm_numbers`) and ``speedup``
        (arm -> ``median``, ``min``, ``max`` over rounds of the ratio of rates to ``base``);
        ``acceptance``: data set -> arm -> counters over all levels (from the events where a
        server has none), with AL, histogram, share by position and ``by_context``;
        ``errors``: kind -> count.
    """
    lines = list(lines)
    rounds = passes(lines)
    datasets: dict[str, Any] = {}
    for key in rounds:
        datasets.setdefault(key.dataset, {}).setdefault(key.level, None)
    for dataset, levels in datasets.items():
        for level in sorted(levels, key=_level_order):
            levels[level] = _level(rounds, dataset, level, objective or Objective())
        datasets[dataset] = {name: levels[name] for name in sorted(levels, key=_level_order)}
    requests = [line for some in rounds.values() for line in final(some)]
    return {
        "objective": vars(objective) if objective else None,
        "datasets": datasets,
        "acceptance": _acceptance(rounds),
        "errors": dict(Counter(line["error"] for line in requests if line["error"])),
        "requests": len(requests),
        "arms": [arm["name"] for arm in settings.get("arms", [])],
    }


def _level(
    rounds: Mapping[Pass, Sequence[Line]], dataset: str, level: str, objective: Objective
) -> dict[str, Any]:
    here = {k: v for k, v in rounds.items() if (k.dataset, k.level) == (dataset, level)}
    by_arm: dict[str, dict[int, Sequence[Line]]] = {}
    for key, lines in here.items():
        by_arm.setdefault(key.arm, {})[key.round] = lines
    answers = _answers(by_arm.get(BASE, {}))
    arms, speedup = {}, {}
    for name, taken in by_arm.items():
        arms[name] = arm_numbers(list(taken.values()), objective)
        if name == BASE:
            continue
        same = [answers[key] == ids for key, ids in _answers(taken).items() if key in answers]
        arms[name]["same_tokens"] = {"equal": sum(same), "compared": len(same)}
        ratios = [
            mine / base
            for number in sorted(set(taken) & set(by_arm.get(BASE, {})))
            if (base := rate(by_arm[BASE][number])) and (mine := rate(taken[number])) is not None
        ]
        if ratios:
            speedup[name] = {
                "median": statistics.median(ratios),
                "min": min(ratios),
                "max": max(ratios),
                "rounds": len(ratios),
            }
    return {"arms": arms, "speedup": speedup}


def arm_numbers(taken: Sequence[Sequence[Line]], objective: Objective) -> dict[str, Any]:
    """The numbers of one arm at one level; ``taken``: the lines of each round.

    Latencies (``ttft_ms``, ``itl_ms``, ``latency_s``) are percentiles over the requests
    that succeeded, or None.
    """
    lines = [line for some in taken for line in final(some)]
    good = [line for line in lines if line["error"] is None]
    rates = [value for some in taken if (value := rate(some)) is not None]
    seconds = sum(wall(some) for some in taken)
    firsts = [1e3 * ttft for line in good if (ttft := first_token(line)) is not None]
    gaps = [1e3 * gap for line in good for gap in inter_token(line)]
    return {
        "requests": len(lines),
        "ok": len(good),
        "errors": dict(Counter(line["error"] for line in lines if line["error"])),
        "interrupted_passes": sum(_interrupted(some) for some in taken),
        "tokens": sum(line["tokens"] for some in taken for line in some if "tokens" in line),
        "tokens_per_second": statistics.median(rates) if rates else None,
        "requests_per_second": len(good) / seconds if seconds else None,
        "goodput": sum(map(objective.met, good)) / seconds if seconds else None,
        "ttft_ms": percentiles(firsts),
        "itl_ms": percentiles(gaps),
        "latency_s": percentiles([line["seconds"] for line in good]),
        "latencies": sorted(round(line["seconds"], 4) for line in good),
    }


def final(lines: Sequence[Line]) -> list[Line]:
    """The requests of a pass, without those that were cut off and later made again."""
    good = {(n["id"], n["turn"]) for n in lines if n["type"] == "request" and n["error"] is None}
    return [
        line
        for line in lines
        if line["type"] == "request"
        and not (line["error"] in LOST and (line["id"], line["turn"]) in good)
    ]


def percentiles(values: Sequence[float]) -> dict[str, float] | None:
    """``p50``, ``p90``, ``p99`` and ``mean``, between values linearly; None without values."""
    if not values:
        return None
    # quantiles() wants two values of its own.
    cuts = statistics.quantiles([*values] * (2 if len(values) == 1 else 1), n=100,
                                method="inclusive")  # fmt: skip
    return {**{f"p{p}": cuts[p - 1] for p in PERCENTILES}, "mean": statistics.fmean(values)}


def first_token(line: Line) -> float | None:
    """Seconds to the first token."""
    return line["times"][0] if line["times"] else None


def inter_token(line: Line) -> list[float]:
    """Seconds before each token after the first event, or nothing where sizes are unknown."""
    times, sizes = line["times"], line["sizes"]
    if len(sizes) != len(times):
        return []
    return [
        (later - earlier) / size
        for (earlier, later), size in zip(pairwise(times), sizes[1:], strict=True)
        for _ in range(size)
    ]


def wall(lines: Iterable[Line]) -> float:
    """Seconds of a pass: of an interrupted segment, up to its last answer."""
    segments: dict[str, float] = {}
    ended: dict[str, float] = {}
    for line in lines:
        name = line["segment"]
        if line["type"] == "pass":
            ended[name] = line["wall"]
        else:
            segments[name] = max(segments.get(name, 0.0), line["start"] + line["seconds"])
    return sum({**segments, **ended}.values())


def rate(lines: Sequence[Line]) -> float | None:
    """Tokens per second of a pass; None without any."""
    tokens = sum(line["tokens"] for line in lines if line["type"] == "request")
    seconds = wall(lines)
    return tokens / seconds if tokens and seconds else None


def steps(line: Line) -> list[tuple[int, int]]:
    """(context length, tokens) of each engine step of a request after the prefill's.

    The last one is left out where the length limit cut it.
    """
    if line["error"] is not None or len(line["sizes"]) != len(line["times"]):
        return []
    position, found = (line["prompt_tokens"] or 0), []
    for number, size in enumerate(line["sizes"]):
        cut = number == len(line["sizes"]) - 1 and line["finish_reason"] == "length"
        if number and not cut:
            found.append((position, size))
        position += size
    return found


def _acceptance(rounds: Mapping[Pass, Sequence[Line]]) -> dict[str, Any]:
    counters: dict[tuple[str, str], AcceptanceStats] = {}
    sizes: dict[tuple[str, str], list[tuple[int, int]]] = {}
    for key, lines in rounds.items():
        name = (key.dataset, key.arm)
        for line in lines:
            if line["type"] == "request":
                sizes.setdefault(name, []).extend(steps(line))
            elif line["acceptance"] is not None:
                stats = AcceptanceStats.from_dict(line["acceptance"])
                old = counters.get(name)
                if old is None or old.num_speculative_tokens == stats.num_speculative_tokens:
                    counters[name] = stats + old if old is not None else stats
    found: dict[str, Any] = {}
    for (dataset, arm), taken in sizes.items():
        told = counters.get((dataset, arm))
        best = told or _streamed(taken)
        if best is None:
            continue
        found.setdefault(dataset, {})[arm] = {
            **best.to_dict(),
            "source": "the server's counters" if told else "streamed events",
            "histogram": list(best.histogram),
            "rate_per_position": list(best.rate_per_position or ()),
            "al_streamed": statistics.fmean(n for _, n in taken) if taken else None,
            "by_context": _by_context(taken),
        }
    return found


def _streamed(taken: Sequence[tuple[int, int]]) -> AcceptanceStats | None:
    """From the sizes of the events, where a server has no counters; None: no speculation."""
    most = max((size for _, size in taken), default=1)
    return AcceptanceStats.from_steps([n - 1 for _, n in taken], most - 1) if most > 1 else None


def _by_context(taken: Sequence[tuple[int, int]]) -> list[dict[str, Any]]:
    """AL between context lengths that double from 128 on."""
    bins: dict[int, list[int]] = {}
    for position, size in taken:
        low = 0 if position < 128 else 1 << (position.bit_length() - 1)
        bins.setdefault(low, []).append(size)
    return [
        {"from": low, "to": 2 * low or 128, "steps": len(sizes), "al": statistics.fmean(sizes)}
        for low, sizes in sorted(bins.items())
    ]


def _answers(taken: Mapping[int, Sequence[Line]]) -> dict[tuple[str, int], Any]:
    """Token ids of each prompt's turn, of the first round that has them.

    Of later turns too: they compare only while the turns before them are equal, which is
    what the comparison is about.
    """
    found: dict[tuple[str, int], Any] = {}
    for number in sorted(taken):
        for line in taken[number]:
            ok = line["type"] == "request" and line["error"] is None and line["token_ids"]
            if ok:
                found.setdefault((line["id"], line["turn"]), line["token_ids"])
    return found


def _interrupted(lines: Sequence[Line]) -> bool:
    whole = {line["segment"] for line in lines if line["type"] == "pass"}
    return any(line["segment"] not in whole or line.get("error") in LOST for line in lines)


def _level_order(level: str) -> tuple[str, float]:
    return level[0], float(level[1:])
