"""The target model: logits, taps, and going back after rejected tokens."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from ..errors import MissingDependencyError, ModelNotFoundError, PairMismatchError, UsageError

PREFILL_CHUNK = 512
"""Tokens per forward pass of a long text: bounds the logits held, [chunk, vocab]."""

_REWINDABLE = {"full_attention", "sliding_attention"}


@dataclass(frozen=True)
class TargetOutput:
    """Of the tokens of one forward pass.

    Attributes:
        logits: [rows, vocab] of the token after each of the last ``rows`` tokens.
        taps: [n, taps * hidden], outputs of the tapped layers side by side.
    """

    logits: Tensor
    taps: Tensor


class TargetSession(Protocol):
    """One sequence; sessions of one target do not disturb each other."""

    @property
    def length(self) -> int:
        """Tokens of the sequence so far."""
        ...

    def forward(self, tokens: Sequence[int], *, rows: int | None = None) -> TargetOutput:
        """Append ``tokens`` (at least one); ``rows`` limits the logits returned."""
        ...

    def rewind(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        ...


class Target(Protocol):
    """What the decode loop and the draft need of a target model."""

    @property
    def vocab_size(self) -> int:
        """Rows of embedding and head."""
        ...

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a text."""
        ...

    def session(self) -> TargetSession:
        """Start an empty sequence."""
        ...


class HFTarget:
    """A Transformers causal language model."""

    def __init__(self, model: Any, taps: Sequence[int], *, use_cache: bool | None = None) -> None:
        """Wrap ``model`` (a ``PreTrainedModel`` with a head), set to evaluation mode.

        Args:
            taps: layer indices whose outputs are returned, in this order.
            use_cache: keep keys and values between passes. None: where they can
                be rewound; a recurrent state cannot, and is recomputed from the
                first token at every pass (correct, slow).

        Raises:
            UsageError: ``use_cache=True`` for a model that cannot be rewound.
            PairMismatchError: decoder layers not found, fewer than ``taps`` say,
                or a head with a bias, which no draft has.
        """
        self.model = model.eval()
        self.taps = tuple(taps)
        self.config = model.config.get_text_config()
        obstacle = _rewind_obstacle(model, self.config)
        if use_cache and obstacle:
            raise UsageError(
                f"{type(model).__name__} cannot be rewound to an earlier token: {obstacle}",
                hint="use_cache=None recomputes the sequence instead",
            )
        self.use_cache = not obstacle if use_cache is None else use_cache
        layers = getattr(model.get_decoder(), "layers", None)
        if layers is None or any(tap >= len(layers) for tap in self.taps):
            found = "no decoder layers" if layers is None else f"{len(layers)} decoder layers"
            raise PairMismatchError(
                f"{type(model).__name__} has {found}, expected layers {list(self.taps)}",
                hint="use the target the draft was trained for",
            )
        self._tapped = [layers[tap] for tap in self.taps]
        head = model.get_output_embeddings()
        if getattr(head, "bias", None) is not None:
            raise PairMismatchError(f"{type(model).__name__}: the head has a bias, expected none")
        self.embedding: Tensor = model.get_input_embeddings().weight.detach()
        self.head: Tensor = head.weight.detach()
        self._keeps_rows = "logits_to_keep" in inspect.signature(model.forward).parameters

    @classmethod
    def load(
        cls,
        folder: Path,
        taps: Sequence[int],
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        use_cache: bool | None = None,
    ) -> HFTarget:
        """Load a local model folder; never the network, never code from the folder.

        Raises:
            ModelNotFoundError: no such folder.
            MissingDependencyError: Transformers is not installed.
        """
        if not folder.is_dir():
            raise ModelNotFoundError(
                f"{folder}: no such model folder", hint="give the folder that holds config.json"
            )
        try:
            from transformers import AutoModelForCausalLM
        except ImportError as err:
            raise MissingDependencyError(
                "the reference needs Transformers",
                hint="pip install 'dflash-plugin[transformers]'",
            ) from err
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, local_files_only=True)
        return cls(model.to(device), taps, use_cache=use_cache)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return len(self.embedding)

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """From ``generation_config.json``, else ``config.json``; either may list several."""
        return eos_token_ids(self.model, self.config)

    def session(self) -> HFSession:
        """Start an empty sequence."""
        return HFSession(self)

    def run(self, tokens: Sequence[int], rows: int, cache: Any | None) -> TargetOutput:
        """One forward pass over ``tokens``, after those in ``cache``."""
        ids = torch.tensor([list(tokens)], device=self.embedding.device)
        limit = {"logits_to_keep": rows} if self._keeps_rows else {}
        with torch.inference_mode(), self.captured() as captured:
            output = self.model(
                input_ids=ids, past_key_values=cache, use_cache=cache is not None, **limit
            )
        taps = torch.cat([captured[tap][0] for tap in self.taps], dim=-1)
        return TargetOutput(output.logits[0, -rows:], taps)

    @contextmanager
    def captured(self) -> Iterator[dict[int, Tensor]]:
        """Collect the outputs of the tapped layers while the context lasts.

        Hooks and not ``output_hidden_states``: its last entry is after the final
        norm, so a tap on the last layer would be wrong, and it keeps all layers.
        """
        captured: dict[int, Tensor] = {}

        def keep(tap: int) -> Any:
            def hook(_module: Any, _args: Any, output: Any) -> None:
                captured[tap] = output[0] if isinstance(output, tuple) else output

            return hook

        handles = [
            layer.register_forward_hook(keep(tap))
            for tap, layer in zip(self.taps, self._tapped, strict=True)
        ]
        try:
            yield captured
        finally:
            for handle in handles:
                handle.remove()


class HFSession:
    """One sequence of an :class:`HFTarget`."""

    def __init__(self, target: HFTarget) -> None:
        self._target = target
        self._tokens: list[int] = []
        self._cache = _full_cache() if target.use_cache else None

    @property
    def length(self) -> int:
        """Tokens of the sequence so far."""
        return len(self._tokens)

    def forward(self, tokens: Sequence[int], *, rows: int | None = None) -> TargetOutput:
        """Append ``tokens``; see :class:`TargetSession`."""
        new, rows = len(tokens), len(tokens) if rows is None else rows
        self._tokens += tokens
        if self._cache is not None:
            return self._target.run(tokens, rows, self._cache)
        output = self._target.run(self._tokens, rows, None)
        return TargetOutput(output.logits, output.taps[-new:])

    def rewind(self, length: int) -> None:
        """Forget all but the first ``length`` tokens."""
        dropped = self.length - length
        del self._tokens[length:]
        if self._cache is not None and dropped > 0:
            # Negative: the one spelling that Transformers 4 and 5 read alike.
            self._cache.crop(-dropped)


def prefill(
    session: TargetSession,
    tokens: Sequence[int],
    *,
    chunk: int = PREFILL_CHUNK,
    rows: int | None = None,
) -> Iterator[tuple[int, TargetOutput]]:
    """Append a long text chunk by chunk, yielding each chunk's offset and output."""
    for start in range(0, len(tokens), chunk):
        yield start, session.forward(tokens[start : start + chunk], rows=rows)


def eos_token_ids(model: Any, config: Any) -> frozenset[int]:
    """The end tokens of a Transformers model; ``config`` is its text config."""
    for source in (getattr(model, "generation_config", None), config):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return frozenset([ids] if isinstance(ids, int) else ids)
    return frozenset()


def _full_cache() -> Any:
    """A cache of every key and value, sliding layers included (their mask still slides).

    Transformers' own sliding layers drop what left the window and then cannot
    be rewound; without a config ``DynamicCache`` makes none of them.
    """
    from transformers import DynamicCache

    return DynamicCache()


def _rewind_obstacle(model: Any, config: Any) -> str:
    """Why this model's state cannot go back to an earlier token; empty if it can."""
    kinds = set(getattr(config, "layer_types", None) or ()) - _REWINDABLE
    if kinds:
        return f"it has {', '.join(sorted(kinds))} layers"
    if getattr(model, "_is_stateful", False):
        return "it keeps a recurrent state"
    return ""
