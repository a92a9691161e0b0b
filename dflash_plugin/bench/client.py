"""Streamed requests to an OpenAI-compatible server, many at a time.

aiohttp and not httpx: both were measured against a server that answers at once
(docs/benchmarks/README.md), and so were orjson and json. Every request ends in an
:class:`Answer`, failed ones too.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import aiohttp
import orjson

from .records import (
    CUT_OFF,
    EMPTY,
    INTERRUPTED,
    MALFORMED,
    REFUSED,
    SERVER_ERROR,
    TIMEOUT,
)

Messages = Sequence[Mapping[str, str]]


@dataclass
class Answer:
    """One streamed answer, or what there is of it.

    Attributes:
        token_ids: None where the server does not tell them.
        sizes: new tokens of each streamed event, which is one engine step unless the
            engine fell behind; empty where the server does not tell.
        times: seconds from the request to each event.
        tokens: how many, by ids or by the server's own count.
        prompt_tokens: None where the server does not tell.
        seconds: from the request to its end.
        error: None, or a reason of :mod:`.records`; ``detail`` says more.
    """

    token_ids: list[int] | None = None
    text: str = ""
    sizes: list[int] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    tokens: int = 0
    prompt_tokens: int | None = None
    finish_reason: str | None = None
    seconds: float = 0.0
    error: str | None = None
    detail: str = ""


@dataclass(frozen=True)
class Sampling:
    """What a request asks for; ``raw``: no chat template."""

    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    enable_thinking: bool = False
    raw: bool = False

    def body(self, model: str, messages: Messages) -> dict[str, Any]:
        """The request's JSON."""
        body: dict[str, Any] = {
            "model": model,
            "max_tokens": self.max_tokens,
            "temperature": self.temperature,
            "top_p": self.top_p,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
        if self.top_k:
            body["top_k"] = self.top_k
        if self.raw:
            body["prompt"] = "\n\n".join(message["content"] for message in messages)
        else:
            body["messages"] = list(messages)
            body["chat_template_kwargs"] = {"enable_thinking": self.enable_thinking}
        return body


class Client:
    """Requests to one server; use it as an asynchronous context manager.

    Args:
        timeout: seconds for a whole answer.
        stall: seconds without a byte after which an answer counts as hanging.
        token_ids: ask for them, as vLLM understands; SGLang refuses to stream then.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        timeout: float = 600.0,
        stall: float = 120.0,
        token_ids: bool = True,
    ) -> None:
        self.base_url, self.model, self._token_ids = base_url.rstrip("/"), model, token_ids
        self._timeout = aiohttp.ClientTimeout(total=timeout, sock_connect=10, sock_read=stall)
        # HTTP_PROXY is for other machines, also where NO_PROXY forgets to say so.
        self._local = urlsplit(base_url).hostname in ("127.0.0.1", "::1", "localhost")
        self._session: aiohttp.ClientSession | None = None

    async def __aenter__(self) -> Client:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=30),
            timeout=self._timeout,
            trust_env=not self._local,
            headers={"Content-Type": "application/json"},
        )
        return self

    async def __aexit__(self, *_exception: object) -> None:
        if self._session is not None:
            await self._session.close()

    async def answer(self, messages: Messages, sampling: Sampling) -> Answer:
        """Stream one answer to its end; never raises for what a server does."""
        assert self._session is not None, "use the client as a context manager"
        path = "/v1/completions" if sampling.raw else "/v1/chat/completions"
        body = sampling.body(self.model, messages)
        data = orjson.dumps(body | {"return_token_ids": True} if self._token_ids else body)
        answer = Answer()
        start = time.perf_counter()
        try:
            async with self._session.post(self.base_url + path, data=data) as response:
                if response.status != 200:
                    detail = (await response.text(errors="replace"))[:300]
                    answer.error, answer.detail = f"http_{response.status}", detail
                else:
                    await _read(response.content, answer, start)
        except asyncio.CancelledError:
            answer.error, answer.detail = INTERRUPTED, f"after {answer.tokens} tokens"
        except (asyncio.TimeoutError, TimeoutError) as err:
            answer.error, answer.detail = TIMEOUT, str(err) or f"after {answer.tokens} tokens"
        except (aiohttp.ClientConnectorError, ConnectionRefusedError) as err:
            answer.error, answer.detail = REFUSED, str(err)[:300]
        except (aiohttp.ClientError, OSError) as err:
            answer.error, answer.detail = CUT_OFF, f"{type(err).__name__}: {err}"[:300]
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as err:
            answer.error, answer.detail = MALFORMED, f"{type(err).__name__}: {err}"[:300]
        answer.seconds = time.perf_counter() - start
        if answer.error is None and not answer.tokens:
            answer.error = EMPTY
        return answer


async def _read(content: aiohttp.StreamReader, answer: Answer, start: float) -> None:
    """Server-sent events, as they arrive, into ``answer``; to the end of the body."""
    rest, done = b"", False
    async for chunk in content.iter_any():
        now = round(time.perf_counter() - start, 6)
        *lines, rest = (rest + chunk).split(b"\n")
        for line in lines:
            # Read on after [DONE]: a connection is used again only once it is at its end.
            if line.startswith(b"data:") and not done:
                done = _take(line[5:].strip(), answer, now)
    if rest.startswith(b"data:") and not done:  # the last line, without its end of line
        done = _take(rest[5:].strip(), answer, round(time.perf_counter() - start, 6))
    if not done and answer.error is None:
        answer.error, answer.detail = CUT_OFF, f"no [DONE] after {answer.tokens} tokens"


def _take(data: bytes, answer: Answer, now: float) -> bool:
    """One event; whether it was the last."""
    if data == b"[DONE]":
        return True
    event = orjson.loads(data)
    if event.get("error"):
        answer.error, answer.detail = SERVER_ERROR, str(event["error"])[:300]
        return True
    new = 0
    for choice in event["choices"]:
        ids = choice.get("token_ids")
        if ids:
            new += len(ids)
            answer.token_ids = [] if answer.token_ids is None else answer.token_ids
            answer.token_ids += ids
        text = choice["delta"].get("content") if "delta" in choice else choice.get("text")
        if text:
            answer.text += text
        if choice.get("finish_reason"):
            answer.finish_reason = choice["finish_reason"]
    usage = event.get("usage")
    if usage:
        answer.prompt_tokens = usage.get("prompt_tokens", answer.prompt_tokens)
        # Where ids are told they are the count; a server's final usage agrees with them.
        if answer.token_ids is None:
            new = int(usage.get("completion_tokens") or 0) - answer.tokens
    if new > 0:
        answer.tokens += new
        answer.sizes.append(new)
        answer.times.append(now)
    elif not answer.times and answer.text:
        answer.times.append(now)  # no counts before the end: the first token's time at least
    return False
