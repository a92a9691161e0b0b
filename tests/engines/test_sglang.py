"""SGLang on the CPU: a cell of the newest release, and how a server behaves with DFlash.

They run on the release named with ``DFLASH_TEST_SGLANG=sglang-0.5.23``: its environment, with a
torch of its own, takes as long as they do.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from behaviour import (
    Duo,
    in_threads,
    metric,
    post,
    prepare,
    require_same_distribution,
    same_or_tie,
    serve_duo,
)
from cell_runs import harness

from ci import judge, replay
from dflash_plugin import matrix
from dflash_plugin.acceptance import AcceptanceStats

ASKED = os.environ.get("DFLASH_TEST_SGLANG")
RELEASE = ASKED or "sglang-0.5.23"
PAIR = "tiny-qwen3-mixed"
K = 7
CHUNK = 256
VARIANTS = [
    cell.variant.name
    for cell in matrix.load().cells
    if (cell.engine.id, cell.pair.id) == (RELEASE, PAIR) and not cell.not_run
]
pytestmark = pytest.mark.skipif(not ASKED, reason="not run: asks for DFLASH_TEST_SGLANG")

SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["sum", "list"]}, "ok": {"type": "boolean"}},
    "required": ["kind", "ok"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_cell(variant: str, tmp_path: Path) -> None:
    """The plugin's repairs; patched, where there is such a cell, without them."""
    run = harness(tmp_path, "check", f"{RELEASE}/{variant}/cpu/{PAIR}", "--profile", "tiny")
    assert run.exit_code == 0, run.output
    lossless, faithful = run.result["lossless"], run.result["faithful"]
    assert (lossless["status"], faithful["status"]) == ("passed", "passed")
    assert lossless["evidence"]["float32"]["tokens"] > 500
    blocks = faithful["evidence"]["blocks"]
    assert blocks["equal"] + blocks["tie"] == blocks["steps"] > 100
    assert faithful["evidence"]["drafts"] == faithful["evidence"]["drafts_reference"]


@pytest.fixture(scope="module")
def duo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Duo]:
    run = prepare(PAIR, tmp_path_factory.mktemp("duo"), release=RELEASE)
    with serve_duo(run, "--chunked-prefill-size", str(CHUNK)) as found:
        yield found


def require_reference(duo: Duo, prompts: list[list[int]], count: int) -> AcceptanceStats:
    """Answers as without speculation, every block and count as the reference's replay.

    Returns what the server said of its steps.
    """
    start, sequences = len(duo.blocks()), []
    before = duo.dflash.acceptance(K)
    for number, ids in enumerate(prompts):
        at = len(duo.blocks()) - start
        plain, fast = duo.base.complete(ids, count), duo.dflash.complete(ids, count)
        assert fast.token_ids == plain.token_ids, f"prompt {number} of {len(ids)} tokens"
        row = {"id": str(number), "prompt": ids, "generated": list(fast.token_ids)}
        sequences.append({**row, "record_start": at})
    stats = duo.dflash.acceptance(K) - before
    run = duo.run
    given = [{k: s[k] for k in ("id", "prompt", "generated")} for s in sequences]
    replayed = replay.replay(run.reference, run.target, run.draft, K, given)
    exact = {"blocks": duo.blocks(start), "sequences": sequences}
    blocks = judge.compare_blocks(exact, replayed)
    assert blocks["equal"] + blocks["tie"] == blocks["steps"] > 20, blocks
    assert stats.al == pytest.approx(replayed["al"], rel=0.01)
    return stats


def test_cold_and_warm_radix_cache_draft_alike(duo: Duo) -> None:
    prompts = [duo.ids(text) for text in duo.texts()[-6:]]
    duo.dflash.generate({"input_ids": [1], "sampling_params": {"max_new_tokens": 1}})
    requests.post(duo.dflash.base_url + "/flush_cache", timeout=60).raise_for_status()
    cached, stats = [], []
    for _ in range(2):
        stats.append(require_reference(duo, prompts, 32))
        body = {"input_ids": prompts[0], "sampling_params": {"max_new_tokens": 1}}
        cached.append(duo.dflash.generate(body)["meta_info"]["cached_tokens"])
    cold, warm = stats
    assert cached[0] > 0
    assert warm == cold
    assert cold.al is not None and cold.al > 1.3, "a draft that is never accepted shows nothing"


def test_prompts_beyond_the_chunk_and_every_window(duo: Duo) -> None:
    require_reference(duo, [duo.long_prompt(n) for n in (CHUNK - 1, CHUNK + 1, 700, 2000)], 40)


@pytest.mark.parametrize(
    "args",
    [
        ("--disable-overlap-schedule",),
        ("--page-size", "16"),
        ("--page-size", "16", "--disable-overlap-schedule", "--disable-radix-cache"),
    ],
    ids="".join,
)
def test_schedules_and_pages(args: tuple[str, ...], tmp_path: Path) -> None:
    run = prepare(PAIR, tmp_path, release=RELEASE)
    with serve_duo(run, *args, "--chunked-prefill-size", str(CHUNK), max_model_len=2048) as duo:
        prompts = [duo.ids(text) for text in duo.texts()[-6:]]
        # Lengths on both sides of a page's end, and prefixes that end inside of one.
        prompts += [prompts[0][:n] for n in range(31, 35)]
        require_reference(duo, [*prompts, duo.long_prompt(CHUNK + 33), *prompts[:2]], 32)


def test_acceptance_agrees_with_the_metrics(duo: Duo) -> None:
    before = duo.dflash.acceptance(K)
    counted = metric(duo.dflash, "sglang:spec_verify_calls_total")
    for text in duo.texts()[:4]:
        duo.dflash.complete(duo.ids(text), 32)
    steps = duo.dflash.acceptance(K) - before
    assert metric(duo.dflash, "sglang:spec_verify_calls_total") - counted == steps.drafts > 0


def test_sixteen_requests_of_which_some_are_aborted(duo: Duo) -> None:
    prompts = [duo.ids(text) for text in (duo.texts() * 16)[:16]]
    prompts = [ids[: len(ids) - i % 3] for i, ids in enumerate(prompts)]
    plain = [duo.base.complete(ids, 40).token_ids for ids in prompts]

    def abort(ids: list[int]) -> None:
        body = {"input_ids": ids, "stream": True}
        body["sampling_params"] = {"max_new_tokens": 1500, "temperature": 0.0, "ignore_eos": True}
        url = duo.dflash.base_url + "/generate"
        with requests.post(url, json=body, stream=True, timeout=60) as answer:
            lines = answer.iter_lines()
            for _ in range(5):
                next(lines)

    calls = [
        (lambda ids=ids: abort(ids))
        if i % 4 == 3
        else (lambda ids=ids: duo.dflash.complete(ids, 40))
        for i, ids in enumerate(prompts)
    ]
    fast = in_threads(calls, stagger=0.03)
    for number, (ids, one, other) in enumerate(zip(prompts, plain, fast, strict=True)):
        assert not isinstance(other, Exception), other
        if number % 4 != 3:
            assert same_or_tie(duo, ids, one, other.token_ids), f"request {number}"
    # Refused while anything runs or waits.
    url = duo.dflash.base_url + "/flush_cache"
    assert requests.post(url, params={"timeout": 30}, timeout=60).status_code == 200


def test_sampled_answers_follow_the_targets_distribution(duo: Duo) -> None:
    require_same_distribution(duo, duo.ids(duo.texts()[5]), 96)


def test_json_schema(duo: Duo) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    start = len(duo.blocks())
    for text in duo.texts()[:4]:
        body = {"prompt": duo.ids(text), "max_tokens": 96, "response_format": form}
        plain, fast = post(duo.base, body), post(duo.dflash, body)
        assert fast["text"] == plain["text"]
        assert fast["finish_reason"] == plain["finish_reason"]
        if fast["finish_reason"] == "stop":
            assert set(json.loads(fast["text"])) == {"kind", "ok"}
    assert duo.blocks(start), "nothing was drafted under the grammar"


def test_logprobs(duo: Duo) -> None:
    for text in duo.texts()[:4]:
        body = {"prompt": duo.ids(text), "max_tokens": 24, "logprobs": 3}
        plain, fast = post(duo.base, body), post(duo.dflash, body)
        assert fast["token_ids"] == plain["token_ids"]
        ours, theirs = fast["logprobs"], plain["logprobs"]
        assert ours["tokens"] == theirs["tokens"]
        assert ours["token_logprobs"] == pytest.approx(theirs["token_logprobs"], abs=1e-3)
        assert len(ours["top_logprobs"]) == len(fast["token_ids"])
