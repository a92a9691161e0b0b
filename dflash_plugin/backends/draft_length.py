"""How many tokens to draft in the next step: as many as make text come fastest.

A step that drafts k tokens yields E(k) = 1 + a1 + a1 a2 + … tokens, where ai is the chance
that the draft's i-th token is accepted after those before it, and takes cost(k) seconds;
k = 0 is plain decoding. Both are measured while text is generated, and the k with the
highest E(k) / cost(k) is taken. Now and then another one is tried, or nothing would be
learned about it.

Texts stay what they are: the target verifies any draft, and k is chosen before the draft is
made, from past tokens and past times only, so rejection sampling is as exact as for one k.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from collections.abc import Sequence
from itertools import accumulate
from operator import mul

from ..errors import PairMismatchError

AUTO = "auto"

_GUESS = 0.7  # acceptance before anything was drafted
_LEAST = 4.0  # steps that an estimate of acceptance weighs at least; fewer: it follows faster
_KEEP_TEXT, _KEEP_PAIR = 0.97, 0.995  # of that weight from step to step: one text, all texts
_WINDOW = 15  # latest times of a length that count
_SURE = 2  # of them make a cost: the first step of a length may pay for what is done once
_GAP = 8  # steps between two trials of another length at least
_TRIALS = 0.02  # share of the time that trials may lose


class FixedLength:
    """The same length for every step."""

    def __init__(self, length: int) -> None:
        self.most = length

    @classmethod
    def of(cls, block_size: int | None, room: int) -> FixedLength:
        """Of a block size, by default all the draft has room for.

        Raises:
            PairMismatchError: more than that.
        """
        if block_size is not None and block_size > room:
            raise PairMismatchError(
                f"block_size is {block_size}, but the draft's is {room}" if room > 1
                else f"block_size is {block_size}, but no draft is loaded",
                hint=f"block_size {room} at most",
            )  # fmt: skip
        return cls((block_size or room) - 1)

    def request(self) -> FixedLength:
        """For one text, or one batch whose rows share every step."""
        return self

    def choose(self, rows: int) -> int:
        """Tokens to draft in the next step of so many rows."""
        return self.most

    def took(self, accepted: Sequence[int], seconds: float) -> None:
        """Learn from the step: how many drafted tokens each row accepted, and its time."""


class AdaptiveLength:
    """What is known of a loaded pair: what a step costs, and what its drafts are worth.

    Args:
        most: the pair's own length, at least 1; it begins with that.
    """

    def __init__(self, most: int) -> None:
        self.most = most
        self.acceptance = _Acceptance([_GUESS] * most, _KEEP_PAIR)
        self.costs: dict[int, _Costs] = {}  # by rows
        # Of trials: steps and seconds since the last one, and whether the next is a longer draft.
        self.steps, self.seconds, self.longer = 0, 0.0, True

    def request(self) -> _Request:
        """For one text, or one batch whose rows share every step.

        Acceptance begins with the mean of the texts before.
        """
        return _Request(self)


Lengths = FixedLength | AdaptiveLength


class _Request:
    """The lengths of one text; methods as of :class:`FixedLength`."""

    def __init__(self, pair: AdaptiveLength) -> None:
        self._pair = pair
        self._acceptance = _Acceptance(pair.acceptance.means, _KEEP_TEXT)
        self._rows = self._length = 0

    def choose(self, rows: int) -> int:
        pair = self._pair
        costs = pair.costs.setdefault(rows, _Costs())
        self._rows = rows
        unknown = [length for length in (pair.most, 0) if not costs.known(length)]
        self._length = unknown[0] if unknown else self._best(costs)
        return self._length

    def took(self, accepted: Sequence[int], seconds: float) -> None:
        pair, length = self._pair, self._length
        pair.costs[self._rows].add(length, seconds)
        pair.steps, pair.seconds = pair.steps + 1, pair.seconds + seconds
        for known in (pair.acceptance, self._acceptance):
            known.add(length, accepted)

    def _best(self, costs: _Costs) -> int:
        """The fastest length or, rarely, the fastest on one side of it."""
        pair = self._pair
        seconds, tokens = costs.estimates(pair.most), self._acceptance.tokens()
        rates = [count / cost for count, cost in zip(tokens, seconds, strict=True)]
        best = rates.index(max(rates))
        shorter, longer = range(best), range(best + 1, pair.most + 1)
        others = (longer or shorter) if pair.longer else (shorter or longer)
        if pair.steps < _GAP or not others:
            return best
        other = max(others, key=rates.__getitem__)
        lost = seconds[other] - tokens[other] / rates[best]
        if lost > _TRIALS * pair.seconds:
            return best
        pair.steps, pair.seconds, pair.longer = 0, 0.0, not pair.longer
        return other


class _Acceptance:
    """Chance that a drafted token is accepted after those before it, by position.

    A running mean each, of about 1 / (1 - ``keep``) steps; what was not seen for long
    stays as it is, but weighs little against what is seen next.
    """

    def __init__(self, means: Sequence[float], keep: float) -> None:
        self.means, self._keep = list(means), keep
        self._weights = [_LEAST] * len(self.means)

    def add(self, length: int, accepted: Sequence[int]) -> None:
        """A step of ``length`` drafted tokens, of which the rows accepted so many."""
        self._weights = [max(_LEAST, weight * self._keep) for weight in self._weights]
        for count in accepted:
            for place in range(min(count + 1, length)):
                self._weights[place] += 1
                error = (place < count) - self.means[place]
                self.means[place] += error / self._weights[place]

    def tokens(self) -> list[float]:
        """Tokens that a step is expected to yield, by length from 0."""
        return list(accumulate([1.0, *accumulate(self.means, mul)]))


class _Costs:
    """Seconds of a step by length, on a line through what was measured.

    Noise makes steps slower, hardly ever faster: of the latest times, up to a third may be
    faster than what counts.
    """

    def __init__(self) -> None:
        self._times: dict[int, deque[float]] = {}

    def add(self, length: int, seconds: float) -> None:
        self._times.setdefault(length, deque(maxlen=_WINDOW)).append(seconds)

    def known(self, length: int) -> bool:
        return len(self._times.get(length, ())) >= _SURE

    def estimates(self, most: int) -> list[float]:
        """By length from 0 to ``most``; both of these are known."""
        times = {length: list(seen) for length, seen in sorted(self._times.items())}
        sure = {length: _typical(seen) for length, seen in times.items() if self.known(length)}
        lengths, costs = list(sure), list(sure.values())
        made = []
        for length in range(most + 1):
            right = max(bisect_left(lengths, length), 1)
            share = (length - lengths[right - 1]) / (lengths[right] - lengths[right - 1])
            cost = costs[right - 1] + share * (costs[right] - costs[right - 1])
            if length not in sure:  # a single time may be too long, but not too short
                cost = min([cost, *times.get(length, ())])
            made.append(cost)
        return made


def _typical(times: Sequence[float]) -> float:
    return sorted(times)[(len(times) - 1) // 3]
