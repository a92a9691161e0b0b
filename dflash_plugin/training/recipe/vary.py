"""More prompts from few: the same text with other numbers and other first names.

The target's answer to it is another one, in the same words as the data set's. That is what a
draft for one kind of question lacks when its training split is used up.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from functools import cache

from . import templates

_NUMBER = re.compile(r"\d+")
_WORD = re.compile(r"\b[A-Z]\w+\b")


def variations(text: str, count: int, seed: str) -> Iterator[str]:
    """Up to ``count`` texts like this one, none of them equal to it; none if it has no numbers.

    A number becomes another of as many digits, a first name another first name; what is equal
    in the text stays equal. Dates and measures may become odd ones: the answer is the target's.
    """
    if not _NUMBER.search(text):
        return
    chance = random.Random(f"{seed} {text}")
    seen = {text}
    for _ in range(count):
        made = _vary(text, chance)
        if made not in seen:
            seen.add(made)
            yield made


def _vary(text: str, chance: random.Random) -> str:
    drawn: dict[str, str] = {}
    names = _names()

    def number(match: re.Match[str]) -> str:
        old = match.group()
        if old not in drawn:
            low = 10 ** (len(old) - 1)
            drawn[old] = str(chance.randint(low, 10 * low - 1))
        return drawn[old]

    def name(match: re.Match[str]) -> str:
        old = match.group()
        if old in names and old not in drawn:
            drawn[old] = chance.choice([new for new in names if new not in drawn.values()])
        return drawn.get(old, old)

    return _NUMBER.sub(number, _WORD.sub(name, text))


@cache
def _names() -> tuple[str, ...]:
    return tuple(sorted(templates.words("name") | templates.words("first_name")))
