"""HTTP client of an OpenAI-compatible engine server, with token ids and timings.

Works on token ids in both directions (vLLM's ``return_token_ids`` extension), so
that two servers can be compared without a tokenizer in between.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from ..acceptance import AcceptanceStats
from ..errors import MissingDependencyError, RequestError

if TYPE_CHECKING:
    import requests

_METRIC = re.compile(r"^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? ([^ ]+)$")


@dataclass(frozen=True)
class Completion:
    """One streamed answer.

    ``chunk_sizes``: tokens per streamed chunk; with one request at a time a chunk is
    one engine step. ``times``: seconds from the request to each chunk.
    """

    token_ids: tuple[int, ...]
    finish_reason: str | None
    chunk_sizes: tuple[int, ...]
    times: tuple[float, ...]

    @property
    def ttft(self) -> float:
        """Time to first token, seconds."""
        return self.times[0] if self.times else float("nan")

    @property
    def duration(self) -> float:
        """Seconds from the request to the last token."""
        return self.times[-1] if self.times else float("nan")

    @property
    def inter_token_latency(self) -> float:
        """Mean seconds per token after the first chunk; NaN for a single chunk."""
        later = sum(self.chunk_sizes[1:])
        return (self.times[-1] - self.times[0]) / later if later else float("nan")


@dataclass(frozen=True)
class Piece:
    """A part of a streamed answer; ``tokens`` is the answer's count where it is known."""

    text: str
    tokens: int
    finish_reason: str | None


class ServerClient:
    """A client of one server; every method may be called from several threads."""

    _version_path = "/version"

    def __init__(self, base_url: str, model: str, *, timeout: float = 300.0) -> None:
        try:
            import requests
        except ImportError as err:
            raise MissingDependencyError(
                "requests is needed to talk to a server", hint="pip install 'dflash-plugin[bench]'"
            ) from err
        self._requests = requests
        self.base_url, self.model, self.timeout = base_url.rstrip("/"), model, timeout
        # HTTP_PROXY is for other machines, also where NO_PROXY forgets to say so.
        local = urlsplit(base_url).hostname in ("127.0.0.1", "::1", "localhost")
        self._proxies = dict.fromkeys(("http", "https", "all"), "") if local else None

    def ready(self) -> bool:
        """Whether the server answers its health check with 200 right now."""
        try:
            answer = self._requests.get(self.base_url + "/health", timeout=5, proxies=self._proxies)
        except self._requests.RequestException:
            return False
        return answer.status_code == 200

    def chat_prompt(self, content: str) -> list[int]:
        """Token ids of one user message through the model's chat template."""
        body = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "add_generation_prompt": True,
        }
        answer = self._json("POST", "/tokenize", body)
        tokens = answer.get("tokens")
        if not isinstance(tokens, list) or not tokens:
            raise RequestError(f"{self.base_url}/tokenize: no tokens in {str(answer)[:200]}")
        if not all(isinstance(token, int) for token in tokens):
            raise RequestError(f"{self.base_url}/tokenize: not token ids: {str(tokens)[:200]}")
        return tokens

    def complete(
        self, prompt: Sequence[int], max_tokens: int, *, temperature: float = 0.0
    ) -> Completion:
        """Stream one completion of ``prompt`` (token ids).

        Raises:
            RequestError: refused, failed, cut off, or not understood.
        """
        body = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": temperature,
            "stream": True,
            "return_token_ids": True,
        }
        reason: str | None = None

        def new(event: Any, _known: int) -> list[int]:
            nonlocal reason
            choices = event["choices"]
            ids = [int(token) for c in choices for token in c["token_ids"] or []]
            reason = next((c["finish_reason"] for c in choices if c["finish_reason"]), reason)
            return ids

        tokens, sizes, times = self._streamed("/v1/completions", body, new)
        return Completion(tokens, reason, sizes, times)

    def answer(
        self, prompt: Sequence[int], max_tokens: int, *, temperature: float = 0.0
    ) -> tuple[str, tuple[int, ...] | None, str | None]:
        """One completion of ``prompt`` (token ids), not streamed: text, ids, reason of the end.

        The ids are None where the server does not tell them (SGLang).

        Raises:
            RequestError: refused, failed, or not understood.
        """
        body = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": max_tokens,
            "temperature": temperature,
            "return_token_ids": True,
        }
        answer = self._json("POST", "/v1/completions", body)
        try:
            choice = answer["choices"][0]
            ids = choice.get("token_ids")
            told = None if ids is None else tuple(int(token) for token in ids)
            return str(choice["text"]), told, choice.get("finish_reason")
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as err:
            raise RequestError(
                f"{self.base_url}: no readable completion in {str(answer)[:200]}"
            ) from err

    def chat(
        self, messages: Sequence[Mapping[str, str]], options: Mapping[str, Any]
    ) -> Iterator[Piece]:
        """Stream the answer to a conversation; ``options`` are fields of the request.

        Raises:
            RequestError: refused, failed, cut off, or not understood.
        """
        body = {
            "model": self.model,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            **options,
        }
        for event in self._events("/v1/chat/completions", body):
            if event == "[DONE]":
                return
            try:
                answer = json.loads(event)
                if "error" in answer:
                    raise RequestError(
                        f"{self.base_url}: the server gave up: {event[:300]}",
                        hint="see the server's log",
                    )
                choice = (answer["choices"] or [{}])[0]
                usage = answer.get("usage") or {}
                yield Piece(
                    choice.get("delta", {}).get("content") or "",
                    int(usage.get("completion_tokens", 0)),
                    choice.get("finish_reason"),
                )
            except (ValueError, KeyError, TypeError, AttributeError) as err:
                raise RequestError(
                    f"{self.base_url}: unreadable stream event {event[:200]!r}",
                    hint="is this an OpenAI-compatible server?",
                ) from err
        raise RequestError(
            f"{self.base_url}: the stream ended without [DONE]", hint="see the server's log"
        )

    def next_logprobs(self, prompt: Sequence[int], top: int = 20) -> dict[int, float]:
        """Log-probabilities (nats) of the ``top`` likeliest next tokens, by token id."""
        body = {
            "model": self.model,
            "prompt": list(prompt),
            "max_tokens": 1,
            "temperature": 0.0,
            "logprobs": top,
            "return_tokens_as_token_ids": True,
        }
        answer = self._json("POST", "/v1/completions", body)
        try:
            first = answer["choices"][0]["logprobs"]["top_logprobs"][0]
            return {int(key.rpartition(":")[2]): float(value) for key, value in first.items()}
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as err:
            raise RequestError(
                f"{self.base_url}: no readable logprobs in {str(answer)[:200]}"
            ) from err

    def metrics(self) -> list[tuple[str, str, float]]:
        """The server's Prometheus samples as (name, labels, value)."""
        text = self._request("GET", "/metrics", None).text
        samples = []
        for line in text.splitlines():
            match = _METRIC.match(line)
            if match:
                try:
                    samples.append((match[1], match[2] or "", float(match[3])))
                except ValueError as err:
                    raise RequestError(
                        f"{self.base_url}/metrics: unreadable sample {line[:200]!r}"
                    ) from err
        return samples

    def models(self) -> list[str]:
        """The names it serves models by."""
        listed = self._json("GET", "/v1/models", None).get("data")
        try:
            return [str(row["id"]) for row in listed or []]
        except (KeyError, TypeError) as err:
            raise RequestError(
                f"{self.base_url}/v1/models: unreadable: {str(listed)[:200]}"
            ) from err

    def version(self) -> str | None:
        """The engine's version; None where the server does not tell."""
        try:
            return str(self._json("GET", self._version_path, None)["version"])
        except (RequestError, KeyError):
            return None

    def acceptance(self, num_speculative_tokens: int | None = None) -> AcceptanceStats:
        """vLLM's ``spec_decode`` counters since it was started, summed over engines.

        ``num_speculative_tokens`` None: as many positions as the server tells of.

        Raises:
            RequestError: the server has no such counters, or they contradict each other.
        """
        drafts = 0
        counts: dict[int, int] = {}
        seen = False
        try:
            for name, labels, value in self.metrics():
                if name == "vllm:spec_decode_num_drafts_total":
                    seen = True
                    drafts += int(value)
                elif name == "vllm:spec_decode_num_accepted_tokens_per_pos_total":
                    match = re.search(r'position="(\d+)"', labels)
                    if match:
                        place = int(match[1])
                        counts[place] = counts.get(place, 0) + int(value)
            if seen:
                k = num_speculative_tokens or max(counts, default=-1) + 1
                return AcceptanceStats(drafts, tuple(counts.get(i, 0) for i in range(k)))
        except (ValueError, OverflowError) as err:
            raise RequestError(f"{self.base_url}/metrics: {err}") from err
        raise RequestError(
            f"{self.base_url}/metrics: no vllm:spec_decode counters",
            hint="the server runs without speculation; check its --speculative-config",
        )

    def _streamed(
        self, path: str, body: Mapping[str, Any], new: Callable[[Any, int], list[int]]
    ) -> tuple[tuple[int, ...], tuple[int, ...], tuple[float, ...]]:
        """Tokens of a streamed answer; sizes and times (seconds) of the events that had some.

        ``new``: an event's new token ids, given how many came before; what it raises over an
        event of another form is an unreadable event.
        """
        tokens: list[int] = []
        sizes: list[int] = []
        times: list[float] = []
        done = False
        start = time.perf_counter()
        for event in self._events(path, body):
            if event == "[DONE]":
                done = True
                break
            now = time.perf_counter() - start
            try:
                answer = json.loads(event)
                if isinstance(answer, dict) and "error" in answer:
                    raise RequestError(
                        f"{self.base_url}: the server gave up: {event[:300]}",
                        hint="see the server's log",
                    )
                ids = new(answer, len(tokens))
            except (ValueError, KeyError, TypeError, OverflowError) as err:
                raise self._unreadable(event) from err
            if ids:
                tokens += ids
                sizes.append(len(ids))
                times.append(now)
        if not done:
            raise RequestError(
                f"{self.base_url}: the stream ended after {len(tokens)} tokens without [DONE]",
                hint="see the server's log",
            )
        return tuple(tokens), tuple(sizes), tuple(times)

    def _unreadable(self, text: str) -> RequestError:
        return RequestError(
            f"{self.base_url}: unreadable stream event {text[:200]!r}",
            hint="is this a vLLM server of 0.18 or newer?",
        )

    def _events(self, path: str, body: Mapping[str, Any]) -> Iterator[str]:
        answer = self._request("POST", path, body, stream=True)
        try:
            # chunk_size=None: hand over what has arrived; a fixed size would wait
            # to fill it and spoil the timings.
            buffer = b""
            for chunk in answer.iter_content(chunk_size=None):
                buffer += chunk
                *lines, buffer = buffer.split(b"\n")
                for line in lines:
                    if line.startswith(b"data:"):
                        yield line[5:].strip().decode(errors="replace")
            if buffer.startswith(b"data:"):  # the last line, where its end of line is missing
                yield buffer[5:].strip().decode(errors="replace")
        except self._requests.RequestException as err:
            raise RequestError(
                f"{self.base_url}{path}: the connection broke ({type(err).__name__})",
                hint="see the server's log",
            ) from err
        finally:
            answer.close()

    def _json(self, method: str, path: str, body: Mapping[str, Any] | None) -> dict[str, Any]:
        answer = self._request(method, path, body)
        try:
            parsed = answer.json()
        except ValueError as err:
            raise RequestError(f"{self.base_url}{path}: not JSON: {answer.text[:200]!r}") from err
        if not isinstance(parsed, dict):
            raise RequestError(f"{self.base_url}{path}: expected an object: {answer.text[:200]!r}")
        return parsed

    def _request(
        self, method: str, path: str, body: Mapping[str, Any] | None, *, stream: bool = False
    ) -> requests.Response:
        url = self.base_url + path
        try:
            answer = self._requests.request(
                method,
                url,
                json=body,
                timeout=self.timeout,
                stream=stream,
                proxies=self._proxies,
            )
            # Reading the text of a streamed answer can fail as well.
            refusal = answer.text[:300] if answer.status_code != 200 else None
        except self._requests.RequestException as err:
            raise RequestError(
                f"{url}: no answer ({type(err).__name__})", hint="see the server's log"
            ) from err
        if refusal is not None:
            raise RequestError(
                f"{url}: HTTP {answer.status_code}: {refusal}",
                hint="see the server's log",
            )
        return answer
