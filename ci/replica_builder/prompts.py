"""The fixed prompts of the replicas: lengths from 8 to 1000 tokens, short and long.

Plain Python, like the language: the harness sends them, the builder measures with them.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from .language import Language

LENGTHS = (
    *(8, 12, 20, 27, 30, 31, 32, 33, 34, 40, 47, 48),  # around the windows, 32 and 48
    *(80, 100, 128, 161, 200, 257, 320, 400, 512, 640, 800, 1000),  # several windows
)
"""Tokens of each prompt, chat template included."""
TEMPLATE_TOKENS = 3
SHORT, LONG = "replica-short", "replica-long"
LONGEST_SHORT = 48
_SEED = 20_000


@dataclass(frozen=True)
class ReplicaPrompt:
    """One user message; ``kind`` is ``SHORT`` or ``LONG``."""

    id: str
    kind: str
    text: str


def prompts(language: Language) -> list[ReplicaPrompt]:
    """A prompt of each length; its last line is a request, of which the shortest have the end.

    No two ask for the same, so their answers differ.
    """
    chance = random.Random(_SEED)
    found: list[ReplicaPrompt] = []
    asked: set[str] = set()
    for length in LENGTHS:
        size = length - TEMPLATE_TOKENS
        text = language.turn(chance, background=size).request[-size:]
        while _subject(text) in asked:
            text = language.turn(chance, background=size).request[-size:]
        asked.add(_subject(text))
        kind = SHORT if length <= LONGEST_SHORT else LONG
        # A message's outer blanks are some template's to strip: start with a letter.
        found.append(ReplicaPrompt(f"tokens-{length:04d}", kind, "." + text[1:]))
    return found


def _subject(text: str) -> str:
    """Topic and word of a request (or what is left of them)."""
    return " ".join(text.split()[-3:])
