"""Advice on K, on a simulated engine whose every rate is known."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dflash_plugin.bench import advice
from dflash_plugin.errors import UsageError

SHARES = (0.7, 0.5, 0.35, 0.25, 0.15, 0.1, 0.06, 0.03)
BASE_STEP = 0.020


def al(k):
    return 1 + sum(SHARES[:k])


def step(concurrency, k):
    """Seconds: a fixed cost, the draft's, and a verify that grows with its width."""
    return BASE_STEP + 0.004 + 0.0006 * concurrency * (k + 1)


def speed(concurrency, k):
    return concurrency * al(k) / step(concurrency, k)


def base(concurrency):
    return concurrency / (BASE_STEP + 0.0006 * concurrency)


def lines(arm, concurrency, rate, number, k=0):
    where = {"dataset": "d", "level": f"c{concurrency}", "round": number, "arm": arm}
    stats = None
    if k:
        stats = {"drafts": 10000, "accepted_per_position": [int(10000 * s) for s in SHARES[:k]]}
    return [
        {"type": "request", **where, "segment": "s", "id": "p", "turn": 0, "last": True,
         "start": 0.0, "seconds": 1.0, "tokens": 1000, "token_ids": None, "sizes": [],
         "times": [], "prompt_tokens": None, "finish_reason": "stop", "error": None},
        {"type": "pass", **where, "segment": "s", "wall": 1000 / rate, "acceptance": stats},
    ]  # fmt: skip


def sweep(values, widths=(1, 4, 16, 64), *, check=False, first=0, slower=1.0):
    found = []
    for number, k in enumerate(values, first):
        for width in widths:
            found += lines("base", width, base(width) / slower, number)
            arm = advice.arm_name(k, check=check)
            found += lines(arm, width, speed(width, k) / slower, number, k)
    return found


def test_every_k_is_predicted_from_a_few():
    model = advice.fit(sweep(advice.first_values(8)))
    for width in (1, 4, 16, 64):
        for k in range(1, 9):
            assert model.rate(width, k) == pytest.approx(speed(width, k), rel=0.01)


def test_the_best_k_falls_with_concurrency_and_loses_at_last():
    values = advice.first_values(8)
    model = advice.fit(sweep(values))
    chosen = model.best(8)
    assert len(chosen) == 3
    records = sweep(values) + sweep(chosen, check=True, first=len(values))
    found = advice.advise(records, 8)
    by_width = {row["concurrency"]: row for row in found["levels"]}
    assert by_width[1]["k"] >= by_width[16]["k"]
    for width, row in by_width.items():
        assert row["k"] in chosen
        assert row["measured"] == pytest.approx(speed(width, row["k"]), rel=0.01)
        assert row["pays"] == (speed(width, row["k"]) > base(width))
    expected = [w for w in by_width if all(speed(w, k) <= base(w) for k in chosen)]
    assert found["loses_from"] == (min(expected) if expected else None)
    assert all(abs(check["error"]) < 0.01 for check in found["checks"])
    assert len(advice.text(found)) == 5


def test_a_machine_that_slows_down_between_groups_does_not_count():
    steady = advice.fit(sweep([1, 4]) + sweep([8], first=2))
    slowed = advice.fit(sweep([1, 4]) + sweep([8], first=2, slower=3.0))
    for width in (1, 64):
        ratio = slowed.rate(width, 8) / slowed.rate(width, 1)
        assert ratio == pytest.approx(steady.rate(width, 8) / steady.rate(width, 1), rel=0.01)


def test_without_base_or_counters_there_is_no_advice():
    alone = [line for line in sweep([1, 4]) if line["arm"] != "base"]
    with pytest.raises(UsageError, match="no K"):
        advice.fit(alone)


@given(st.integers(1, 40))
def test_first_values_hold_both_ends(most):
    values = advice.first_values(most)
    assert values[0] == 1
    assert values[-1] == most
    assert values == sorted(set(values))


KEY = {"target": "t", "draft": "d", "engine": "vllm 1", "hardware": "CPU"}


def test_stored_advice_is_read_back_by_pair_engine_and_machine(monkeypatch, tmp_path):
    monkeypatch.setenv("DFLASH_CACHE", str(tmp_path))
    advice.store(KEY, advice.advise(sweep([1, 4, 8]), 8))
    assert advice.stored(KEY, 1)["k"] == advice.stored(KEY, 3)["k"]
    assert advice.stored(KEY, 1000)["concurrency"] == 64
    with pytest.raises(UsageError, match="engine vllm 2"):
        advice.stored({**KEY, "engine": "vllm 2"}, 1)


@pytest.mark.parametrize("content", ["", "{}", '{"levels": []}', '{"levels": [{"k": "x"}]}'])
def test_damaged_advice_is_named(monkeypatch, tmp_path, content):
    monkeypatch.setenv("DFLASH_CACHE", str(tmp_path))
    path = advice.path_of(KEY)
    path.parent.mkdir()
    path.write_text(content)
    with pytest.raises(UsageError, match="not advice"):
        advice.stored(KEY, 1)
