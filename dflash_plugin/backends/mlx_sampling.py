"""Choosing tokens, and verifying drafted ones so that nothing is lost; MLX."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx

from .api import Options


class Sampler:
    """Draws tokens, from draft and target alike, as :class:`Options` say.

    Rejection sampling: Leviathan et al., arXiv 2211.17192, section 2.3.
    """

    def __init__(self, options: Options) -> None:
        self._options = options
        seed = random.getrandbits(32) if options.seed is None else options.seed
        self._key = mx.random.key(seed)

    def choose(self, logits: mx.array) -> int:
        """One token id from logits [vocab]."""
        if self._options.greedy:
            return int(mx.argmax(logits).item())
        return int(self._draw(self.probabilities(logits)).item())

    def draft(self, logits: mx.array) -> tuple[mx.array, Any]:
        """Token ids [k] of the draft's logits [k, vocab], and what they were drawn from."""
        if self._options.greedy:
            return mx.argmax(logits, axis=-1), None
        probabilities = self.probabilities(logits)
        return self._draw(probabilities), probabilities

    def verify(self, drafted: mx.array, drawn_from: Any, logits: mx.array) -> tuple[int, int]:
        """How many drafted tokens stay, and the token that follows them.

        Args:
            drafted, drawn_from: from :meth:`draft`.
            logits: of the target, [k + 1, vocab]; row i is for the token at draft place i.
        """
        if drawn_from is None:
            best = mx.argmax(logits, axis=-1)
            mx.eval(best, drafted)
            chosen: list[int] = best.tolist()
            accepted = _prefix([a == b for a, b in zip(drafted.tolist(), chosen, strict=False)])
            return accepted, chosen[accepted]
        p, q = self.probabilities(logits), drawn_from
        places, tokens = mx.arange(len(drafted)), drafted
        uniform = mx.random.uniform(shape=(len(drafted),), key=self._next())
        stays: list[bool] = (uniform * q[places, tokens] < p[places, tokens]).tolist()
        accepted = _prefix(stays)
        wanted = p[accepted]
        if accepted < len(drafted):
            left = mx.maximum(wanted - q[accepted], 0)
            # p equals q but for rounding: nothing is left
            wanted = mx.where(left.sum() > 0, left, wanted)
        return accepted, int(self._draw(wanted).item())

    def probabilities(self, logits: mx.array) -> mx.array:
        """Logits [..., vocab] as float32 probabilities, cut to top_k, top_p, min_p."""
        options = self._options
        scaled = logits.astype(mx.float32) / options.temperature
        vocab = scaled.shape[-1]
        if 0 < options.top_k < vocab:
            least = mx.sort(scaled, axis=-1)[..., vocab - options.top_k, None]
            scaled = mx.where(scaled < least, -mx.inf, scaled)
        if options.top_p < 1:
            order = mx.argsort(-scaled, axis=-1)
            shares = mx.softmax(mx.take_along_axis(scaled, order, axis=-1), axis=-1)
            cut = mx.cumsum(shares, axis=-1) - shares >= options.top_p
            places = mx.argsort(order, axis=-1)
            scaled = mx.where(mx.take_along_axis(cut, places, axis=-1), -mx.inf, scaled)
        probabilities = mx.softmax(scaled, axis=-1)
        if options.min_p > 0:
            least = probabilities.max(axis=-1, keepdims=True) * options.min_p
            probabilities = mx.where(probabilities < least, 0, probabilities)
            probabilities = probabilities / probabilities.sum(axis=-1, keepdims=True)
        return probabilities

    def processed(
        self, logits: mx.array, known: Callable[[], Sequence[int]], drafted: int
    ) -> mx.array:
        """Apply the logits processors to [drafted + 1, vocab].

        Args:
            known: gives the known tokens and then the drafted ones, which waits for them.
            drafted: how many of them are.
        """
        if not self._options.logits_processors:
            return logits
        text = known()
        ids, rows = mx.array(list(text)), []
        for place in range(drafted + 1):
            scores = logits[place][None]
            for process in self._options.logits_processors:
                scores = process(ids[: len(text) - drafted + place], scores)
            rows.append(scores[0])
        return mx.stack(rows)

    def _draw(self, weights: mx.array) -> mx.array:
        """One index per row of weights [..., vocab], which need not add up to 1."""
        return mx.random.categorical(mx.log(weights), axis=-1, key=self._next())

    def _next(self) -> mx.array:
        self._key, used = mx.random.split(self._key)
        return used


def _prefix(stays: Sequence[bool]) -> int:
    """How many first entries are true."""
    return next((i for i, stay in enumerate(stays) if not stay), len(stays))
