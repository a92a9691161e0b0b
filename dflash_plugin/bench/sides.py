"""Where an arm's answers come from: a server, or a pair loaded in this process."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Sequence
from contextlib import AbstractAsyncContextManager, asynccontextmanager
from typing import Any, Protocol

from .. import local
from ..acceptance import AcceptanceStats
from ..backends.api import Pair
from ..backends.server import ServerClient
from ..errors import RequestError, UsageError
from .client import Answer, Client, Messages, Sampling
from .load import Answers


class Side(Protocol):
    """One arm, ready to be asked."""

    label: str

    def client(self) -> AbstractAsyncContextManager[Answers]:
        """A client for one pass."""
        ...

    def acceptance(self) -> AcceptanceStats | None:
        """Counters that only grow; None where there are none."""
        ...


class ServerSide:
    """An OpenAI-compatible server.

    Args:
        model: the name to ask for; None: the one model that the server has.
        timeout, stall: see :class:`.client.Client`.
        engine: what serves there; vLLM alone is asked for token ids.

    Raises:
        RequestError: no server there, or it does not serve that model.
    """

    def __init__(
        self, url: str, model: str | None, *, timeout: float, stall: float, engine: str = "vllm"
    ) -> None:
        self._server = ServerClient(url, model or "")
        served = self._server.models()
        if model is None and len(served) == 1:
            model = served[0]
        if model not in served:
            raise RequestError(
                f"{url}: serves {', '.join(served) or 'nothing'}, not {model}",
                hint="give --model one of these names",
            )
        self.label, self.model = url, model
        ids = engine == "vllm"
        self._options: dict[str, Any] = {"timeout": timeout, "stall": stall, "token_ids": ids}

    def version(self) -> str | None:
        """The engine's; None where the server does not tell."""
        return self._server.version()

    def client(self) -> AbstractAsyncContextManager[Answers]:
        """A client for one pass."""
        return Client(self.label, self.model, **self._options)

    def acceptance(self) -> AcceptanceStats | None:
        """The server's counters; None where it runs without speculation."""
        try:
            return self._server.acceptance()
        except RequestError:
            return None


class LocalSide:
    """A pair of a local back-end, one text at a time.

    Args:
        block_size: 1: plain decoding; None: all the draft has room for.
        lookup: draft so many tokens by Transformers' prompt lookup instead.

    Raises:
        UsageError: prompt lookup on another back-end.
    """

    def __init__(self, pair: Pair, block_size: int | None, *, lookup: int = 0) -> None:
        self.label = pair.backend.name
        if lookup and self.label != "transformers":
            raise UsageError(
                f"{self.label} has no prompt lookup", hint="leave --peer out, or use transformers"
            )
        self._pair, self._block_size, self._lookup = pair, block_size, lookup
        self._stats: AcceptanceStats | None = None

    @asynccontextmanager
    async def client(self) -> AsyncIterator[Answers]:
        """Itself: there is no connection."""
        yield self

    def acceptance(self) -> AcceptanceStats | None:
        """Of all texts so far; zeros before the first where tokens are drafted."""
        if self._stats is None and self._block_size != 1 and not self._lookup:
            size = self._block_size or self._pair.block_size or self._pair.backend.block_size
            return AcceptanceStats(0, (0,) * (size - 1))
        return self._stats

    async def answer(self, messages: Messages, sampling: Sampling) -> Answer:
        """One text; blocks the event loop, which has nothing else to do."""
        thinking = {"enable_thinking": sampling.enable_thinking}
        prompt: Any = messages[-1]["content"] if sampling.raw else list(messages)
        start = time.perf_counter()
        if self._lookup:
            answer = self._looked_up(prompt, sampling, thinking)
        else:
            answer = self._drafted(prompt, sampling, thinking)
        answer.seconds = time.perf_counter() - start
        return answer

    def _drafted(self, prompt: Any, sampling: Sampling, thinking: dict[str, Any]) -> Answer:
        answer = Answer(token_ids=[])
        options: dict[str, Any] = {"block_size": self._block_size} if self._block_size else {}
        steps = self._pair.stream_generate(
            prompt, raw=sampling.raw, template=thinking, max_tokens=sampling.max_tokens,
            temperature=sampling.temperature, top_p=sampling.top_p, top_k=sampling.top_k,
            **options,
        )  # fmt: skip
        for step in steps:
            _add(answer, step.token_ids, round(step.seconds, 6))
            answer.text += step.text
            if step.result is not None:
                answer.finish_reason = step.finish_reason
                answer.prompt_tokens = step.result.prompt_tokens
                self._count(step.result.stats)
        return answer

    def _looked_up(self, prompt: Any, sampling: Sampling, thinking: dict[str, Any]) -> Answer:
        """Transformers' own ``generate`` with ``prompt_lookup_num_tokens``."""
        backend: Any = self._pair.backend
        model = backend.target.model
        ids = self._pair.token_ids(prompt, raw=sampling.raw, template=thinking)
        streamer = _Streamer(len(ids))
        tensor = backend.target.embedding.new_tensor([ids]).long()
        options: dict[str, Any] = {}
        if sampling.temperature:
            options = {"temperature": sampling.temperature, "top_p": sampling.top_p,
                       "top_k": sampling.top_k}  # fmt: skip
        model.generate(
            tensor, attention_mask=tensor.new_ones(tensor.shape), streamer=streamer,
            max_new_tokens=sampling.max_tokens, do_sample=bool(sampling.temperature),
            prompt_lookup_num_tokens=self._lookup, **options,
        )  # fmt: skip
        answer = streamer.answer
        answer.prompt_tokens = len(ids)
        answer.finish_reason = "length" if answer.tokens >= sampling.max_tokens else "stop"
        answer.text = self._pair.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
        return answer

    def _count(self, stats: AcceptanceStats) -> None:
        if stats.drafts:
            known = self.acceptance()
            if known is not None and known.num_speculative_tokens > stats.num_speculative_tokens:
                missing = known.num_speculative_tokens - stats.num_speculative_tokens
                stats = AcceptanceStats(
                    stats.drafts, (*stats.accepted_per_position, *(0,) * missing)
                )
            self._stats = stats + known if known is not None else stats


class _Streamer:
    """What ``generate`` puts tokens into; the prompt comes first."""

    def __init__(self, prompt_tokens: int) -> None:
        self.answer = Answer(token_ids=[])
        self._skip, self._start = prompt_tokens, time.perf_counter()

    def put(self, value: Any) -> None:
        ids = value.reshape(-1).tolist()
        if self._skip:
            self._skip -= len(ids)
            return
        _add(self.answer, ids, round(time.perf_counter() - self._start, 6))

    def end(self) -> None:
        """Nothing follows."""


def _add(answer: Answer, ids: Sequence[int], now: float) -> None:
    if not ids:
        return
    assert answer.token_ids is not None
    answer.token_ids += ids
    answer.tokens += len(ids)
    answer.sizes.append(len(ids))
    answer.times.append(now)


def load_pair(target: str, draft: str | None, backend: str, **options: Any) -> Pair:
    """:func:`dflash_plugin.load`; ``options`` such as ``device``."""
    return local.load(target, draft, backend=backend, **options)
