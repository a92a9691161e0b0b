"""Lossless and faithful: what is run; :mod:`ci.judge` has how it is judged."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tqdm import tqdm

from dflash_plugin.acceptance import AcceptanceStats
from dflash_plugin.backends.server import Completion, ServerClient

from .judge import first_difference
from .measure import in_parallel
from .prompts import Prompt
from .serve import taps_beside

SETTLE = 0.25
"""Seconds between two looks at a server's counters."""


def run_exact(
    base: ServerClient | Mapping[str, Sequence[int]],
    dflash: ServerClient,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    num_speculative_tokens: int,
    record: Path,
) -> dict[str, Any]:
    """Every prompt on both servers, one request at a time; drafted blocks from ``record``.

    The servers are expected to run in float32. ``base``: a server without a draft, or its
    answers' token ids by prompt, where they are known.
    """
    sequences: list[dict[str, Any]] = []
    before = dflash.acceptance(num_speculative_tokens)
    for prompt in tqdm(prompts, desc="check float32", unit="prompt", disable=None):
        ids = dflash.chat_prompt(prompt.text)
        start = _lines(record)
        if isinstance(base, Mapping):
            plain = base[prompt.id]
        else:
            plain = base.complete(ids, max_tokens).token_ids
        fast = dflash.complete(ids, max_tokens)
        sequences.append(
            {
                "id": prompt.id,
                "kind": prompt.kind,
                "prompt": ids,
                "base": list(plain),
                "generated": list(fast.token_ids),
                "chunk_sizes": list(fast.chunk_sizes),
                "finish_reason": fast.finish_reason,
                "record_start": start,
            }
        )
    after = settled(dflash, num_speculative_tokens)
    blocks = [json.loads(line) for line in _read(record).splitlines()]
    return {
        "sequences": sequences,
        "stats": (after - before).to_dict(),
        "blocks": blocks,
        "taps": _taps(record, sequences[0]["prompt"]) if sequences else None,
        "max_tokens": max_tokens,
    }


def run_control(
    base: ServerClient,
    dflash: ServerClient,
    prompts: Sequence[Prompt],
    *,
    max_tokens: int,
    width: int,
) -> dict[str, Any]:
    """bfloat16: DFlash against plain decoding, and plain against itself ``width`` at a time.

    Each divergence is kept with the gap, in nats, that plain decoding sees between
    the two tokens there.
    """
    ids = {prompt.id: base.chat_prompt(prompt.text) for prompt in prompts}
    alone: dict[str, Completion] = {}
    fast: dict[str, Completion] = {}
    for prompt in tqdm(prompts, desc="check bfloat16", unit="prompt", disable=None):
        alone[prompt.id] = base.complete(ids[prompt.id], max_tokens)
        fast[prompt.id] = dflash.complete(ids[prompt.id], max_tokens)
    answers = in_parallel(lambda i: base.complete(i, max_tokens), list(ids.values()), width)
    batched = dict(zip(ids, answers, strict=True))

    def divergences(others: Mapping[str, Completion]) -> list[dict[str, Any]]:
        return [
            found
            for name, other in others.items()
            for found in _divergence(base, name, ids[name], alone[name], other)
        ]

    return {
        "prompts": len(prompts),
        "tokens": sum(len(answer.token_ids) for answer in fast.values()),
        "max_tokens": max_tokens,
        "control_width": width,
        "dflash": divergences(fast),
        "control": divergences(batched),
    }


def _divergence(
    base: ServerClient, name: str, prompt: Sequence[int], plain: Completion, other: Completion
) -> list[dict[str, Any]]:
    """Where two answers part, and how far apart plain decoding sees the two tokens."""
    at = first_difference(plain.token_ids, other.token_ids)
    if at is None:
        return []
    pair = [c.token_ids[at] if at < len(c.token_ids) else None for c in (plain, other)]
    gap = None
    if None not in pair:
        logprobs = base.next_logprobs([*prompt, *plain.token_ids[:at]])
        known = [logprobs.get(token) for token in pair if token is not None]
        if known[0] is not None and known[1] is not None:
            gap = abs(known[0] - known[1])
    return [{"id": name, "index": at, "tokens": pair, "gap": gap}]


def _read(record: Path) -> str:
    return record.read_text(encoding="utf-8") if record.exists() else ""


def _taps(record: Path, prompt: Sequence[int]) -> Any:
    """The tapped states that were recorded of this prompt; None: there are none."""
    lines = _read(taps_beside(record)).splitlines()
    found = (json.loads(line) for line in lines)
    return next((row for row in found if row["ids"] == list(prompt[: len(row["ids"])])), None)


def _lines(record: Path) -> int:
    return _read(record).count("\n")


def settled(client: ServerClient, num_speculative_tokens: int) -> AcceptanceStats:
    """Counters once they have stopped moving: an engine updates them after it answers."""
    last = client.acceptance(num_speculative_tokens)
    for _ in range(20):
        time.sleep(SETTLE)
        now = client.acceptance(num_speculative_tokens)
        if now == last:
            return now
        last = now
    return last
