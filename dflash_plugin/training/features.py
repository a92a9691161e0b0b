"""The frozen target of a training run: tapped hidden states of whole batches."""

from __future__ import annotations

import torch
from torch import Tensor

from ..reference.target import HFTarget


@torch.no_grad()
def tapped(target: HFTarget, ids: Tensor) -> Tensor:
    """Outputs of the tapped layers side by side: [texts, length, taps * hidden].

    Texts are padded on the right, if at all: a causal target computes a token from
    those before it, so what follows changes nothing.
    """
    with target.captured() as captured:
        target.model(input_ids=ids, use_cache=False)
    return torch.cat([captured[tap] for tap in target.taps], dim=-1)


def channel_scale(taps: Tensor) -> Tensor:
    """Root mean square of every channel [taps * hidden] of ``taps`` [texts, length, …].

    The first position is left out: many targets have activations there that are
    hundreds of times the others'. Never below a thousandth of the median channel.
    """
    scale = taps[:, 1:].double().square().mean((0, 1)).sqrt()
    return scale.clamp_min(float(scale.median()) * 1e-3).to(taps.dtype)
