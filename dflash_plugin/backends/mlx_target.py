"""An mlx_lm target: one pass over one sequence, its taps, and its rewinding."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mlx.core as mx

from ..errors import PairMismatchError
from .mlx_cache import TargetCache

_BUILDING = threading.RLock()
"""Held while a model is watched or wrapped: two threads may use one, and neither takes long."""


class _Watched:
    """A layer or module that hands its input or output to ``seen``, and is itself otherwise."""

    def __init__(self, module: Any, seen: Any) -> None:
        self._module, self._seen = module, seen

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self._module(*args, **kwargs)
        self._seen(args, output)
        return output

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)


class Target:
    """A model of mlx_lm, and the layers a draft wants to see.

    MLX has no hooks: tapped layers are exchanged for watched ones while the graph of a
    pass is built, and put back before anything is returned.
    """

    def __init__(self, model: Any, taps: Sequence[int]) -> None:
        """Wrap ``model``.

        Raises:
            PairMismatchError: layers not found, or a state that cannot be rewound.
        """
        self.model, self.taps = model, tuple(taps)
        self.name = type(model).__module__.rpartition(".")[2]
        self._outer, self._inner = _text_model(model)
        layers = self._inner.layers
        if any(tap >= len(layers) for tap in taps):
            raise PairMismatchError(
                f"{self.name} has {len(layers)} decoder layers, expected layers {list(taps)}",
                hint="use the target the draft was trained for",
            )
        self._linear = {}
        with _BUILDING:  # or another thread's watched layers would be found
            for index in TargetCache(model).recurrent:
                if "linear_attn" not in layers[index]:
                    raise PairMismatchError(
                        f"{self.name}: layer {index} keeps a recurrent state but has no "
                        "linear_attn",
                        hint="this target cannot be rewound; use another back-end",
                    )
                self._linear[index] = layers[index].linear_attn

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        weight = self._inner.embed_tokens.weight
        return int(weight.shape[0])

    @property
    def hidden_size(self) -> int:
        """Width of the embedding, also where it is quantised."""
        return int(self._inner.embed_tokens(mx.array([[0]])).shape[-1])

    @property
    def max_length(self) -> int | None:
        """The config's ``max_position_embeddings``, if the model keeps it."""
        for holder in (self._outer, self._inner, self.model):
            found = getattr(getattr(holder, "args", None), "max_position_embeddings", None)
            if found is not None:
                return int(found)
        return None

    def embed(self, ids: mx.array) -> mx.array:
        """Raw embeddings: what the model itself multiplies them with is left out."""
        made: mx.array = self._inner.embed_tokens(ids)
        return made

    def head(self, x: mx.array) -> mx.array:
        """Logits without what the model does to them afterwards."""
        own = "lm_head" in self._outer
        made: mx.array = self._outer.lm_head(x) if own else self._inner.embed_tokens.as_linear(x)
        return made

    def cache(self) -> TargetCache:
        """State of an empty sequence."""
        return TargetCache(self.model)

    def forward(
        self, cache: TargetCache, tokens: Sequence[int] | mx.array
    ) -> tuple[mx.array, Any, dict[int, tuple[Any, Any]]]:
        """Append ``tokens``.

        Returns logits [1, n, vocab], taps [1, n, taps * hidden] (None without taps), and
        of each recurrent layer its module and input, for :meth:`TargetCache.rewind`.
        """
        cache.begin()
        outputs: dict[int, Any] = {}
        calls: dict[int, tuple[Any, Any]] = {}
        with self._watch(outputs, calls):
            ids = tokens if isinstance(tokens, mx.array) else mx.array(list(tokens))
            logits = self.model(ids[None], cache=cache.layers)
        cache.length += len(tokens)
        taps = mx.concatenate([outputs[tap] for tap in self.taps], axis=-1) if self.taps else None
        return logits, taps, calls

    @contextmanager
    def _watch(self, outputs: dict[int, Any], calls: dict[int, tuple[Any, Any]]) -> Iterator[None]:
        def tap(index: int) -> Any:
            def seen(_args: Any, output: Any) -> None:
                outputs[index] = output[0] if isinstance(output, tuple) else output

            return seen

        def record(index: int) -> Any:
            def seen(args: Any, _output: Any) -> None:
                calls[index] = (self._linear[index], args[0])

            return seen

        layers = self._inner.layers
        with _BUILDING:
            before = list(layers)
            try:
                for index, module in self._linear.items():
                    dict.__setitem__(layers[index], "linear_attn", _Watched(module, record(index)))
                for index in set(self.taps):
                    layers[index] = _Watched(layers[index], tap(index))
                yield
            finally:
                layers[:] = before
                for index, module in self._linear.items():
                    dict.__setitem__(layers[index], "linear_attn", module)


def _text_model(model: Any) -> tuple[Any, Any]:
    """The module with the head, and the one with embedding and layers."""
    for outer in (model, getattr(model, "language_model", {})):
        # As an entry: some models forward `model` to the module that has it.
        inner: Any = outer.get("model")
        if isinstance(getattr(inner, "layers", None), list) and "embed_tokens" in inner:
            return outer, inner
    raise PairMismatchError(
        f"{type(model).__module__}: no embed_tokens and layers where mlx_lm's models have them",
        hint="this target is not known to the mlx back-end",
    )
