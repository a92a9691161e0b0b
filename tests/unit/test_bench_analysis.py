"""Numbers from records."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dflash_plugin.bench import analysis


def request(**values):
    line = {
        "type": "request", "dataset": "d", "level": "c1", "round": 0, "arm": "dflash",
        "segment": "s", "id": "p", "turn": 0, "last": True, "start": 0.0, "seconds": 1.0,
        "token_ids": [1, 2, 3, 4], "sizes": [1, 3], "times": [0.2, 0.8], "tokens": 4,
        "prompt_tokens": 126, "finish_reason": "stop", "error": None, "detail": "",
    }  # fmt: skip
    return {**line, **values}


def ended(**values):
    line = {
        "type": "pass", "dataset": "d", "level": "c1", "round": 0, "arm": "dflash",
        "segment": "s", "wall": 2.0, "acceptance": None,
    }  # fmt: skip
    return {**line, **values}


def test_a_gap_is_shared_by_the_tokens_after_it():
    assert analysis.inter_token(request()) == pytest.approx([0.2, 0.2, 0.2])
    assert analysis.inter_token(request(sizes=[])) == []


def test_the_wall_of_an_interrupted_segment_ends_with_its_last_answer():
    lines = [
        request(segment="a", start=1.0, seconds=0.5),
        request(segment="b", start=0.0, seconds=9.0),
        ended(segment="b", wall=3.0),
    ]
    assert analysis.wall(lines) == 4.5
    assert analysis.rate(lines) == pytest.approx(8 / 4.5)


def test_steps_know_their_context_and_leave_out_a_cut_one():
    assert analysis.steps(request()) == [(127, 3)]
    assert analysis.steps(request(finish_reason="length")) == []
    assert analysis.steps(request(error="cut_off")) == []


def test_speed_up_is_the_median_of_rounds():
    lines = []
    for number, seconds in enumerate((1.0, 2.0, 4.0)):
        lines += [
            request(arm="base", round=number), ended(arm="base", round=number, wall=4.0),
            request(round=number), ended(round=number, wall=seconds),
        ]  # fmt: skip
    found = analysis.summarise({}, lines)["datasets"]["d"]["c1"]["speedup"]["dflash"]
    assert found == {"median": 2.0, "min": 1.0, "max": 4.0, "rounds": 3}


def test_goodput_counts_what_keeps_the_objective():
    lines = [request(id="a"), request(id="b", times=[0.5, 0.8]), request(id="c", error="timeout")]
    objective = analysis.Objective(ttft_ms=300)
    found = analysis.arm_numbers([[*lines, ended()]], objective)
    assert found["goodput"] == 0.5
    assert found["requests_per_second"] == 1.0
    assert found["errors"] == {"timeout": 1}


def test_acceptance_by_position_and_context():
    stats = {"drafts": 10, "accepted_per_position": [6, 3]}
    lines = [request(), request(id="q", prompt_tokens=300), ended(acceptance=stats)]
    found = analysis.summarise({}, lines)["acceptance"]["d"]["dflash"]
    assert found["al"] == pytest.approx(1.9)
    assert found["histogram"] == [4, 3, 3]
    assert found["rate_per_position"] == [0.6, 0.3]
    assert [(row["from"], row["to"], row["al"]) for row in found["by_context"]] == [
        (0, 128, 3.0), (256, 512, 3.0),
    ]  # fmt: skip


def test_without_counters_the_streamed_events_tell():
    lines = [request(sizes=[1, 3, 1], times=[0.1, 0.2, 0.3], tokens=5), ended()]
    lines += [request(arm="base", sizes=[1, 1], times=[0.1, 0.2]), ended(arm="base")]
    found = analysis.summarise({}, lines)["acceptance"]["d"]
    assert set(found) == {"dflash"}
    assert found["dflash"]["al"] == 2.0
    assert found["dflash"]["source"] == "streamed events"


def test_levels_come_in_order():
    lines = [request(level=level) for level in ("c16", "c2", "c1")]
    assert list(analysis.summarise({}, lines)["datasets"]["d"]) == ["c1", "c2", "c16"]


def test_different_tokens_are_seen():
    lines = [request(arm="base"), request(token_ids=[1, 2, 3, 5])]
    level = analysis.summarise({}, lines)["datasets"]["d"]["c1"]
    assert level["arms"]["dflash"]["same_tokens"] == {"equal": 0, "compared": 1}


def test_nothing_measured_is_none_not_zero():
    found = analysis.arm_numbers([[request(error="refused", tokens=0, times=[], sizes=[])]],
                                 analysis.Objective())  # fmt: skip
    assert found["tokens_per_second"] is None
    assert found["ttft_ms"] is None


@given(st.lists(st.floats(0, 1e6), min_size=1, max_size=50))
def test_percentiles_lie_within_and_rise(values):
    found = analysis.percentiles(values)
    cuts = [found["p50"], found["p90"], found["p99"]]
    bounds = [min(values), *cuts, max(values)]
    assert bounds == pytest.approx(sorted(bounds))
