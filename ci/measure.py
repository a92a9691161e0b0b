"""Faster: the same prompts on both servers in turn, A B A B, and the ratio of the two."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

from tqdm import tqdm

from dflash_plugin.backends.server import Completion, ServerClient

from .prompts import Prompt
from .records import FAILED, NOT_RUN, PASSED, Verdict

ARMS = ("base", "dflash")
_In = TypeVar("_In")
_Out = TypeVar("_Out")


def run_speed(
    base: ServerClient,
    dflash: ServerClient,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    rounds: int,
    concurrency: Sequence[int],
) -> dict[str, Any]:
    """Raw timings: per concurrency, per round, per arm, every request.

    One untimed request warms each server up first. Within a round the arms take
    turns, and which comes first alternates.
    """
    clients = {"base": base, "dflash": dflash}
    ids = [base.chat_prompt(prompt.text) for prompt in prompts]
    for client in clients.values():
        for width in concurrency:
            _run(client, ids[: max(width, 1)], 16, width)
    levels = []
    total = len(concurrency) * rounds * len(ARMS)
    with tqdm(total=total, desc="measure", unit="pass", disable=None) as bar:
        for width in concurrency:
            taken = []
            for number in range(rounds):
                order = ARMS if number % 2 == 0 else ARMS[::-1]
                passes = {}
                for arm in order:
                    wall, answers = _run(clients[arm], ids, max_tokens, width)
                    passes[arm] = {
                        "wall": wall,
                        "requests": [
                            {
                                "id": prompt.id,
                                "kind": prompt.kind,
                                "tokens": len(answer.token_ids),
                                "seconds": _finite(answer.duration),
                                "ttft": _finite(answer.ttft),
                                "itl": _finite(answer.inter_token_latency),
                            }
                            for prompt, answer in zip(prompts, answers, strict=True)
                        ],
                    }
                    bar.update()
                taken.append(passes)
            levels.append({"concurrency": width, "rounds": taken})
    return {"max_tokens": max_tokens, "prompts": len(prompts), "levels": levels}


def _run(
    client: ServerClient, ids: Sequence[Sequence[int]], max_tokens: int, width: int
) -> tuple[float, list[Completion]]:
    start = time.perf_counter()
    answers = in_parallel(lambda prompt: client.complete(prompt, max_tokens), ids, width)
    return time.perf_counter() - start, answers


def in_parallel(call: Callable[[_In], _Out], items: Sequence[_In], width: int) -> list[_Out]:
    """``call`` of every item, ``width`` at a time, in order."""
    pool = ThreadPoolExecutor(width)
    try:
        return list(pool.map(call, items))
    finally:
        # Never waiting: after Ctrl-C a request may end only once its server is stopped.
        pool.shutdown(wait=False, cancel_futures=True)


def summarise(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Per concurrency: median tokens/s, TTFT and inter-token latency, and ratios.

    ``speedup`` is the median over rounds of (dflash tokens/s) / (base tokens/s);
    ``spread`` its smallest and largest. ``by_kind`` the same per kind of prompt, from
    the requests' own durations. A level without rounds, or with an empty answer, is left
    out: it has no rate.
    """
    rows = []
    for level in raw["levels"]:
        requests = [r for taken in level["rounds"] for arm in ARMS for r in taken[arm]["requests"]]
        if not requests or any(not r["tokens"] for r in requests):
            continue
        ratios: list[float] = []
        by_kind: dict[str, list[float]] = {}
        for taken in level["rounds"]:
            ratios.append(_rate(taken["dflash"]) / _rate(taken["base"]))
            kinds = dict.fromkeys(r["kind"] for r in taken["base"]["requests"])
            for kind in kinds:
                ratio = _kind_rate(taken["dflash"], kind) / _kind_rate(taken["base"], kind)
                by_kind.setdefault(kind, []).append(ratio)
        row: dict[str, Any] = {
            "concurrency": level["concurrency"],
            "rounds": len(ratios),
            "speedup": statistics.median(ratios),
            "spread": [min(ratios), max(ratios)],
            "by_kind": {kind: statistics.median(values) for kind, values in by_kind.items()},
        }
        for arm in ARMS:
            requests = [r for taken in level["rounds"] for r in taken[arm]["requests"]]
            itl = [r["itl"] for r in requests if r["itl"] is not None]
            row[arm] = {
                "tokens_per_second": statistics.median(_rate(t[arm]) for t in level["rounds"]),
                "ttft_ms": 1e3 * statistics.median(r["ttft"] for r in requests),
                "itl_ms": 1e3 * statistics.median(itl) if itl else None,
            }
        rows.append(row)
    return rows


def judge_faster(summary: Sequence[Mapping[str, Any]]) -> Verdict:
    """Passed if the median ratio at batch 1 is above 1; every concurrency is evidence."""
    alone = next((row for row in summary if row["concurrency"] == 1), None)
    evidence = {"levels": list(summary)}
    if alone is None:
        return Verdict(NOT_RUN, "batch 1 was not measured", evidence)
    if alone["speedup"] > 1:
        return Verdict(PASSED, "", evidence)
    return Verdict(FAILED, f"batch 1: {alone['speedup']:.2f}x", evidence)


def _rate(taken: Mapping[str, Any]) -> float:
    return float(sum(r["tokens"] for r in taken["requests"]) / taken["wall"])


def _kind_rate(taken: Mapping[str, Any], kind: str) -> float:
    requests = [r for r in taken["requests"] if r["kind"] == kind]
    return float(sum(r["tokens"] for r in requests) / sum(r["seconds"] for r in requests))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
