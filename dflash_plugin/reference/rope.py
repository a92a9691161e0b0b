"""Rotary position embedding of the draft: inverse frequencies and the rotation.

Same numbers as Transformers' ``modeling_rope_utils.py`` (``default``,
``linear``, ``yarn``, ``llama3``), in float64: a position of some thousands
times a float32 frequency is already wrong in the fourth decimal.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..errors import PairMismatchError
from ..pair import DraftConfig

_KNOWN = {
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings",
    "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
    "low_freq_factor", "high_freq_factor", "partial_rotary_factor",
}  # fmt: skip
_TYPES = ("default", "linear", "yarn", "llama3")


def frequencies(config: DraftConfig) -> tuple[Tensor, float]:
    """Inverse frequencies, float64 [head_dim / 2] in radians per position, and a factor.

    The factor multiplies cosine and sine ("attention factor"; 1 but for yarn).

    Raises:
        PairMismatchError: a scaling this module does not implement.
    """
    rope = config.rope
    unknown = sorted(set(rope) - _KNOWN)
    if unknown:
        raise _wrong(config, unknown[0], "no such field", rope[unknown[0]])
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        raise _wrong(config, "partial_rotary_factor", "1.0", rope["partial_rotary_factor"])
    kind = rope["rope_type"]
    if kind not in _TYPES:
        raise _wrong(config, "rope_type", "one of " + ", ".join(_TYPES), kind)

    dim = config.head_dim
    exponents = torch.arange(0, dim, 2, dtype=torch.float64) / dim
    plain = _number(config, "rope_theta") ** -exponents
    if kind == "linear":
        return plain / _number(config, "factor"), 1.0
    if kind == "llama3":
        return _llama3(config, plain), 1.0
    if kind == "yarn":
        return _yarn(config, plain)
    return plain, 1.0


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


def _llama3(config: DraftConfig, plain: Tensor) -> Tensor:
    """Slow wavelengths stretched, fast ones kept, a linear blend between."""
    factor = _number(config, "factor")
    low, high = _number(config, "low_freq_factor"), _number(config, "high_freq_factor")
    if low >= high:
        raise _wrong(config, "high_freq_factor", f"more than low_freq_factor {low:g}", high)
    turns = _original_length(config) * plain / (2 * math.pi)
    kept = ((turns - low) / (high - low)).clamp(0, 1)
    return plain * kept + plain / factor * (1 - kept)


def _yarn(config: DraftConfig, plain: Tensor) -> tuple[Tensor, float]:
    """YaRN (arXiv 2309.00071), with DeepSeek's ``mscale`` for the attention factor."""
    rope, dim = config.rope, config.head_dim
    original = _original_length(config)
    factor = (
        _number(config, "factor") if "factor" in rope else config.max_position_embeddings / original
    )

    def dimension(turns: float) -> float:
        """Where a frequency makes so many turns over the original length."""
        theta = _number(config, "rope_theta")
        return dim * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(theta))

    # 0 stands for "not given", as in Transformers.
    low = dimension(float(rope.get("beta_fast") or 32))
    high = dimension(float(rope.get("beta_slow") or 1))
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    if low == high:
        high += 0.001
    ramp = ((torch.arange(dim // 2, dtype=torch.float64) - low) / (high - low)).clamp(0, 1)
    inverse = plain * (1 - ramp) + plain / factor * ramp

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    given = rope.get("attention_factor")
    if given is not None:
        return inverse, float(given)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return inverse, mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"])
    return inverse, mscale(1.0)


def _original_length(config: DraftConfig) -> float:
    name = "original_max_position_embeddings"
    return _number(config, name) if name in config.rope else config.max_position_embeddings


def _number(config: DraftConfig, name: str) -> float:
    value = config.rope.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float) or value <= 0:
        raise _wrong(config, name, "a number above 0", value)
    return float(value)


def _wrong(config: DraftConfig, name: str, expected: str, found: object) -> PairMismatchError:
    return PairMismatchError(
        f"{config.source}: rope_parameters.{name} is {found!r}, expected {expected}",
        hint="the reference implements rope_type " + ", ".join(_TYPES),
    )
