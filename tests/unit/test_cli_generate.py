"""``dflash-plugin generate``: the text, the figures beside it, and what is refused."""

from __future__ import annotations

import importlib.util
import json

import pytest
from http_stub import server_fixture  # noqa: F401  # fixture

from dflash_plugin import cli


def sse(*events: object) -> list[bytes]:
    return [b"data: " + json.dumps(event).encode() + b"\n\n" for event in events]


def piece(text: str, reason: str | None = None) -> dict[str, object]:
    return {"choices": [{"delta": {"content": text}, "finish_reason": reason}]}


USAGE = {"choices": [], "usage": {"completion_tokens": 3}}
DONE = [b"data: [DONE]\n\n"]


def test_a_servers_answer_is_streamed(server, capsys):
    server.parts = [*sse(piece("one "), piece("two", "stop"), USAGE), *DONE]
    arguments = ["generate", "server", "count", "--base-url", server.url, "--model", "m",
                 "--system", "be short", "--max-tokens", "9", "--stop", "x"]  # fmt: skip
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out == "one two\n"
    assert "DFlash: " in captured.err and "(3 tokens, ended by stop)" in captured.err
    assert "AL" not in captured.err, "this server has no counters"
    asked = next(body for path, body in server.asked if path == "/v1/chat/completions")
    assert asked is not None
    assert asked["messages"] == [
        {"role": "system", "content": "be short"},
        {"role": "user", "content": "count"},
    ]
    assert (asked["max_tokens"], asked["stop"], asked["temperature"]) == (9, ["x"], 0.0)
    assert "top_k" not in asked


def test_two_servers_are_compared(server, capsys):
    server.parts = [*sse(piece("one"), piece(" two", "stop"), USAGE), *DONE]
    arguments = ["generate", "server", "count", "--base-url", server.url, "--model", "m",
                 "--compare-url", server.url]  # fmt: skip
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    assert captured.out == "one two\n"
    assert "plain: " in captured.err and "ratio: " in captured.err
    assert "the same text" in captured.err


@pytest.mark.parametrize(
    "parts, message",
    [
        (sse(piece("one")), "the stream ended without [DONE]"),
        (sse({"error": {"message": "no memory"}}), "the server gave up"),
        ([b"data: {\n\n"], "unreadable stream event"),
        (sse({"choices": [3]}), "unreadable stream event"),
    ],
    ids=["cut off", "error", "not JSON", "not a choice"],
)
def test_a_broken_stream_is_an_error(server, capsys, parts, message):
    server.parts = parts
    arguments = ["generate", "server", "x", "--base-url", server.url, "--model", "m"]
    assert cli.main(arguments) == 23
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["server", "x"], "--model is missing"),
        (["server", "x", "--model", "m", "--compare"], "needs a second server"),
        (["mlx", "x", "--device", "cpu"], "--device is not for mlx"),
        (["transformers", "x", "--draft-bits", "4"], "--draft-bits is not for transformers"),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit_are_refused(capsys, arguments, message):
    assert cli.main(["generate", *arguments]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("backend", ["transformers", "mlx"])
@pytest.mark.torch
def test_a_local_pair_is_streamed_and_compared(backend, tmp_path, capsys):
    for package in ("torch", "transformers", *(["mlx_lm"] if backend == "mlx" else [])):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    import local_replicas as replicas
    from local_drafts import save_draft

    folder = tmp_path / "target"
    if backend == "mlx":
        import mlx_replicas

        model, _loaded = mlx_replicas.make_pair("qwen3", folder)
    else:
        model = replicas.make_target("qwen3")
        model.save_pretrained(folder)
    replicas.save_tokenizer(folder)
    draft = save_draft(tmp_path / "draft")
    capsys.readouterr()
    arguments = ["generate", backend, "w5 w6", "--target", str(folder), "--draft", str(draft),
                 "--max-tokens", "8", "--compare"]  # fmt: skip
    assert cli.main(arguments) == 0
    captured = capsys.readouterr()
    # The template's words around the message, and no end-of-text token among the first eight.
    plain = replicas.plain(model, [9, 5, 6, 8], 8)
    plain = plain[: plain.index(2)] if 2 in plain else plain
    assert captured.out.split() == [f"w{token}" for token in plain]
    assert "DFlash: AL 1." in captured.err and "drafted a step" not in captured.err
    assert "plain: " in captured.err and "the same text" in captured.err
    assert cli.main([*arguments, "--block-size", "auto"]) == 0
    other = capsys.readouterr()
    assert other.out == captured.out and "drafted a step, " in other.err
