"""The side-by-side measurement: its arithmetic, and its talk with a worker."""

from __future__ import annotations

import sys

import pytest

from ci.local_bench import Side, summary
from dflash_plugin.errors import ReplayError


def run(number: int, side: str, seconds: float, al: float | None = None) -> dict[str, object]:
    return {
        "round": number, "prompt": "p", "side": side, "tokens": [1] * 60, "seconds": seconds,
        "cpu_seconds": 2 * seconds if side == "ours" else seconds, "al": al,
        "mean_drafted": al and al + 1, "peak_mb": 100.0 + number,
    }  # fmt: skip


def test_a_ratio_is_the_median_of_the_rounds_own_ratios():
    runs = [run(0, "ours", 1.0, 3.0), run(0, "public", 2.0)]
    runs += [run(1, "ours", 4.0, 5.0), run(1, "public", 4.0)]  # the machine was busy
    runs += [run(2, "public", 1.5), run(2, "ours", 1.0, 4.0)]
    found = summary(runs)
    assert found["public"]["ours_is_faster"] == 1.5
    assert found["public"]["ours_is_faster_in_cpu_time"] == 0.75
    assert found["ours"] == {
        "tokens_per_second": 60.0, "tokens_per_cpu_second": 30.0, "mean_al": 4.0,
        "mean_drafted": 5.0, "peak_mb": 102.0,
    }  # fmt: skip
    assert found["public"]["mean_al"] is found["public"]["mean_drafted"] is None
    assert found["public"]["tokens_per_second"] == 30.0


def worker(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def test_a_worker_is_asked_and_answers():
    code = (
        "import json, sys\nprint(json.dumps({'versions': {'torch': '2'}}), flush=True)\n"
        "for line in sys.stdin: print(json.dumps({'ids': [len(json.loads(line)['chat'])]}),"
        " flush=True)"
    )
    side = Side("ours", worker(code), {})
    try:
        assert side.versions == {"torch": "2"}
        assert side.ask(chat="four") == {"ids": [4]}
    finally:
        side.close()


def test_a_worker_that_ends_is_an_error():
    with pytest.raises(ReplayError, match="side 'public' ended with exit code 3"):
        Side("public", worker("raise SystemExit(3)"), {})
