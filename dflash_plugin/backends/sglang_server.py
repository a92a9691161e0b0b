"""HTTP client of an SGLang server: its native ``/generate``, for token ids and acceptance.

SGLang's metrics count verify steps but not how many tokens each accepted; every answer's
``meta_info`` does. So acceptance here is that of the requests made through one client.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from typing import Any

from ..acceptance import AcceptanceStats
from ..errors import RequestError
from .server import Completion, ServerClient


class SglangClient(ServerClient):
    """A client of one SGLang server (0.5.18 or newer)."""

    _version_path = "/server_info"

    def __init__(self, base_url: str, model: str, *, timeout: float = 300.0) -> None:
        super().__init__(base_url, model, timeout=timeout)
        self._lock = threading.Lock()
        self._histogram: list[int] = []  # steps that accepted 0, 1, 2, … tokens
        self._without = 0  # answers of more than one step that tell of no drafts

    def complete(
        self, prompt: Sequence[int], max_tokens: int, *, temperature: float = 0.0
    ) -> Completion:
        """As :meth:`ServerClient.complete`."""
        meta: dict[str, Any] = {}

        def new(event: Any, known: int) -> list[int]:
            nonlocal meta
            meta = dict(event["meta_info"])
            ids = [int(token) for token in event["output_ids"]]
            # All so far, or (--incremental-streaming-output) what is new.
            everything = len(ids) == int(meta["completion_tokens"])
            return ids[known:] if everything else ids

        body = _body(prompt, max_tokens, temperature, stream=True)
        tokens, sizes, times = self._streamed("/generate", body, new)
        return Completion(tokens, self._finished(meta), sizes, times)

    def answer(
        self, prompt: Sequence[int], max_tokens: int, *, temperature: float = 0.0
    ) -> tuple[str, tuple[int, ...] | None, str | None]:
        """As :meth:`ServerClient.answer`."""
        answer = self.generate(_body(prompt, max_tokens, temperature))
        try:
            ids = tuple(int(token) for token in answer["output_ids"])
            return str(answer["text"]), ids, _reason(answer["meta_info"])
        except (KeyError, TypeError, ValueError) as err:
            raise self._unreadable(str(answer)) from err

    def generate(self, body: Mapping[str, Any]) -> dict[str, Any]:
        """One request to ``/generate``, not streamed; its acceptance is counted.

        Raises:
            RequestError: refused, failed, or not understood.
        """
        answer = self._json("POST", "/generate", body)
        meta = answer.get("meta_info")
        if not isinstance(meta, dict):
            raise self._unreadable(str(answer))
        self._finished(meta)
        return answer

    def next_logprobs(self, prompt: Sequence[int], top: int = 20) -> dict[int, float]:
        """As :meth:`ServerClient.next_logprobs`."""
        asked = {"return_logprob": True, "top_logprobs_num": top}
        answer = self.generate(_body(prompt, 1, 0.0) | asked)
        try:
            first = answer["meta_info"]["output_top_logprobs"][0]
            return {int(token): float(value) for value, token, _ in first}
        except (KeyError, IndexError, TypeError, ValueError) as err:
            raise self._unreadable(str(answer)) from err

    def acceptance(self, num_speculative_tokens: int | None = None) -> AcceptanceStats:
        """What the answers so far said of their verify steps.

        ``num_speculative_tokens`` None: as many positions as were accepted at most.

        Raises:
            RequestError: the server answers without speculation, or accepted more than that.
        """
        with self._lock:
            counts, without = list(self._histogram), self._without
        if without and not counts:
            raise RequestError(
                f"{self.base_url}/generate: no spec_verify_ct in its answers",
                hint="the server runs without speculation; check its --speculative-algorithm",
            )
        k = len(counts) - 1 if num_speculative_tokens is None else num_speculative_tokens
        steps = [accepted for accepted, times in enumerate(counts) for _ in range(times)]
        try:
            return AcceptanceStats.from_steps(steps, max(k, 0))
        except ValueError as err:
            raise RequestError(f"{self.base_url}/generate: {err}") from err

    def _finished(self, meta: Mapping[str, Any]) -> str | None:
        """Count an answer's steps; the reason of its end."""
        try:
            counts = [int(n) for n in meta.get("spec_correct_drafts_histogram") or ()]
            tokens = int(meta["completion_tokens"])
        except (KeyError, TypeError, ValueError) as err:
            raise self._unreadable(str(meta)) from err
        with self._lock:
            missing = len(counts) - len(self._histogram)
            self._histogram += [0] * max(missing, 0)
            for accepted, times in enumerate(counts):
                self._histogram[accepted] += times
            self._without += tokens > 1 and "spec_verify_ct" not in meta
        return _reason(meta)

    def _unreadable(self, text: str) -> RequestError:
        return RequestError(
            f"{self.base_url}/generate: unreadable answer {text[:200]!r}",
            hint="is this an SGLang server of 0.5.18 or newer?",
        )


def _body(
    prompt: Sequence[int], max_tokens: int, temperature: float, *, stream: bool = False
) -> dict[str, Any]:
    sampling = {"max_new_tokens": max_tokens, "temperature": temperature}
    return {"input_ids": list(prompt), "sampling_params": sampling, "stream": stream}


def _reason(meta: Mapping[str, Any]) -> str | None:
    reason = meta.get("finish_reason")
    return str(reason["type"]) if isinstance(reason, dict) and "type" in reason else None
