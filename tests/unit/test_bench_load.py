"""The load generator against a server that answers at once, or wrongly, or never."""

from __future__ import annotations

import asyncio
import json
import time

import pytest
from bench_server import items, plan, stub

from dflash_plugin.bench import analysis, load, records, run
from dflash_plugin.bench.client import Answer, Client, Sampling
from dflash_plugin.bench.sides import ServerSide
from dflash_plugin.errors import RequestError, UsageError

SAMPLING = Sampling(8)


def one_pass(url, count=6, level="c2", *, model="stub", turns=1, **client_options):
    noted = []

    async def main():
        async with Client(url, model, **client_options) as client:
            return await load.run(
                client,
                items(count, turns),
                records.Level.parse(level),
                SAMPLING,
                lambda *values: noted.append(values),
            )

    wall = asyncio.run(main())
    return wall, noted


def answers(noted) -> list[Answer]:
    return [answer for _, _, _, answer in noted]


def test_every_prompt_is_asked_once_with_ids_and_times():
    with stub(tokens=9, per_event=4) as url:
        _, noted = one_pass(url)
    assert sorted(item.id for item, *_ in noted) == [f"p{i}" for i in range(6)]
    for answer in answers(noted):
        assert answer.error is None
        assert answer.token_ids == list(range(9))
        assert answer.sizes == [1, 4, 4]
        assert len(answer.times) == 3
        assert answer.times == sorted(answer.times)
        assert answer.seconds >= answer.times[-1]
        assert answer.finish_reason == "length"
        assert answer.text == " word" * 9


def test_a_server_that_streams_no_ids_is_counted_by_its_usage():
    with stub(tokens=9, per_event=4, ids=False) as url:
        _, refused = one_pass(url)
        _, noted = one_pass(url, token_ids=False)
    assert {answer.error for answer in answers(refused)} == {"http_400"}
    for answer in answers(noted):
        assert (answer.error, answer.token_ids) == (None, None)
        assert answer.sizes == [1, 4, 4]
        assert answer.tokens == 9


def test_turns_follow_each_other_with_the_answers_between():
    asked = []

    class Spy:
        async def answer(self, messages, sampling):
            asked.append([dict(m) for m in messages])
            return Answer(text="so", tokens=1)

    one = items(1, turns=2)
    asyncio.run(load.run(Spy(), one, records.Level(concurrency=1), SAMPLING, lambda *_: None))
    assert [m["role"] for m in asked[1]] == ["user", "assistant", "user"]
    assert asked[1][1]["content"] == "so"


def test_a_failed_turn_ends_its_conversation_only():
    class Fails:
        async def answer(self, messages, sampling):
            return (
                Answer(error="http_500") if "of 0" in messages[0]["content"] else Answer(tokens=1)
            )

    noted = []
    asyncio.run(
        load.run(
            Fails(), items(3, 2), records.Level(concurrency=1), SAMPLING,
            lambda *values: noted.append(values),
        )
    )  # fmt: skip
    assert [(item.id, turn) for item, turn, *_ in noted] == [
        ("p0", 0), ("p1", 0), ("p1", 1), ("p2", 0), ("p2", 1),
    ]  # fmt: skip


def test_concurrency_is_kept():
    class Counts:
        now = most = 0

        async def answer(self, messages, sampling):
            self.now += 1
            self.most = max(self.most, self.now)
            await asyncio.sleep(0.001)
            self.now -= 1
            return Answer(tokens=1)

    client = Counts()
    asyncio.run(
        load.run(client, items(40), records.Level(concurrency=7), SAMPLING, lambda *_: None)
    )
    assert client.most == 7


def test_open_loop_does_not_wait_for_answers():
    starts = []

    class Slow:
        async def answer(self, messages, sampling):
            await asyncio.sleep(0.2)
            return Answer(tokens=1)

    level = records.Level(rate=200)
    noted = lambda _item, _turn, start, _answer: starts.append(start)  # noqa: E731
    began = time.perf_counter()
    asyncio.run(load.run(Slow(), items(30), level, SAMPLING, noted, seed=3))
    assert time.perf_counter() - began < 1.5  # one after the other would take 6 s
    assert len(starts) == 30
    assert max(starts) > 0.03


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (500, "http_500"),
        (429, "http_429"),
        ("malformed", "malformed"),
        ("cut", "cut_off"),
        ("error", "server_error"),
        ("empty", "empty"),
    ],
)
def test_faults_are_counted_and_the_rest_goes_on(fault, error):
    with stub(fault_every=3, fault=fault) as url:
        _, noted = one_pass(url, 9)
    assert [a.error for a in answers(noted)].count(error) == 3
    assert [a.error for a in answers(noted)].count(None) == 6
    assert all(a.detail or a.error == "empty" for a in answers(noted) if a.error)


def test_a_hanging_answer_is_a_timeout_that_keeps_what_came():
    with stub(fault_every=4, fault="hang") as url:
        _, noted = one_pass(url, 4, stall=0.3)
    (late,) = (a for a in answers(noted) if a.error)
    assert late.error == "timeout"
    assert late.tokens == 1


def test_a_slow_stream_is_measured_not_an_error():
    with stub(tokens=5, delay=0.02) as url:
        _, noted = one_pass(url, 2, stall=0.5)
    for answer in answers(noted):
        assert answer.error is None
        assert answer.times[-1] - answer.times[0] >= 0.07


def test_a_server_that_dies_ends_the_pass_and_nothing_is_lost():
    noted = []

    async def main(url):
        async with Client(url, "stub") as client:
            await load.run(
                client, items(50), records.Level(concurrency=2), SAMPLING,
                lambda *values: noted.append(values),
            )  # fmt: skip

    with stub(fault_every=9, fault="die") as url, pytest.raises(RequestError, match="in a row"):
        asyncio.run(main(url))
    assert [a.error for a in answers(noted)].count(None) in (7, 8)  # one may have been on its way
    assert len(noted) < 20


def test_ctrl_c_notes_what_was_under_way():
    noted = []

    async def main(url):
        async with Client(url, "stub") as client:
            work = asyncio.ensure_future(
                load.run(
                    client, items(9), records.Level(concurrency=2), SAMPLING,
                    lambda *values: noted.append(values),
                )
            )  # fmt: skip
            await asyncio.sleep(0.3)
            work.cancel()
            with pytest.raises(asyncio.CancelledError):
                await work

    with stub(tokens=100, delay=0.05) as url:
        asyncio.run(main(url))
    assert [a.error for a in answers(noted)] == ["interrupted"] * 2
    assert all(a.tokens > 0 for a in answers(noted))


def measured(tmp_path, what, urls, *, resume=False):
    store = records.Store(tmp_path, what.settings({}), resume=resume)
    with store:
        sides = {name: ServerSide(url, "stub", timeout=20, stall=5) for name, url in urls.items()}
        run.measure(what, sides, store)
    return store


def test_a_run_measures_every_arm_and_writes_it_down(tmp_path):
    what = plan(4, rounds=2)
    with stub(tokens=9) as base, stub(tokens=9, per_event=4) as fast:
        measured(tmp_path, what, {"base": base, "dflash": fast})
    lines = records.read(tmp_path / "records.jsonl")
    assert len([line for line in lines if line["type"] == "request"]) == 2 * 2 * 4
    order = list(records.passes(lines))
    assert [(p.round, p.arm) for p in order] == [
        (0, "base"), (0, "dflash"), (1, "dflash"), (1, "base"),
    ]  # fmt: skip
    summary = analysis.summarise(what.settings({}), lines)
    level = summary["datasets"]["set"]["c2"]
    assert level["arms"]["dflash"]["same_tokens"] == {"equal": 4, "compared": 4}
    assert level["speedup"]["dflash"]["rounds"] == 2
    found = summary["acceptance"]["set"]
    assert set(found) == {"dflash"}
    assert found["dflash"]["al"] == 4.0  # the stub says that all it drafts is accepted
    assert found["dflash"]["histogram"] == [0, 0, 0, 16]
    assert found["dflash"]["al_streamed"] == 4.0


def test_a_run_is_continued_where_it_stopped(tmp_path):
    what = plan(12)
    with stub(tokens=5) as base:
        with (
            stub(tokens=5, fault_every=8, fault="die") as fast,
            pytest.raises(RequestError, match="in a row"),
        ):
            measured(tmp_path, what, {"base": base, "dflash": fast})
        before = records.read(tmp_path / "records.jsonl")
        path = tmp_path / "records.jsonl"
        path.write_bytes(path.read_bytes() + b'{"type": "request", "da')  # killed while writing
        with stub(tokens=5) as fast:
            measured(tmp_path, what, {"base": base, "dflash": fast}, resume=True)
    after = records.read(path)
    assert after[: len(before)] == before
    good = [
        (line["arm"], line["id"])
        for line in after
        if line["type"] == "request" and line["error"] is None
    ]
    assert len(good) == len(set(good)) == 24
    numbers = analysis.summarise(what.settings({}), after)["datasets"]["set"]["c2"]["arms"]
    assert numbers["dflash"]["interrupted_passes"] == 1
    assert numbers["base"]["interrupted_passes"] == 0


def test_an_old_run_is_not_mixed_with_another(tmp_path):
    what = plan(2, arms=("dflash",))
    with stub() as url:
        measured(tmp_path, what, {"dflash": url})
    with pytest.raises(UsageError, match="earlier run"):
        records.Store(tmp_path, what.settings({}))
    other = plan(3, arms=("dflash",)).settings({})
    with pytest.raises(UsageError, match="datasets was"):
        records.Store(tmp_path, other, resume=True)


def test_more_levels_may_be_added(tmp_path):
    with stub() as url:
        measured(tmp_path, plan(2, arms=("dflash",)), {"dflash": url})
        more = plan(2, arms=("dflash",), levels=("c1", "c2"))
        store = measured(tmp_path, more, {"dflash": url}, resume=True)
    assert {p.level for p in records.passes(store.lines)} == {"c1", "c2"}


def test_a_damaged_line_is_named(tmp_path):
    path = tmp_path / "records.jsonl"
    path.write_text("{}\n")
    with pytest.raises(UsageError, match=r"records.jsonl:1: damaged"):
        records.read(path)


def test_the_warm_up_shows_a_server_that_refuses(tmp_path):
    what = plan(2, arms=("dflash",))
    with (
        stub(fault_every=1, fault=500) as url,
        pytest.raises(RequestError, match="warm-up failed: http_500"),
    ):
        measured(tmp_path, what, {"dflash": url})


def test_a_wrong_model_name_says_what_is_served():
    with stub() as url:
        assert ServerSide(url, None, timeout=1, stall=1).model == "stub"
        with pytest.raises(RequestError, match="serves stub, not other"):
            ServerSide(url, "other", timeout=1, stall=1)


def test_run_json_names_what_decides_the_numbers(tmp_path):
    what = plan(2)
    with records.Store(tmp_path, what.settings({"engine": "x"})):
        pass
    saved = json.loads((tmp_path / "run.json").read_text())
    assert saved["template"] == "chat, thinking off"
    assert saved["datasets"][0]["digest"] == what.datasets[0].digest
    assert saved["sampling"]["temperature"] == 0.0
    assert saved["engine"] == "x"
