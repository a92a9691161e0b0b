"""``dflash-plugin generate``: stream a text to the terminal, then what it cost."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from . import local
from .backends.api import Pair
from .backends.draft_length import AUTO
from .backends.server import ServerClient
from .errors import RequestError, UsageError

_MOST_POSITIONS = 64  # of a server's acceptance counters; no draft has so long a block


@dataclass(frozen=True)
class Run:
    """One text: its tokens per second of decoding, and its AL (None if unknown).

    ``mean_drafted``: tokens per step, where that was not the same for all steps.
    """

    label: str
    text: str
    tokens: int
    seconds: float
    al: float | None
    finish_reason: str | None
    mean_drafted: float | None = None

    def line(self) -> str:
        """What is printed of it."""
        al = "" if self.al is None else f"AL {self.al:.2f}, "
        drafted = "" if self.mean_drafted is None else f"{self.mean_drafted:.1f} drafted a step, "
        return (
            f"{self.label}: {al}{drafted}{self.rate:.1f} tokens/s "
            f"({self.tokens} tokens, ended by {self.finish_reason})"
        )

    @property
    def rate(self) -> float:
        """Tokens per second after the first token; NaN for a single token."""
        return (self.tokens - 1) / self.seconds if self.tokens > 1 else float("nan")


def generate_local(
    backend: str,
    target: str,
    draft: str | None,
    messages: Sequence[Mapping[str, str]],
    *,
    compare: bool,
    loading: Mapping[str, Any],
    options: Mapping[str, Any],
) -> int:
    """Load a pair, stream its answer, print the figures; returns the exit code.

    Args:
        compare: decode without the draft too, and print the ratio.
        loading: arguments of :func:`dflash_plugin.load`.
        options: fields of :class:`dflash_plugin.Options`.
    """
    pair = local.load(target, draft, backend=backend, **loading)
    # Without a template the last message is text to continue.
    prompt: Any = list(messages)
    if not getattr(pair.tokenizer, "chat_template", None):
        if len(messages) > 1:
            raise UsageError(
                f"{target} has no chat template, so --system cannot be formatted",
                hint="leave --system out",
            )
        prompt = messages[-1]["content"]
    if compare:  # or the first of the two would pay for what is done only once
        for block_size in (options.get("block_size"), 1):
            pair.generate(prompt, **{**options, "max_tokens": 4, "block_size": block_size})
    runs = [_stream(pair, "DFlash", prompt, options, _show)]
    if compare:
        runs.append(_stream(pair, "plain", prompt, {**options, "block_size": 1}, lambda _: None))
    _report(runs, same_expected=not options.get("temperature"))
    return 0


def generate_server(
    base_url: str,
    model: str,
    messages: Sequence[Mapping[str, str]],
    *,
    compare_url: str | None,
    options: Mapping[str, Any],
) -> int:
    """The same with servers: ``compare_url`` is one of the same model without a draft."""
    runs = [_ask(ServerClient(base_url, model), "DFlash", messages, options, _show)]
    if compare_url is not None:
        other = ServerClient(compare_url, model)
        runs.append(_ask(other, "plain", messages, options, lambda _: None))
    _report(runs, same_expected=not options.get("temperature"))
    return 0


def _stream(
    pair: Pair, label: str, prompt: Any, options: Mapping[str, Any], show: Callable[[str], object]
) -> Run:
    for step in pair.stream_generate(prompt, **options):
        show(step.text)
    result = step.result
    assert result is not None
    return Run(
        label, result.text, len(result.token_ids), result.decode_seconds, result.al,
        result.finish_reason,
        result.mean_drafted if options.get("block_size") == AUTO else None,
    )  # fmt: skip


def _ask(
    client: ServerClient,
    label: str,
    messages: Sequence[Mapping[str, str]],
    options: Mapping[str, Any],
    show: Callable[[str], object],
) -> Run:
    before = _acceptance(client)
    text, first, tokens, reason = "", None, 0, None
    for piece in client.chat(messages, options):
        show(piece.text)
        text += piece.text
        tokens, reason = piece.tokens or tokens, piece.finish_reason or reason
        if piece.text and first is None:
            first = time.perf_counter()
    seconds = time.perf_counter() - first if first is not None else 0.0
    after = _acceptance(client)
    al = (after - before).al if before is not None and after is not None else None
    return Run(label, text, tokens, seconds, al, reason)


def _acceptance(client: ServerClient) -> Any:
    """The server's counters, or None where it runs without speculation."""
    try:
        return client.acceptance(_MOST_POSITIONS)
    except RequestError:
        return None  # not an error: AL is then left out of the line


def _show(text: str) -> None:
    print(text, end="", flush=True)


def _report(runs: Sequence[Run], *, same_expected: bool) -> None:
    """The figures, beside the text and not in it."""
    print(flush=True)
    lines = [run.line() for run in runs]
    if len(runs) > 1:
        one, other = runs
        lines.append(f"ratio: {one.rate / other.rate:.2f}")
        if same_expected:
            equal = "the same text" if one.text == other.text else "texts differ (see the dtype)"
            lines.append(equal)
    print("\n".join(lines), file=sys.stderr)
