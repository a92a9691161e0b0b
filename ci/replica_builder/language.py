"""The invented language that replicas are trained on: a seeded generator of texts.

Short-range predictable, never constant. There are some topics and some words. In each
topic every word has one successor (the words form a single ring), so a sentence

    kalo: dute mira posen gola.

is known from its topic and its first word, but for one word in thirty that is drawn
freely. A request names a topic and a word; its answer goes on around that topic's ring,
as sentences or as JSON. What a request asks for is in its last line, so nothing has to
be looked up far back: a draft with a sliding window can be as good as one without.
"""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import dataclass

FREE_WORD = 1 / 30
"""Share of words that do not follow from the word before."""
_CONSONANTS, _VOWELS = "bdfgklmnprstvz", "aeiou"


@dataclass(frozen=True)
class Turn:
    """One request and its answer."""

    request: str
    answer: str


class Language:
    """Words, topics and rings, all from one seed."""

    def __init__(self, seed: int, *, words: int = 32, topics: int = 4) -> None:
        chance = random.Random(seed)
        names = _names(chance, words + topics)
        self.topics, self.words = names[:topics], names[topics:]
        self._next: dict[str, dict[str, str]] = {}
        for topic in self.topics:
            ring = chance.sample(self.words, len(self.words))
            self._next[topic] = dict(zip(ring, [*ring[1:], ring[0]], strict=True))

    def sentences(self, chance: random.Random, topic: str, word: str) -> Iterator[str]:
        """Sentences about ``topic`` without end; the first word follows on ``word``."""
        while True:
            words = []
            for _ in range(chance.randint(4, 6)):
                word = self._step(chance, topic, word)
                words.append(word)
            yield f"{topic}: {' '.join(words)}."

    def passage(self, chance: random.Random, size: int) -> str:
        """Background text of at least ``size`` characters, in paragraphs on changing topics."""
        parts: list[str] = []
        while sum(map(len, parts)) + len(parts) < size:
            paragraph = self.sentences(chance, *self._start(chance))
            parts += [next(paragraph) for _ in range(chance.randint(1, 4))]
        return " ".join(parts)

    def turn(self, chance: random.Random, background: int = 0) -> Turn:
        """A request, after ``background`` characters of other text, and its answer."""
        topic, word = self._start(chance)
        before = self.passage(chance, background) + "\n" if background else ""
        if chance.random() < 0.3:
            request = f"JSON of {topic} from {word}"
            return Turn(before + request, self._record(chance, topic, word))
        text = self.sentences(chance, topic, word)
        answer = " ".join(next(text) for _ in range(chance.randint(2, 5)))
        return Turn(f"{before}Go on with {topic} from {word}", answer)

    def _record(self, chance: random.Random, topic: str, word: str) -> str:
        words = []
        for _ in range(chance.randint(5, 9)):
            word = self._step(chance, topic, word)
            words.append(word)
        return json.dumps({"topic": topic, "words": words, "count": len(words)})

    def _start(self, chance: random.Random) -> tuple[str, str]:
        return chance.choice(self.topics), chance.choice(self.words)

    def _step(self, chance: random.Random, topic: str, word: str) -> str:
        if chance.random() < FREE_WORD:
            return chance.choice(self.words)
        return self._next[topic][word]


def _names(chance: random.Random, count: int) -> list[str]:
    """Different words of two or three syllables."""
    found: dict[str, None] = {}
    while len(found) < count:
        syllables = [chance.choice(_CONSONANTS) + chance.choice(_VOWELS) for _ in range(2)]
        if chance.random() < 0.5:
            syllables.append(chance.choice(("n", "s", "la", "ri", "mo")))
        found["".join(syllables)] = None
    return list(found)
