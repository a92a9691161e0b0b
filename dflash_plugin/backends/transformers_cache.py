"""A target's state for rows of different lengths, each rewound on its own.

Keys and values lie at their own position in a buffer, whatever the row: nothing is
moved or cut when drafted tokens are rejected, the row's length is set back and
the next pass writes over them. What a query may see (its own past, its
window) is a mask, so full and sliding layers are stored alike.

A linear-attention layer (GDN: convolution and recurrent state) cannot go back, so
its state before a verify is kept, and after a rejection the layer alone
reads the accepted tokens again.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache, DynamicLayer

from ..errors import PairMismatchError

FULL, SLIDING, LINEAR = "full_attention", "sliding_attention", "linear_attention"
_GROWTH = 64  # positions a buffer grows by at least


class Places:
    """Which rows the current pass is of, and the position of each of its tokens."""

    def __init__(self, rows: int) -> None:
        self.rows = rows
        self.first = 0
        self.lengths = [0] * rows
        self._index: tuple[Tensor, Tensor] | None = None
        self._starts: list[int] = []
        self.count = self.width = 0
        self.host = torch.zeros(0, 0, dtype=torch.long)  # positions of the pass, on the CPU

    def begin(self, first: int, starts: Sequence[int], count: int, device: torch.device) -> Tensor:
        """A pass of ``count`` tokens per row, rows ``first``.. at positions ``starts``..

        Returns the positions [rows, count].
        """
        self.first, self._starts, self.count = first, list(starts), count
        self.width = max(starts) + count
        self.host = torch.tensor(self._starts)[:, None] + torch.arange(count)
        positions = self.host.to(device)
        self._index = None
        if len(set(starts)) > 1:
            rows = torch.arange(first, first + len(starts), device=device)[:, None]
            self._index = rows, positions
        return positions

    def store(self, buffer: Tensor, new: Tensor) -> Tensor:
        """Write ``new`` [rows, heads, count, dim]; returns [rows, heads, width, dim]."""
        rows = slice(self.first, self.first + len(self._starts))
        if self._index is None:
            start = self._starts[0]
            buffer[rows, :, start : start + self.count] = new
        else:
            buffer[self._index[0], :, self._index[1]] = new.transpose(1, 2)
        return buffer[rows, :, : self.width]


class Buffer:
    """Keys and values of one attention layer, [rows, heads, capacity, dim] each."""

    def __init__(self, places: Places) -> None:
        self._places = places
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Write the pass's keys and values; returns all that a query of it may see."""
        self.keys, self.values = self._room(self.keys, keys), self._room(self.values, values)
        return self._places.store(self.keys, keys), self._places.store(self.values, values)

    def keep(self, rows: Tensor) -> None:
        """Drop all other rows."""
        if self.keys is not None and self.values is not None:
            self.keys, self.values = self.keys[rows], self.values[rows]

    def _room(self, buffer: Tensor | None, new: Tensor) -> Tensor:
        need = self._places.width
        have = 0 if buffer is None else buffer.shape[2]
        if buffer is not None and need <= have:
            return buffer
        # Zeros: what a mask hides is still multiplied, by a zero that makes NaN of inf.
        capacity = max(need + _GROWTH, have * 3 // 2)
        grown = new.new_zeros(self._places.rows, new.shape[1], capacity, new.shape[3])
        if buffer is not None:
            grown[:, :, :have] = buffer
        return grown


class AttentionLayer(DynamicLayer):
    """A :class:`Buffer` where Transformers expects a cache layer."""

    is_croppable = False

    def __init__(self, places: Places) -> None:
        super().__init__()
        self.places, self.buffer = places, Buffer(places)

    def update(
        self, key_states: Tensor, value_states: Tensor, *_args: Any, **_kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`Buffer.update`."""
        self.is_initialized = True
        return self.buffer.update(key_states, value_states)

    def get_seq_length(self, *_args: Any) -> int:
        """Positions of the pass are given to the model, so nothing depends on this."""
        return max(self.places.lengths, default=0)


class TargetCache:
    """The state of ``rows`` sequences of one target."""

    def __init__(self, config: Any, rows: int, *, name: str = "the target") -> None:
        """Make an empty one for a text config.

        Raises:
            PairMismatchError: a kind of layer whose state is not known here.
        """
        self.places = Places(rows)
        self.kinds = layer_kinds(config, name)
        linear = [i for i, kind in enumerate(self.kinds) if kind == LINEAR]
        self.linear: list[list[Any]] = []
        layers: list[Any] = [AttentionLayer(self.places) for _ in self.kinds]
        if linear:
            fresh = _own_layers(config, linear, name)
            self.linear = [[copy.deepcopy(fresh[i]) for _ in range(rows)] for i in linear]
            for i in linear:
                layers[i] = fresh[i]
        self.linear_indices = linear
        self.cache = Cache(layers=layers)

    @property
    def lengths(self) -> list[int]:
        """Tokens of each row."""
        return self.places.lengths

    def enter(self, rows: Sequence[int]) -> None:
        """Put the linear states of ``rows`` together for a pass."""
        for index, states in zip(self.linear_indices, self.linear, strict=True):
            self.cache.layers[index] = _together([states[row] for row in rows])

    def leave(self, rows: Sequence[int]) -> None:
        """Take the states apart again."""
        for index, states in zip(self.linear_indices, self.linear, strict=True):
            for place, row in enumerate(rows):
                states[row] = _part(self.cache.layers[index], place)

    def keep(self, rows: Sequence[int], device: torch.device) -> None:
        """Drop all other rows."""
        index = torch.tensor(list(rows), device=device)
        for layer in self.cache.layers:
            if isinstance(layer, AttentionLayer):
                layer.buffer.keep(index)
        self.linear = [[states[row] for row in rows] for states in self.linear]
        self.places.lengths = [self.places.lengths[row] for row in rows]
        self.places.rows = len(rows)


def layer_kinds(config: Any, name: str) -> list[str]:
    """Full, sliding or linear attention of each layer.

    Raises:
        PairMismatchError: another kind.
    """
    kinds = getattr(config, "layer_types", None)
    if kinds is None:
        window = getattr(config, "sliding_window", None)
        kinds = [FULL if window is None else SLIDING] * config.num_hidden_layers
    unknown = sorted(set(kinds) - {FULL, SLIDING, LINEAR})
    if unknown:
        raise PairMismatchError(
            f"{name} has {unknown[0]} layers, expected {FULL}, {SLIDING} or {LINEAR}",
            hint="serve this target with vLLM or SGLang",
        )
    return list(kinds)


def _own_layers(config: Any, linear: Sequence[int], name: str) -> list[Any]:
    """Transformers' own cache layers, of which the linear ones are used."""
    layers = getattr(DynamicCache(config=config), "layers", [])
    known = [i for i in linear if i < len(layers) and hasattr(layers[i], "recurrent_states")]
    if known != list(linear):
        raise PairMismatchError(
            f"{name} has {LINEAR} layers, and this release of Transformers keeps no "
            "recurrent state for them in its cache layers",
            hint="pip install -U transformers",
        )
    return list(layers)


def _map(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """``value`` with every state tensor changed, in its lists and dictionaries too."""
    if isinstance(value, Tensor):
        return change(value) if value.ndim else value
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    if isinstance(value, list):
        return [_map(item, change) for item in value]
    return value


def changed(layer: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a linear cache layer with its state tensors [rows, …] changed."""
    made = copy.copy(layer)
    for key, value in vars(layer).items():
        setattr(made, key, _map(value, change))
    return made


def _part(layer: Any, row: int) -> Any:
    return changed(layer, lambda state: state[row : row + 1].clone())


def _together(layers: Sequence[Any]) -> Any:
    """One layer of the rows of several, which are copied: passes write in place."""
    if len(layers) == 1:
        return changed(layers[0], torch.clone)
    made = copy.copy(layers[0])
    for key, value in vars(layers[0]).items():
        setattr(made, key, _merge([value, *(vars(layer)[key] for layer in layers[1:])]))
    return made


def _merge(values: list[Any]) -> Any:
    first = values[0]
    if isinstance(first, Tensor):
        return torch.cat(values) if first.ndim else first
    if isinstance(first, dict):
        return {key: _merge([value[key] for value in values]) for key in first}
    if isinstance(first, list):
        return [_merge(list(items)) for items in zip(*values, strict=True)]
    return first
