"""Tapped states held against Transformers' hidden states of the same tokens.

Taps shifted by a layer change an acceptance length by hardly more than its noise, and the text
not at all: they are seen only where they are compared themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import PairMismatchError
from .target import HFTarget


@dataclass(frozen=True)
class TapDistance:
    """Of one tap: the layer it should be the output of, and what it is.

    Attributes:
        tap: that layer; -1 would be the embeddings.
        distance: the largest difference, as a share of the state's root mean square.
        nearest: the layer whose output the given states are nearest to.
    """

    tap: int
    distance: float
    nearest: int


@torch.inference_mode()
def compare_taps(target: HFTarget, ids: Sequence[int], given: Tensor) -> list[TapDistance]:
    """How far ``given`` is from ``hidden_states[i + 1]`` of each of the target's taps i.

    Args:
        ids: at least one token, from the beginning of a text.
        given: [len(ids), taps * hidden], the states of the taps side by side.

    Raises:
        PairMismatchError: ``given`` has another shape, or a tap is the last layer, whose entry
            in ``hidden_states`` is after the final norm.
    """
    tokens = torch.tensor([list(ids)], device=target.embedding.device)
    output = target.model(tokens, output_hidden_states=True, use_cache=False)
    states = [state[0].double() for state in output.hidden_states[:-1]]
    expected = [len(ids), len(target.taps) * states[0].shape[-1]]
    if list(given.shape) != expected or max(target.taps) + 1 >= len(states):
        raise PairMismatchError(
            f"states {list(given.shape)} of taps {list(target.taps)}, expected {expected} and "
            f"layers before the last of {len(states)}",
            hint="compare the taps of this draft's own target",
        )
    found = []
    for tap, value in zip(target.taps, given.double().chunk(len(target.taps), -1), strict=True):
        distances = [
            float((value - state).abs().max() / state.square().mean().sqrt()) for state in states
        ]
        nearest = min(range(len(states)), key=distances.__getitem__) - 1
        found.append(TapDistance(tap, distances[tap + 1], nearest))
    return found
