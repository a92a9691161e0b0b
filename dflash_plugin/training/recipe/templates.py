"""Our own training prompts: templates with slots, filled at random from one seed."""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from ...errors import UsageError, near_names
from ...toml_table import read_toml

FILE = Path(__file__).with_name("templates.toml")
_SLOT = re.compile(r"\{(\w+)(#\d+)?(?::(\d+)-(\d+))?\}")
_TRIES = 50  # draws in a row that give nothing new: there is no more


def names() -> list[str]:
    """The kinds of prompts there are."""
    return sorted(_data()["templates"])


def words(name: str) -> set[str]:
    """The list of that name, which slots are drawn from."""
    return set(_data()["lists"][name])


def prompts(name: str, count: int, seed: int) -> Iterator[str]:
    """``count`` different prompts of one kind, the same for the same seed.

    Raises:
        UsageError: no such kind, or fewer than ``count`` can be made.
    """
    data = _data()
    if name not in data["templates"]:
        raise UsageError(f"no templates are named {name!r}", hint=near_names(name, names()))
    chance = random.Random(f"{seed} {name}")
    seen: set[str] = set()
    misses = 0
    while len(seen) < count:
        text = fill(chance.choice(data["templates"][name]), data["lists"], chance)
        if text in seen:
            misses += 1
            if misses > _TRIES:
                raise UsageError(
                    f"the templates {name!r} give about {len(seen)} prompts, asked for {count}",
                    hint=f"ask for fewer, or add to {FILE.name}",
                )
            continue
        misses = 0
        seen.add(text)
        yield text


def fill(template: str, lists: Mapping[str, Sequence[str]], chance: random.Random) -> str:
    """The template with each slot drawn; draws from one list differ from each other."""
    drawn: dict[str, str] = {}

    def value(match: re.Match[str]) -> str:
        name, number, low, high = match.groups()
        label = name + (number or "")
        if label not in drawn:
            if low is not None:
                drawn[label] = str(chance.randint(int(low), int(high)))
            else:
                taken = {drawn[one] for one in drawn if one.partition("#")[0] == name}
                drawn[label] = chance.choice([v for v in lists[name] if v not in taken])
        return drawn[label]

    text = _SLOT.sub(value, template)
    return text[0].upper() + text[1:]


@cache
def _data() -> dict[str, Any]:
    return read_toml(FILE)
