"""A target's caches on MLX, rewindable by any number of tokens of the last pass.

Full attention is trimmed as it is. A sliding layer's rotating cache loses what left
its window and cannot go back, so it is replaced. A recurrent state
(GDN) cannot go back either: arrays are never changed in place, so the
state before a pass is simply kept, and after a rejection the layer's module alone
reads the accepted tokens again.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx_lm.models.base import create_causal_mask
from mlx_lm.models.cache import ArraysCache, KVCache, RotatingKVCache, make_prompt_cache

from ..errors import PairMismatchError


class WindowCache:
    """Keys and values of a sliding layer: its window, and as many again to go back to.

    Stands where the model expects a cache; a query sees ``window`` positions, its own
    included.
    """

    def __init__(self, window: int) -> None:
        self.window = window
        self.offset = 0
        self.keys: Any = None
        self.values: Any = None
        self._first = 0  # position of the first key held

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append [1, heads, n, dim]; returns what the pass's queries may see."""
        held = self.offset - self._first
        if self.keys is not None:
            if held > 2 * self.window:
                drop = held - self.window
                self._first, held = self._first + drop, self.window
                self.keys, self.values = self.keys[:, :, drop:], self.values[:, :, drop:]
            keys = mx.concatenate([self.keys[:, :, :held], keys], axis=2)
            values = mx.concatenate([self.values[:, :, :held], values], axis=2)
        self.keys, self.values = keys, values
        self.offset = self._first + keys.shape[2]
        return keys, values

    def make_mask(
        self,
        N: int,  # noqa: N803 - mlx_lm's name
        window_size: int | None = None,
        return_array: bool = False,
    ) -> Any:
        """As mlx_lm's caches; must be called before the pass's keys are appended."""
        held = self.offset - self._first
        if held > 2 * self.window:
            held = self.window
        if held + N <= self.window and not return_array:
            return "causal" if N > 1 else None
        return create_causal_mask(N, held, window_size=window_size or self.window)

    def trim(self, count: int) -> int:
        """Forget the last ``count`` tokens."""
        self.offset -= count
        return count

    def reaches(self, count: int) -> bool:
        """Whether what is left after forgetting ``count`` tokens fills a window."""
        left = self.offset - count
        return left - self._first >= min(left, self.window - 1)

    def is_trimmable(self) -> bool:
        """Whether the last tokens can be forgotten."""
        return True

    def empty(self) -> bool:
        """Whether nothing is held."""
        return self.keys is None

    def size(self) -> int:
        """Positions held."""
        return self.offset - self._first

    @property
    def state(self) -> tuple[Any, Any]:
        """The arrays."""
        return self.keys, self.values


class TargetCache:
    """The state of one sequence of an mlx_lm model."""

    def __init__(self, model: Any) -> None:
        """Make an empty one.

        Raises:
            PairMismatchError: a cache of a kind that is not known here.
        """
        self.length = 0
        self.layers: list[Any] = []
        for layer in make_prompt_cache(model):
            if type(layer) is RotatingKVCache and layer.keep == 0:
                self.layers.append(WindowCache(layer.max_size))
            elif type(layer) in (KVCache, ArraysCache):
                self.layers.append(layer)
            else:
                raise PairMismatchError(
                    f"{type(model).__module__} keeps its state in {type(layer).__name__}, "
                    "expected KVCache, RotatingKVCache or ArraysCache",
                    hint="this target cannot be rewound; use another back-end",
                )
        self.recurrent = [i for i, layer in enumerate(self.layers) if type(layer) is ArraysCache]
        self._before: dict[int, list[Any]] = {}

    def begin(self) -> None:
        """Remember the recurrent states before a pass."""
        self._before = {i: list(self.layers[i].cache) for i in self.recurrent}

    def rewind(self, count: int, kept: int, modules: dict[int, tuple[Any, Any]]) -> None:
        """Of the last pass of ``count`` tokens keep the first ``kept``.

        Args:
            modules: of each recurrent layer, its module and the module's input in that pass.
        """
        self.length -= count - kept
        if kept == count:
            return
        for index, layer in enumerate(self.layers):
            if index not in self.recurrent:
                layer.trim(count - kept)
        for index in self.recurrent:
            module, inputs = modules[index]
            self.layers[index].cache = list(self._before[index])
            if kept:
                module(inputs[:, :kept], mask=None, cache=self.layers[index])

    def reaches(self, count: int) -> bool:
        """Whether the last ``count`` tokens, of any pass, can be forgotten."""
        windows = [layer for layer in self.layers if type(layer) is WindowCache]
        return not self.recurrent and all(layer.reaches(count) for layer in windows)

    def forget(self, count: int) -> None:
        """Forget the last ``count`` tokens."""
        self.length -= count
        for layer in self.layers:
            if count:
                layer.trim(count)

    def arrays(self) -> list[Any]:
        """What a pass has changed, to be evaluated."""
        found: list[Any] = []
        for layer in self.layers:
            held = layer.cache if type(layer) is ArraysCache else (layer.keys, layer.values)
            found += [array for array in held if array is not None]
        return found
