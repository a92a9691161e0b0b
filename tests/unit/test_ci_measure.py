"""Speed: what is run in which order, and the ratios made of it."""

from __future__ import annotations

import threading
import time
from typing import Any

import pytest

from ci import measure
from ci.prompts import Prompt
from dflash_plugin.backends.server import Completion


def _arm(seconds: float, tokens: int = 10, itl: float | None = 0.01) -> dict[str, Any]:
    """One pass of two prompts; the second, "chat", takes three times as long as the first."""
    requests = [
        {"id": kind, "kind": kind, "tokens": tokens, "seconds": share * seconds, "ttft": 0.1,
         "itl": itl}
        for kind, share in (("maths", 0.25), ("chat", 0.75))
    ]  # fmt: skip
    return {"wall": seconds, "requests": requests}


def _raw(*rounds: tuple[float, float], concurrency: int = 1) -> dict[str, Any]:
    taken = [{"base": _arm(base), "dflash": _arm(dflash)} for base, dflash in rounds]
    return {"levels": [{"concurrency": concurrency, "rounds": taken}]}


def test_median_and_spread_of_the_rounds() -> None:
    (row,) = measure.summarise(_raw((3.0, 1.0), (2.0, 1.0), (8.0, 1.0)))
    assert (row["speedup"], row["spread"], row["rounds"]) == (3.0, [2.0, 8.0], 3)
    assert row["by_kind"] == {"maths": 3.0, "chat": 3.0}
    assert row["dflash"] == {"tokens_per_second": 20.0, "ttft_ms": 100.0, "itl_ms": 10.0}
    assert measure.judge_faster([row]).status == "passed"


def test_kinds_apart() -> None:
    raw = _raw((4.0, 4.0))
    first, second = raw["levels"][0]["rounds"][0]["dflash"]["requests"]
    first["seconds"], second["seconds"] = 0.5, 6.0
    (row,) = measure.summarise(raw)
    assert row["by_kind"] == {"maths": 2.0, "chat": 0.5}
    assert row["speedup"] == 1.0  # of the whole pass


def test_one_token_answers_have_no_inter_token_latency() -> None:
    raw = _raw((1.0, 1.0))
    for arm in raw["levels"][0]["rounds"][0].values():
        for request in arm["requests"]:
            request["itl"] = None
    assert measure.summarise(raw)[0]["base"]["itl_ms"] is None


@pytest.mark.parametrize(
    ("ratio", "status", "reason"),
    [(1.01, "passed", ""), (1.0, "failed", "batch 1: 1.00x"), (0.5, "failed", "batch 1: 0.50x")],
)
def test_faster(ratio: float, status: str, reason: str) -> None:
    verdict = measure.judge_faster(measure.summarise(_raw((ratio, 1.0))))
    assert (verdict.status, verdict.reason) == (status, reason)


def test_only_batch_1_is_judged() -> None:
    raw = {"levels": [*_raw((3.0, 1.0))["levels"], *_raw((1.0, 3.0), concurrency=4)["levels"]]}
    verdict = measure.judge_faster(measure.summarise(raw))
    assert verdict.status == "passed"
    assert [row["concurrency"] for row in verdict.evidence["levels"]] == [1, 4]


def _silent() -> dict[str, Any]:
    raw = _raw((3.0, 1.0))
    raw["levels"][0]["rounds"][0]["dflash"] = _arm(0.001, tokens=0)
    return raw


@pytest.mark.parametrize(
    "raw",
    [
        {"levels": []},
        {"levels": [{"concurrency": 1, "rounds": []}]},
        {"levels": [{"concurrency": 1, "rounds": [{a: {"requests": []} for a in measure.ARMS}]}]},
        _raw((9.0, 1.0), concurrency=4),
        _silent(),
    ],
    ids=["no levels", "no rounds", "no prompts", "no batch 1", "empty answers"],
)
def test_nothing_measured_is_not_run(raw: dict[str, Any]) -> None:
    verdict = measure.judge_faster(measure.summarise(raw))
    assert (verdict.status, verdict.reason) == ("not_run", "batch 1 was not measured")


class Client:
    """Writes down who was asked."""

    def __init__(self, name: str, log: list[str]) -> None:
        self.name, self.log = name, log

    def chat_prompt(self, text: str) -> list[int]:
        return [len(text)]

    def complete(self, prompt: list[int], max_tokens: int) -> Completion:
        self.log.append(f"{self.name}{max_tokens}")
        return Completion((1,), "length", (1,), (0.01,))


def test_arms_take_turns() -> None:
    log: list[str] = []
    raw = measure.run_speed(
        Client("b", log), Client("d", log), [Prompt("p", "chat", "?")],  # type: ignore[arg-type]
        max_tokens=32, rounds=3, concurrency=[1],
    )  # fmt: skip
    assert log == ["b16", "d16", *("b32", "d32"), *("d32", "b32"), *("b32", "d32")]
    (level,) = raw["levels"]
    assert [list(taken) for taken in level["rounds"]][1] == ["dflash", "base"]
    request = level["rounds"][0]["base"]["requests"][0]
    assert request["itl"] is None  # not NaN, which is no JSON


def test_in_parallel() -> None:
    together, most = threading.Semaphore(3), []

    def call(item: int) -> int:
        assert together.acquire(blocking=False)
        most.append(item)
        time.sleep(0.01)
        together.release()
        return item * 2

    assert measure.in_parallel(call, range(9), 3) == list(range(0, 18, 2))
    assert len(most) == 9


def test_in_parallel_does_not_wait_for_the_others_after_an_error() -> None:
    release = threading.Event()

    def call(item: int) -> None:
        if item == 0:
            raise KeyboardInterrupt
        release.wait(20)

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        measure.in_parallel(call, range(5), 2)
    assert time.monotonic() - began < 10
    release.set()
