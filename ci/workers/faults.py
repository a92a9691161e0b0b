"""Mistakes an engine can make, put into a loaded pair of the Transformers back-end.

Each leaves the models as they are and the program running: what is wrong shows in the
tokens, the drafted blocks or the taps, or nowhere.
"""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from unittest import mock

BLOCK = 16
"""Tokens of a prefix cache's block, as vLLM's default is."""


def _has_windows(backend):
    return any(layer.window for layer in backend.draft.config.layers)


def _always(_backend):
    return True


@contextmanager
def _config(backend, **changes):
    changed = replace(backend.draft.config, **changes)
    with mock.patch.object(backend.draft, "config", changed):
        yield


def _taps_plus_one(backend):
    return mock.patch.object(backend.target, "taps", tuple(t + 1 for t in backend.target.taps))


def _wrong_mask(backend):
    mask = backend.draft.config.mask_token_id
    return _config(backend, mask_token_id=mask - 1 if mask else 1)


@contextmanager
def _wrong_rope(backend):
    import torch

    from dflash_plugin import draft_math

    plain = {"rope_type": "default", "rope_theta": 10000.0}
    inverse, factor = draft_math.frequencies(replace(backend.draft.config, rope=plain))
    with ExitStack() as stack:
        wrong = {"_inverse": torch.tensor(inverse, dtype=torch.float64), "_rope_factor": factor}
        for name, value in wrong.items():
            stack.enter_context(mock.patch.object(backend.draft, name, value))
        yield


def _no_windows(backend):
    layers = backend.draft.config.layers
    return _config(
        backend, layers=tuple(replace(layer, window=None, causal=False) for layer in layers)
    )


def _no_embed_scale(backend):
    raw = {**backend.draft.config.raw, "input_embedding_scale": 1.0}
    return _config(backend, raw=raw, input_embedding_scale=1.0)


def _no_target_windows(backend):
    own = backend.target._mask

    def mask(positions, width, _kind):
        return own(positions, width, "full_attention")

    return mock.patch.object(backend.target, "_mask", mask)


def _no_rewind(backend):
    def rewind(undo, kept):
        for row, count in zip(undo.rows, kept, strict=True):
            undo.cache.lengths[row] -= undo.count - count
        undo.cache.leave(undo.rows)

    return mock.patch.object(backend.target, "rewind", rewind)


@contextmanager
def _nothing(_backend):
    yield


def _common(cache, prompt):
    """How many tokens of the prompt a text left behind."""
    both = zip(cache.token_ids, prompt, strict=False)
    return next((i for i, (a, b) in enumerate(both) if a != b), len(cache.token_ids))


def _stale_prefix(cache, prompt, _backend):
    """A block that begins as the prompt's does is taken for it whole, with its old end."""
    held, common = len(cache.token_ids), _common(cache, prompt)
    # A recurrent state is the state after all that is held: there is no older one to take.
    end = held if cache.target.linear_indices else (common // BLOCK + 1) * BLOCK
    end = min(end, held, len(prompt) - 1)
    cache.token_ids[common:end] = prompt[common:end]


def _stale_draft_block(cache, prompt, _backend):
    """The draft's last block of the prefix holds another block's keys and values."""
    import torch

    end = _common(cache, prompt)
    with torch.inference_mode():
        for buffer in cache.draft.buffers:
            for held in (buffer.keys, buffer.values):
                held[:, :, end - BLOCK : end] = held[:, :, :BLOCK].clone()


@dataclass(frozen=True)
class Fault:
    """``change`` holds while a pair generates; ``touch`` is done to what a text left behind."""

    change: object = _nothing
    touch: object = None
    applies: object = _always


FAULTS = {
    "taps-plus-one": Fault(_taps_plus_one),
    "wrong-mask-id": Fault(_wrong_mask),
    "wrong-rope": Fault(_wrong_rope),
    "windows-ignored": Fault(_no_windows, applies=_has_windows),
    "target-windows-ignored": Fault(
        _no_target_windows,
        applies=lambda backend: "sliding_attention" in backend.target.kinds,
    ),
    "no-embedding-scale": Fault(
        _no_embed_scale,
        applies=lambda b: b.draft.config.embedding_scale(b.target.config.model_type) != 1.0,
    ),
    "state-not-rewound": Fault(
        _no_rewind,
        applies=lambda backend: "linear_attention" in backend.target.kinds,
    ),
    "stale-prefix-block": Fault(touch=_stale_prefix),
    "stale-draft-block": Fault(touch=_stale_draft_block),
}
