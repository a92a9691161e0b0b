"""The HTTP client: streams, refusals, prompts, log-probabilities, metrics."""

from __future__ import annotations

import json
import socket
import sys
import threading
import time
from collections.abc import Callable

import pytest
from http_stub import server_fixture  # noqa: F401  # fixture

pytest.importorskip("requests")

from dflash_plugin.acceptance import AcceptanceStats
from dflash_plugin.backends.server import ServerClient
from dflash_plugin.errors import MissingDependencyError, RequestError

DONE = b"data: [DONE]\n\n"


@pytest.fixture
def client(server):
    return ServerClient(server.url + "/", "the-model", timeout=5)


def event(*tokens: int, reason: str | None = None) -> bytes:
    choice = {"index": 0, "text": "…", "token_ids": list(tokens), "finish_reason": reason}
    return b"data: " + json.dumps({"choices": [choice]}).encode() + b"\n\n"


def pause() -> None:
    time.sleep(0.02)


def failure(call: Callable[[], object]) -> RequestError:
    with pytest.raises(RequestError) as caught:
        call()
    assert caught.value.exit_code == 23
    assert "http://127.0.0.1:" in caught.value.message
    return caught.value


# --- completions ---


def test_a_chunk_is_an_engine_step(server, client):
    server.parts = [event(1, 2, 3), pause, event(4), pause, event(5, 6, reason="stop"), DONE]
    found = client.complete([7, 8], 6, temperature=0.5)
    assert found.token_ids == (1, 2, 3, 4, 5, 6)
    assert found.chunk_sizes == (3, 1, 2)
    assert found.finish_reason == "stop"
    assert 0 < found.ttft < found.times[1] < found.duration
    assert found.inter_token_latency == pytest.approx((found.duration - found.ttft) / 3)


def test_what_is_asked(server, client):
    server.parts = [event(1, reason="length"), DONE]
    client.complete((7, 8), 6, temperature=0.5)
    ((path, body),) = server.asked
    assert path == "/v1/completions"
    assert body == {
        "model": "the-model",
        "prompt": [7, 8],
        "max_tokens": 6,
        "temperature": 0.5,
        "stream": True,
        "return_token_ids": True,
    }


def test_chunks_may_be_split_anywhere(server, client):
    stream = event(1, 2) + b": a comment\r\n\r\n" + event(3, reason="stop").replace(b"\n", b"\r\n")
    stream += DONE
    for size in (1, 7, 20):
        server.parts = [stream[at : at + size] for at in range(0, len(stream), size)]
        found = client.complete([1], 3)
        assert (found.token_ids, found.chunk_sizes) == ((1, 2, 3), (2, 1))


def test_several_events_may_come_in_one_chunk(server, client):
    server.parts = [event(1) + event() + event(2, 3) + DONE]
    assert client.complete([1], 3).chunk_sizes == (1, 2)


def test_events_without_tokens_are_no_steps(server, client):
    usage = b'data: {"choices": [], "usage": {"completion_tokens": 1}}\n\n'
    null = b'data: {"choices": [{"token_ids": null, "finish_reason": "stop"}]}\n\n'
    server.parts = [event(1), null, usage, DONE]
    found = client.complete([1], 1)
    assert (found.token_ids, found.finish_reason, len(found.times)) == ((1,), "stop", 1)
    assert found.inter_token_latency != found.inter_token_latency  # NaN: one chunk has none


def test_the_last_line_may_lack_its_end(server, client):
    server.parts = [event(1), b"data: [DONE]"]
    assert client.complete([1], 1).token_ids == (1,)


@pytest.mark.parametrize("parts", [[], [event(1), event(2, 3)], [event(1), b"data: [DO"]])
def test_a_stream_that_ends_early_is_an_error(server, client, parts):
    server.parts = parts
    failure(lambda: client.complete([1], 9))


def test_a_stream_that_ends_early_says_after_how_many_tokens(server, client):
    server.parts = [event(1), event(2, 3)]
    assert "ended after 3 tokens without [DONE]" in failure(lambda: client.complete([1], 9)).message


@pytest.mark.parametrize(
    "text",
    [
        b"{",
        b"[]",
        b"5",
        b'{"choices": null}',
        b'{"choices": [5]}',
        b'{"choices": [{"text": "no ids"}]}',
        b'{"choices": [{"token_ids": ["x"], "finish_reason": null}]}',
        b'{"choices": [{"token_ids": [Infinity], "finish_reason": null}]}',
        b'{"choices": [{"token_ids": [1]}]}',
        b"\xff\xfe",
    ],
)
def test_unreadable_events_are_shown(server, client, text):
    server.parts = [event(1), b"data: " + text + b"\n\n", DONE]
    assert "unreadable stream event" in failure(lambda: client.complete([1], 9)).message


def test_an_error_inside_a_stream_is_shown(server, client):
    server.parts = [event(1), b'data: {"error": {"message": "out of memory"}}\n\n', DONE]
    assert "gave up: " in failure(lambda: client.complete([1], 9)).message


@pytest.mark.parametrize("status", [400, 404, 429, 500, 503])
def test_a_refusal_is_shown_with_its_text(server, client, status):
    server.status, server.parts = status, [b'{"error": "prompt too long"}']
    for call in (lambda: client.complete([1], 1), lambda: client.next_logprobs([1])):
        message = failure(call).message
        assert f"/v1/completions: HTTP {status}" in message
        assert "prompt too long" in message


def test_a_refusal_that_breaks_off_is_an_error(server, client):
    server.status, server.length, server.parts = 500, 100, [b"short"]
    failure(lambda: client.complete([1], 1))


def test_a_stream_that_breaks_off_is_an_error(server, client):
    server.length, server.parts = 10_000, [event(1)]
    assert "connection broke" in failure(lambda: client.complete([1], 9)).message


@pytest.mark.parametrize("parts", [[], [event(1)]])
def test_a_server_that_hangs_is_given_up(server, parts):
    stop = threading.Event()
    server.parts = [*parts, lambda: stop.wait(10)]
    client = ServerClient(server.url, "m", timeout=0.2)
    start = time.monotonic()
    failure(lambda: client.complete([1], 9))
    stop.set()
    assert time.monotonic() - start < 8


def test_nobody_there(client):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    nobody = ServerClient(f"http://127.0.0.1:{port}", "m", timeout=5)
    assert nobody.ready() is False
    for call in (nobody.metrics, lambda: nobody.complete([1], 1), lambda: nobody.chat_prompt("x")):
        assert "no answer" in failure(call).message


@pytest.mark.parametrize(("status", "ready"), [(200, True), (503, False), (500, False)])
def test_health(server, client, status, ready):
    server.status = status
    assert client.ready() is ready
    assert server.asked == [("/health", None)]


@pytest.mark.parametrize("name", ["HTTP_PROXY", "http_proxy", "ALL_PROXY"])
def test_a_server_on_this_machine_is_asked_without_a_proxy(server, client, monkeypatch, name):
    for variable in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv(name, "http://127.0.0.1:9")
    server.parts = [b"up 1\n"]
    assert client.ready() is True
    assert client.metrics() == [("up", "", 1.0)]


# --- prompts ---


def test_a_prompt_goes_through_the_chat_template(server, client):
    server.parts = [b'{"tokens": [1, 2, 3], "count": 3}']
    assert client.chat_prompt("hello") == [1, 2, 3]
    ((path, body),) = server.asked
    assert path == "/tokenize"
    assert body["messages"] == [{"role": "user", "content": "hello"}]
    assert body["add_generation_prompt"] is True


@pytest.mark.parametrize(
    "text",
    [
        b"",
        b"{",
        b"[]",
        b"{}",
        b'{"tokens": []}',
        b'{"tokens": 5}',
        b'{"tokens": ["a"]}',
        b'{"tokens": [null]}',
        b'{"tokens": [1.5]}',
    ],
)
def test_prompts_that_are_no_tokens_are_errors(server, client, text):
    server.parts = [text]
    failure(lambda: client.chat_prompt("hello"))


# --- log-probabilities ---


def logprobs(value: object) -> bytes:
    return json.dumps({"choices": [{"logprobs": {"top_logprobs": [value]}}]}).encode()


def test_logprobs_are_by_token_id(server, client):
    server.parts = [logprobs({"token_id:42": -0.5, "token_id:7": -1})]
    assert client.next_logprobs([1, 2], top=2) == {42: -0.5, 7: -1.0}
    ((_, body),) = server.asked
    assert (body["max_tokens"], body["logprobs"]) == (1, 2)


@pytest.mark.parametrize(
    "text",
    [
        b"{}",
        b'{"choices": []}',
        b'{"choices": [{"logprobs": null}]}',
        logprobs(None),
        logprobs({"Hello": -1}),
        logprobs({"token_id:1": None}),
        logprobs([1]),
    ],
)
def test_unreadable_logprobs_are_errors(server, client, text):
    server.parts = [text]
    assert "no readable logprobs" in failure(lambda: client.next_logprobs([1])).message


# --- metrics ---

DRAFTS = "vllm:spec_decode_num_drafts_total"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
METRICS = f"""\
# HELP {DRAFTS} Number of drafts.
# TYPE {DRAFTS} counter
{DRAFTS}{{engine="0",model_name="m"}} 10.0
{DRAFTS}{{engine="1",model_name="m"}} 5.0
{ACCEPTED}{{engine="0",model_name="m",position="0"}} 8.0
{ACCEPTED}{{engine="0",model_name="m",position="1"}} 4.0
{ACCEPTED}{{engine="1",model_name="m",position="0"}} 1e0
{ACCEPTED}{{engine="1",model_name="m",position="1"}} 0.0
{ACCEPTED}{{engine="1",model_name="m",position="2"}} 0.0
process_start_time_seconds 1.7e+09
odd_value NaN
"""


def test_samples_are_names_labels_and_values(server, client):
    server.parts = [METRICS.encode()]
    found = client.metrics()
    assert found[0] == (DRAFTS, 'engine="0",model_name="m"', 10.0)
    assert ("process_start_time_seconds", "", 1.7e9) in found
    assert len(found) == 9


def test_counters_are_summed_over_engines(server, client):
    server.parts = [METRICS.encode()]
    assert client.acceptance(2) == AcceptanceStats(15, (9, 4))
    assert client.acceptance(3) == AcceptanceStats(15, (9, 4, 0))


@pytest.mark.parametrize("text", ["", "some_metric 1\n", f"# HELP {DRAFTS} x\n"])
def test_a_server_without_speculation_says_so(server, client, text):
    server.parts = [text.encode()]
    error = failure(lambda: client.acceptance(2))
    assert "no vllm:spec_decode counters" in error.message
    assert "without speculation" in error.hint


@pytest.mark.parametrize(
    "text",
    [
        f'{DRAFTS} 1\n{ACCEPTED}{{position="0"}} 2\n',
        f"{DRAFTS} NaN\n",
        f"{DRAFTS} +Inf\n",
        f"{DRAFTS} many\n",
    ],
)
def test_counters_that_make_no_sense_are_errors(server, client, text):
    server.parts = [text.encode()]
    assert "/metrics: " in failure(lambda: client.acceptance(2)).message


# --- the library ---


def test_without_requests_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "requests", None)
    with pytest.raises(MissingDependencyError, match="requests is needed") as caught:
        ServerClient("http://x", "m")
    assert "dflash-plugin[bench]" in caught.value.hint
