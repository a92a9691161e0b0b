"""What a server is asked for in production behaves with DFlash as without.

On the release in ``DFLASH_TEST_ENGINE`` (default: the newest), a tiny pair, float32.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import requests
from behaviour import (
    ARGS,
    PAIR,
    RELEASE,
    Duo,
    K,
    in_threads,
    metric,
    post,
    prepare,
    require_same_distribution,
    same_or_tie,
    serve_duo,
    stock_environment,
    write_lora,
)

from ci import judge, replay
from ci.check import settled
from ci.serve import serve_all
from dflash_plugin.acceptance import AcceptanceStats
from dflash_plugin.errors import EngineExitedError

LENGTHS = (256, 512, 1024, 2048, 4096)
SCHEMA = {
    "type": "object",
    "properties": {"kind": {"enum": ["sum", "list"]}, "ok": {"type": "boolean"}},
    "required": ["kind", "ok"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def duo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Duo]:
    with serve_duo(prepare(PAIR, tmp_path_factory.mktemp("duo")), *ARGS) as found:
        yield found


def counted(duo: Duo) -> AcceptanceStats:
    return settled(duo.dflash, K)


def test_cold_and_warm_prefix_cache_draft_alike(duo: Duo) -> None:
    prompts = [duo.ids(text) for text in duo.texts()[-8:]]
    rounds = []
    for _ in range(2):
        before, blocks, answers = counted(duo), {}, []
        hits = metric(duo.dflash, "vllm:prefix_cache_hits_total")
        for number, ids in enumerate(prompts):
            start = len(duo.blocks())
            answers.append(duo.dflash.complete(ids, 48).token_ids)
            # A prompt that is prefilled in chunks is drafted for after each of them.
            for block in duo.blocks(start):
                if block["position"] >= len(ids):
                    blocks[number, block["position"]] = block["draft"]
        rounds.append(
            {
                "answers": answers,
                "al": (counted(duo) - before).al,
                "blocks": blocks,
                "hits": metric(duo.dflash, "vllm:prefix_cache_hits_total") - hits,
            }
        )
    cold, warm = rounds
    assert warm["hits"] > 0
    assert warm["hits"] > cold["hits"]
    assert warm["answers"] == cold["answers"]
    assert len(cold["blocks"]) > 50
    assert warm["blocks"] == cold["blocks"]
    assert warm["al"] == pytest.approx(cold["al"], rel=0.01)
    assert cold["al"] > 1.3, "a draft that is never accepted shows nothing"


def test_acceptance_by_context_length_is_the_references(duo: Duo) -> None:
    """256 … 4096 tokens, past every window, prefilled in chunks."""
    sequences, record, stats = [], [], []
    for length in LENGTHS:
        ids, start = duo.long_prompt(length - 64), len(duo.blocks())
        before = counted(duo)
        plain, fast = duo.base.complete(ids, 48), duo.dflash.complete(ids, 48)
        stats.append(counted(duo) - before)
        sequences.append(
            {
                "id": str(length),
                "kind": str(length),
                "prompt": ids,
                "base": list(plain.token_ids),
                "generated": list(fast.token_ids),
                "chunk_sizes": list(fast.chunk_sizes),
                "record_start": len(record),
            }
        )
        record += duo.blocks(start)
    assert all(s["base"] == s["generated"] for s in sequences)
    given = [{k: s[k] for k in ("id", "prompt", "generated")} for s in sequences]
    run = duo.run
    replayed = replay.replay(run.reference, run.target, run.draft, K, given)
    blocks = judge.compare_blocks({"blocks": record, "sequences": sequences}, replayed)
    assert blocks["equal"] + blocks["tie"] == blocks["steps"] > 20, blocks
    for ours, theirs in zip(stats, replayed["sequences"], strict=True):
        accepted = [step["accepted"] for step in theirs["steps"]]
        reference = AcceptanceStats.from_steps(accepted, K)
        assert ours.al == pytest.approx(reference.al, rel=0.01), theirs["id"]


def test_sixteen_staggered_requests(duo: Duo) -> None:
    prompts = [duo.ids(text) for text in (duo.texts() * 16)[:16]]
    prompts = [ids[: len(ids) - i % 3] for i, ids in enumerate(prompts)]
    plain = [duo.base.complete(ids, 40).token_ids for ids in prompts]
    calls = [lambda ids=ids: duo.dflash.complete(ids, 40).token_ids for ids in prompts]
    fast = in_threads(calls, stagger=0.03)
    for ids, one, other in zip(prompts, plain, fast, strict=True):
        assert not isinstance(other, Exception), other
        assert same_or_tie(duo, ids, one, other)


def test_aborted_streams_leave_nothing_behind(duo: Duo) -> None:
    prompt = duo.ids(duo.texts()[len(duo.texts()) // 2])
    body = {"model": "target", "prompt": prompt, "max_tokens": 1500, "temperature": 0.0}
    for _ in range(4):
        body["ignore_eos"] = True
        answer = requests.post(
            duo.dflash.base_url + "/v1/completions",
            json={**body, "stream": True},
            stream=True,
            timeout=60,
        )
        lines = answer.iter_lines()
        for _ in range(3):
            next(lines)
        answer.close()
    ids = duo.ids(duo.texts()[0])
    assert duo.dflash.complete(ids, 32).token_ids == duo.base.complete(ids, 32).token_ids
    for _ in range(100):
        if metric(duo.dflash, "vllm:num_requests_running") == 0:
            break
        time.sleep(0.1)
    assert metric(duo.dflash, "vllm:num_requests_running") == 0
    assert metric(duo.dflash, "vllm:num_requests_waiting") == 0


def test_stop_strings(duo: Duo) -> None:
    stopped = 0
    for text in duo.texts()[:8]:
        ids = duo.ids(text)
        answer = post(duo.base, {"prompt": ids, "max_tokens": 48})["text"]
        for at in (len(answer) // 3, len(answer) // 2):
            stop = answer[at : at + 3]
            if not stop.strip():
                continue
            body = {"prompt": ids, "max_tokens": 48, "stop": [stop]}
            plain, fast = post(duo.base, body), post(duo.dflash, body)
            for key in ("text", "finish_reason", "stop_reason"):
                assert fast[key] == plain[key]
            stopped += plain["finish_reason"] == "stop"
    assert stopped >= 4


def test_length_limits_are_exact(duo: Duo) -> None:
    ids = duo.ids(duo.texts()[3])
    for count in (1, 2, 3, 5, 8, 13):
        body = {"prompt": ids, "max_tokens": count, "ignore_eos": True}
        plain, fast = post(duo.base, body), post(duo.dflash, body)
        assert fast["token_ids"] == plain["token_ids"]
        assert len(fast["token_ids"]) == count
        assert fast["finish_reason"] == "length"


def test_several_answers_to_one_prompt(duo: Duo) -> None:
    body = {"prompt": duo.ids(duo.texts()[2]), "max_tokens": 24, "n": 3, "ignore_eos": True}
    found = post(duo.dflash, {**body, "temperature": 1.0})["choices"]
    assert sorted(choice["index"] for choice in found) == [0, 1, 2]
    assert [len(choice["token_ids"]) for choice in found] == [24] * 3
    assert len({tuple(choice["token_ids"]) for choice in found}) > 1


def test_sampled_answers_follow_the_targets_distribution(duo: Duo) -> None:
    require_same_distribution(duo, duo.ids(duo.texts()[5]), 128)


def test_logprobs(duo: Duo) -> None:
    for text in duo.texts()[:4]:
        body = {"prompt": duo.ids(text), "max_tokens": 24, "logprobs": 3}
        plain, fast = post(duo.base, body), post(duo.dflash, body)
        assert fast["token_ids"] == plain["token_ids"]
        ours, theirs = fast["logprobs"], plain["logprobs"]
        assert ours["tokens"] == theirs["tokens"]
        assert ours["token_logprobs"] == pytest.approx(theirs["token_logprobs"], abs=1e-3)
        assert len(ours["top_logprobs"]) == len(fast["token_ids"])


def test_json_schema(duo: Duo) -> None:
    form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": SCHEMA}}
    before = counted(duo)
    for text in duo.texts()[:4]:
        body = {"prompt": duo.ids(text), "max_tokens": 96, "response_format": form}
        plain, fast = post(duo.base, body), post(duo.dflash, body)
        assert fast["text"] == plain["text"]
        assert fast["finish_reason"] == plain["finish_reason"]
        if fast["finish_reason"] == "stop":
            assert set(json.loads(fast["text"])) == {"kind", "ok"}
    assert counted(duo) != before, "nothing was drafted under the grammar"


def test_lora_and_no_lora(tmp_path: Path) -> None:
    run = prepare(PAIR, tmp_path)
    adapter = write_lora(tmp_path / "lora", run.target)
    args = ("--enable-lora", "--max-lora-rank", "8", "--lora-modules", f"tuned={adapter}")
    try:
        with serve_duo(run, *args, max_model_len=1024) as duo:
            texts = duo.texts()[:4]
            answers = {}
            for model in ("target", "tuned"):
                for text in texts:
                    body = {"prompt": duo.ids(text), "max_tokens": 32}
                    plain = post(duo.base, body, model=model)["token_ids"]
                    assert post(duo.dflash, body, model=model)["token_ids"] == plain
                    answers[model, text] = plain
            assert any(answers["target", text] != answers["tuned", text] for text in texts)
    except EngineExitedError as err:
        if err.drafting:
            raise
        pytest.skip(f"{RELEASE} does not serve LoRA on the CPU, with or without: {err.cause}")


def test_two_ranks(tmp_path: Path) -> None:
    """Tensor parallel over two CPU processes."""
    run = prepare(PAIR, tmp_path)
    try:
        with serve_duo(run, "--tensor-parallel-size", "2", max_model_len=1024) as duo:
            for text in duo.texts()[:6]:
                ids = duo.ids(text)
                plain, fast = duo.base.complete(ids, 32), duo.dflash.complete(ids, 32)
                assert same_or_tie(duo, ids, plain.token_ids, fast.token_ids)
            assert counted(duo).al > 1.3
    except EngineExitedError as err:
        if err.drafting:
            raise
        pytest.skip(f"{RELEASE} does not run two CPU ranks here: {err.cause}")


def test_without_speculation_the_plugin_changes_nothing(tmp_path: Path) -> None:
    run = prepare(PAIR, tmp_path)
    bare = stock_environment(run)
    specs = [run.server(False, "float32"), bare.server(False, "float32")]
    logs = [tmp_path / name for name in ("with.log", "without.log")]
    specs = [replace(spec, log=log) for spec, log in zip(specs, logs, strict=True)]

    def warnings(log: Path) -> set[str]:
        lines = log.read_text(encoding="utf-8").splitlines()
        return {line.split("] ", 1)[-1] for line in lines if " WARNING " in line or "Error" in line}

    with serve_all(specs) as (ours, theirs):
        for prompt in run.plan.prompts_of(run.cell).prompts[:6]:
            ids = ours.chat_prompt(prompt.text)
            assert ours.complete(ids, 32).token_ids == theirs.complete(ids, 32).token_ids
        # Before they are stopped, which each of them reports in its own way.
        assert warnings(logs[0]) <= warnings(logs[1])
