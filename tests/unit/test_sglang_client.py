"""The client of an SGLang server: streams, log-probabilities, and acceptance from its answers."""

from __future__ import annotations

import json
import re
from collections.abc import Callable

import pytest
from http_stub import server_fixture  # noqa: F401  # fixture

pytest.importorskip("requests")

from dflash_plugin.acceptance import AcceptanceStats
from dflash_plugin.backends.sglang_server import SglangClient
from dflash_plugin.errors import RequestError

DONE = b"data: [DONE]\n\n"


@pytest.fixture
def client(server):
    return SglangClient(server.url + "/", "the-model", timeout=5)


def answer(ids: list[int], tokens: int | None = None, **meta: object) -> dict[str, object]:
    """What ``/generate`` answers; ``meta`` are fields of its ``meta_info``."""
    given = {"completion_tokens": len(ids) if tokens is None else tokens, "finish_reason": None}
    return {"text": "…", "output_ids": ids, "meta_info": {**given, **meta}}


def event(*args: object, **meta: object) -> bytes:
    return b"data: " + json.dumps(answer(*args, **meta)).encode() + b"\n\n"


def drafted(*histogram: int) -> dict[str, object]:
    """The end of a request whose verify steps accepted 0, 1, … tokens so many times."""
    return {
        "spec_verify_ct": sum(histogram),
        "spec_correct_drafts_histogram": list(histogram),
        "finish_reason": {"type": "length", "length": 6},
    }


def failure(call: Callable[[], object]) -> RequestError:
    with pytest.raises(RequestError) as caught:
        call()
    assert caught.value.exit_code == 23
    assert "http://127.0.0.1:" in caught.value.message
    return caught.value


def test_every_event_tells_all_tokens_so_far(server, client):
    events = [event([1]), event([1, 2, 3]), event([1, 2, 3, 4, 5, 6], **drafted(0, 0, 1, 1))]
    server.parts = [*events, DONE]
    found = client.complete([7, 8], 6, temperature=0.5)
    assert found.token_ids == (1, 2, 3, 4, 5, 6)
    assert found.chunk_sizes == (1, 2, 3)
    assert found.finish_reason == "length"
    assert server.asked == [
        (
            "/generate",
            {
                "input_ids": [7, 8],
                "sampling_params": {"max_new_tokens": 6, "temperature": 0.5},
                "stream": True,
            },
        )
    ]


def test_or_what_is_new(server, client):
    server.parts = [event([1]), event([2, 3], 3), event([4], 4, **drafted(1, 1)), DONE]
    found = client.complete([7], 4)
    assert (found.token_ids, found.chunk_sizes) == ((1, 2, 3, 4), (1, 2, 1))


def test_acceptance_is_that_of_the_answers(server, client):
    assert client.acceptance(3) == AcceptanceStats(0, (0, 0, 0))
    server.parts = [event([1]), event([1, 2, 3, 4, 5, 6], **drafted(1, 0, 2)), DONE]
    client.complete([7], 6)
    assert client.acceptance(3) == AcceptanceStats(3, (2, 2, 0))
    server.parts = [json.dumps(answer([1, 2], **drafted(0, 1))).encode()]
    assert client.answer([7], 2) == ("…", (1, 2), "length")
    assert client.acceptance(3) == AcceptanceStats(4, (3, 2, 0))
    assert client.acceptance() == AcceptanceStats(4, (3, 2))
    assert "expected 0..1" in failure(lambda: client.acceptance(1)).message


def test_a_server_without_speculation_says_so(server, client):
    server.parts = [event([1]), event([1, 2]), DONE]
    client.complete([7], 2)
    error = failure(lambda: client.acceptance(3))
    assert "no spec_verify_ct" in error.message
    assert "--speculative-algorithm" in error.hint


def test_one_token_takes_no_verify_step(server, client):
    server.parts = [event([1]), DONE]
    client.complete([7], 1)
    assert client.acceptance(3).drafts == 0


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([event([1])], "the stream ended after 1 tokens"),
        ([b'data: {"error": {"message": "too long"}}\n\n'], "gave up: .*too long"),
        ([b"data: {}\n\n"], "unreadable answer"),
        ([b"data: [1]\n\n"], "unreadable answer"),
        ([b'data: {"output_ids": ["x"], "meta_info": {}}\n\n'], "unreadable answer"),
        ([event([1], spec_correct_drafts_histogram=["x"]), DONE], "unreadable answer"),
    ],
)
def test_streams_that_fail(server, client, parts, message):
    server.parts = parts
    error = failure(lambda: client.complete([7], 4))
    assert re.search(message, error.message)


def test_a_refusal_is_shown(server, client):
    server.status, server.parts = 400, [b'{"error": "input is longer than the context"}']
    assert "HTTP 400" in failure(lambda: client.complete([7], 4)).message


def test_log_probabilities_by_token_id(server, client):
    top = [[[-0.1, 5, None], [-2.5, 9, None]]]
    server.parts = [json.dumps(answer([5], output_top_logprobs=top)).encode()]
    assert client.next_logprobs([7], top=2) == {5: -0.1, 9: -2.5}
    body = server.asked[0][1]
    assert body["return_logprob"] is True and body["top_logprobs_num"] == 2


@pytest.mark.parametrize("found", [None, [], [[["x", 5, None]]], [[[-0.1, 5]]]])
def test_unreadable_log_probabilities(server, client, found):
    server.parts = [json.dumps(answer([5], output_top_logprobs=found)).encode()]
    assert "unreadable answer" in failure(lambda: client.next_logprobs([7])).message


def test_version(server, client):
    server.parts = [b'{"version": "0.5.23"}']
    assert client.version() == "0.5.23"
    assert server.asked[0][0] == "/server_info"
