"""A "model" that is a hash: deterministic text, and a draft that is right at known places.

The fake engine (``vllm/``) generates with it and the fake reference (``fake_reference.py``)
replays with it, so the harness between the two can be tested in seconds. Token ids are
below 256; 0 to 2 are special.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from zlib import crc32

VOCAB, EOS = 128, 2
_FIRST, _LETTERS = 3, 125
FAULTS = "fake.json"
"""In the target's folder: a list of faults, see :func:`faults`."""


def tokenize(text: str) -> list[int]:
    """Ids of one user message."""
    return [1, *(_FIRST + byte % _LETTERS for byte in text.encode()[:48]), 1]


def next_token(ids: Sequence[int]) -> int:
    """The target's greedy choice; about one in thirty is the end of the text."""
    value = crc32(bytes(ids[-4:]))
    return EOS if value % 29 == 0 else _FIRST + value % _LETTERS


def other(token: int) -> int:
    """Some token that is not this one."""
    return _FIRST + (token - _FIRST + 1) % _LETTERS


def draft(ids: Sequence[int], k: int) -> list[int]:
    """A block of ``k``, of which 0..k are right, depending on the last three tokens."""
    right = crc32(b"draft" + bytes(ids[-3:])) % (k + 1)
    text, block = list(ids), []
    for i in range(k):
        token = next_token(text)
        text.append(token)
        block.append(token if i < right else other(token))
    return block


def accepted(block: Sequence[int], choice: Callable[[list[int]], int], ids: Sequence[int]) -> int:
    """How many of ``block`` are what ``choice`` says after ``ids``."""
    text = list(ids)
    for count, token in enumerate(block):
        if choice(text) != token:
            return count
        text.append(token)
    return len(block)


def replay(prompt: Sequence[int], generated: Sequence[int], k: int) -> list[dict[str, Any]]:
    """The reference's steps over a text; past its end the target's own choices count."""
    text = [*prompt, *generated]

    def choice(ids: list[int]) -> int:
        return text[len(ids)] if len(ids) < len(text) else next_token(ids)

    steps, position = [], len(prompt)
    while position < len(text) - 1:
        known = text[: position + 1]
        block = draft(known, k)
        right = accepted(block, choice, known)
        steps.append(
            {
                "position": position,
                "known": known[-1],
                "draft": block,
                "gaps": [1.0] * k,
                "accepted": right,
            }
        )
        position += right + 1
    return steps


def faults(folder: Path, mode: str, dtype: str) -> dict[str, dict[str, Any]]:
    """The faults that apply to one server, by name.

    A row is ``{"fault": name, …}`` with the fault's own arguments and, to have it in some
    servers only, ``mode`` (base, dflash, replay) and ``dtype``.
    """
    path = folder / FAULTS
    rows = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return {
        row["fault"]: row
        for row in rows
        if row.get("mode", mode) == mode and row.get("dtype", dtype) == dtype
    }
