"""A Transformers target: one pass over several rows, its taps, and its rewinding."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import PairMismatchError, UsageError
from ..reference.target import eos_token_ids
from .transformers_cache import LINEAR, SLIDING, TargetCache, _part, _together, layer_kinds


@dataclass(frozen=True)
class Pass:
    """Of one forward pass over n tokens of each of some rows.

    Attributes:
        logits: [rows, kept, vocab], of the token after each of the last ``kept`` tokens.
        taps: [rows, n, taps * hidden], outputs of the tapped layers side by side.
    """

    logits: Tensor
    taps: Tensor


class Target:
    """A ``PreTrainedModel`` with a head, and the layers a draft wants to see.

    Hooks are on the model only while a pass runs.
    """

    def __init__(self, model: Any, taps: Sequence[int]) -> None:
        """Wrap ``model``, set to evaluation mode.

        Raises:
            PairMismatchError: layers not found, or a head or cache of an unknown kind.
            UsageError: an attention implementation that takes no mask.
        """
        self.model = model.eval()
        self.name = type(model).__name__
        self.config = model.config.get_text_config()
        self.kinds = layer_kinds(self.config, self.name)
        layers = getattr(model.get_decoder(), "layers", None)
        if layers is None or any(tap >= len(layers) for tap in taps):
            found = "no" if layers is None else str(len(layers))
            raise PairMismatchError(
                f"{self.name} has {found} decoder layers, expected layers {list(taps)}",
                hint="use the target the draft was trained for",
            )
        self.layers: Any = layers
        self.taps = tuple(taps)
        self.embedding: Tensor = model.get_input_embeddings().weight
        self.head = model.get_output_embeddings()
        if getattr(self.head, "bias", None) is not None:
            raise PairMismatchError(f"{self.name}: the head has a bias, expected none")
        attention = getattr(self.config, "_attn_implementation", None) or "eager"
        if attention not in ("eager", "sdpa"):
            raise UsageError(
                f"{self.name} runs with attn_implementation {attention!r}, expected 'sdpa' or "
                "'eager': rows of different lengths need a mask",
                hint="load the target with attn_implementation='sdpa'",
            )
        self._additive = attention == "eager"
        self._keeps_rows = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.dtype, self.device = self.embedding.dtype, self.embedding.device
        self._linear = {
            i: _linear_module(self.layers[i], i, self.name)
            for i, kind in enumerate(self.kinds)
            if kind == LINEAR
        }
        if self._linear:
            self._check_states_are_read()

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return len(self.embedding)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """From ``generation_config.json``, else ``config.json``; either may list several."""
        return eos_token_ids(self.model, self.config)

    def cache(self, rows: int) -> TargetCache:
        """State of ``rows`` empty sequences."""
        return TargetCache(self.config, rows, name=self.name)

    def forward(
        self, cache: TargetCache, rows: Sequence[int], tokens: Sequence[Sequence[int]], keep: int
    ) -> tuple[Pass, Undo]:
        """Append ``tokens``, equally many to each of ``rows``, which follow each other.

        Args:
            keep: for how many last tokens logits are wanted.
        """
        ids = torch.tensor([list(row) for row in tokens], device=self.device)
        count = ids.shape[1]
        starts = [cache.lengths[row] for row in rows]
        positions = cache.places.begin(rows[0], starts, count, self.device)
        cache.enter(rows)
        limit = {"logits_to_keep": keep} if self._keeps_rows else {}
        with self._watch() as (captured, calls):
            output = self.model(
                input_ids=ids,
                attention_mask=self._masks(positions, cache.places.width),
                position_ids=positions,
                past_key_values=cache.cache,
                use_cache=True,
                **limit,
            )
        taps = torch.cat([captured[tap] for tap in self.taps], dim=-1) if self.taps else None
        for row in rows:
            cache.lengths[row] += count
        undo = Undo(cache, list(rows), count, calls)
        return Pass(output.logits[:, -keep:], taps), undo

    def _masks(self, positions: Tensor, width: int) -> Any:
        """What each token of a pass sees, for the kinds of layers the model has."""
        kinds = dict.fromkeys(kind for kind in self.kinds if kind != LINEAR)
        made = {kind: self._mask(positions, width, kind) for kind in kinds}
        # Hybrids have one kind, and of a mask for it they know that it is not of padding.
        return next(iter(made.values())) if len(made) == 1 else made

    def _mask(self, positions: Tensor, width: int, kind: str) -> Tensor:
        """[rows, 1, n, width]: bool, or added to the scores."""
        behind = positions[:, None, :, None] - torch.arange(width, device=self.device)
        seen = behind >= 0
        if kind == SLIDING:
            seen &= behind < self.config.sliding_window
        if not self._additive:
            return seen
        mask = torch.zeros(seen.shape, dtype=self.dtype, device=self.device)
        return mask.masked_fill(~seen, torch.finfo(self.dtype).min)

    @contextmanager
    def _watch(self) -> Iterator[tuple[dict[int, Tensor], dict[int, dict[str, Any]]]]:
        """Collect outputs of tapped layers and calls of linear-attention modules.

        Hooks and not ``output_hidden_states``: its last entry is after the final
        norm, so a tap on the last layer would be wrong, and it keeps all layers.
        """
        captured: dict[int, Tensor] = {}
        calls: dict[int, dict[str, Any]] = {}

        def tap(index: int) -> Any:
            def hook(_module: Any, _args: Any, output: Any) -> None:
                captured[index] = output[0] if isinstance(output, tuple) else output

            return hook

        def record(index: int) -> Any:
            names = list(inspect.signature(self._linear[index].forward).parameters)

            def hook(_module: Any, args: Any, kwargs: Any) -> None:
                calls[index] = {**dict(zip(names, args, strict=False)), **kwargs}

            return hook

        handles = [self.layers[i].register_forward_hook(tap(i)) for i in set(self.taps)]
        handles += [
            module.register_forward_pre_hook(record(i), with_kwargs=True)
            for i, module in self._linear.items()
        ]
        try:
            yield captured, calls
        finally:
            for handle in handles:
                handle.remove()

    @torch.inference_mode()
    def _check_states_are_read(self) -> None:
        """Some releases start anew where several tokens follow a state: try it on one layer.

        Raises:
            PairMismatchError: the layer does so.
        """
        index, module = next(iter(self._linear.items()))
        some = next(p for p in module.parameters() if p.is_floating_point())
        x = torch.randn(1, 6, self.config.hidden_size, generator=torch.Generator().manual_seed(0))
        x = x.to(some.device, some.dtype)
        outputs = []
        for parts in ([x], [x[:, :3], x[:, 3:]]):
            cache = self.cache(1)
            cache.enter([0])
            outputs.append(torch.cat([module(part, cache.cache) for part in parts], dim=1).float())
        if (outputs[0] - outputs[1]).norm() > 0.1 * outputs[0].norm():
            raise PairMismatchError(
                f"{self.name}: layer {index} ({LINEAR}) does not go on from its state where "
                "several tokens follow, so nothing can be verified",
                hint="pip install -U transformers",
            )

    def rewind(self, undo: Undo, kept: Sequence[int]) -> None:
        """Forget the last tokens of a pass: each row keeps its first ``kept``, at least 1."""
        cache, rows = undo.cache, undo.rows
        for row, count in zip(rows, kept, strict=True):
            cache.lengths[row] -= undo.count - count
        if not self._linear:
            return
        groups: dict[int, list[int]] = {}
        for place, count in enumerate(kept):
            groups.setdefault(count, []).append(place)
        for index, states in zip(cache.linear_indices, cache.linear, strict=True):
            after = cache.cache.layers[index]
            for count, places in groups.items():
                if count == undo.count:
                    ended = [_part(after, place) for place in places]
                else:
                    ended = self._read_again(undo, index, count, places)
                for place, state in zip(places, ended, strict=True):
                    states[rows[place]] = state

    def _read_again(self, undo: Undo, index: int, count: int, places: Sequence[int]) -> list[Any]:
        """States of some rows of a linear layer after the first ``count`` tokens of a pass."""
        cache = undo.cache
        before = [cache.linear[cache.linear_indices.index(index)][undo.rows[p]] for p in places]
        cache.cache.layers[index] = _together(before)
        call = dict(undo.calls[index])
        call["hidden_states"] = call["hidden_states"][list(places), :count]
        if isinstance(call.get("cache_position"), Tensor):
            call["cache_position"] = call["cache_position"][:count]
        self._linear[index](**call)
        return [_part(cache.cache.layers[index], place) for place in range(len(places))]


@dataclass(frozen=True)
class Undo:
    """What it takes to rewind a pass: rows, tokens each, calls of the linear layers."""

    cache: TargetCache
    rows: list[int]
    count: int
    calls: dict[int, dict[str, Any]]


def _linear_module(layer: Any, index: int, name: str) -> Any:
    module = getattr(layer, "linear_attn", None)
    if module is None:
        raise PairMismatchError(
            f"{name}: layer {index} is a {LINEAR} layer without linear_attn",
            hint="serve this target with vLLM or SGLang",
        )
    return module
