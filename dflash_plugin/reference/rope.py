"""Rotary position embedding of the draft: inverse frequencies and the rotation."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import draft_math
from ..pair import DraftConfig


def frequencies(config: DraftConfig) -> tuple[Tensor, float]:
    """:func:`dflash_plugin.draft_math.frequencies` with a float64 tensor [head_dim / 2]."""
    inverse, factor = draft_math.frequencies(config)
    return torch.tensor(inverse, dtype=torch.float64), factor


def rotation(
    positions: Tensor, inverse: Tensor, factor: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Cosine and sine [n, 1, head_dim / 2] for absolute positions [n], in ``dtype``."""
    angles = positions.to(torch.float64)[:, None, None] * inverse
    return (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)


def rotate(x: Tensor, cosine: Tensor, sine: Tensor) -> Tensor:
    """Turn ``x`` [n, heads, head_dim]; dimension i pairs with i + head_dim / 2 ("neox")."""
    first, second = x.to(cosine.dtype).chunk(2, dim=-1)
    turned = torch.cat([first * cosine - second * sine, second * cosine + first * sine], dim=-1)
    return turned.to(x.dtype)
