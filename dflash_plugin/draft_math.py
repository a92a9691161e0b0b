"""What a draft's config asks of any program that runs it; plain Python.

Rotary frequencies are the numbers of Transformers' ``modeling_rope_utils.py``
(``default``, ``linear``, ``yarn``, ``llama3``), in float64: a position of some
thousands times a float32 frequency is already wrong in the fourth decimal.
"""

from __future__ import annotations

import math

from .errors import PairMismatchError
from .pair import DraftConfig

ACTIVATIONS = ("silu", "gelu", "gelu_pytorch_tanh")
_KNOWN = {
    "rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings",
    "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate",
    "low_freq_factor", "high_freq_factor", "partial_rotary_factor",
}  # fmt: skip
_TYPES = ("default", "linear", "yarn", "llama3")


def check_supported(config: DraftConfig) -> None:
    """Refuse published options that nothing here implements.

    Raises:
        PairMismatchError: names the field; ignoring it would change the draft silently.
    """
    raw = config.raw
    dflash = raw.get("dflash_config") or {}

    def found(name: str, default: object) -> object:
        nested = dflash.get(name)
        value = raw.get(name) if nested is None else nested
        return default if value is None else value

    needed = {
        "attention_sink_bias": False,
        "add_swa_attention_sink_bias": False,
        "is_neox_style": True,
        "use_aux_hidden_state": True,
        "draft_vocab_size": config.vocab_size,
    }
    for name, value in needed.items():
        if found(name, value) != value:
            raise PairMismatchError(
                f"{config.source}: {name} is {found(name, value)!r}, expected {value!r}",
                hint="this draft option is not implemented; report the pair",
            )
    if config.hidden_act not in ACTIVATIONS:
        raise PairMismatchError(
            f"{config.source}: hidden_act is {config.hidden_act!r}, expected one of "
            + ", ".join(ACTIVATIONS),
            hint="this draft option is not implemented; report the pair",
        )
    frequencies(config)


def frequencies(config: DraftConfig) -> tuple[list[float], float]:
    """Inverse frequencies, head_dim / 2 of them in radians per position, and a factor.

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
    theta = _number(config, "rope_theta")
    plain = [theta ** -(i / dim) for i in range(0, dim, 2)]
    if kind == "linear":
        factor = _number(config, "factor")
        return [value / factor for value in plain], 1.0
    if kind == "llama3":
        return _llama3(config, plain), 1.0
    if kind == "yarn":
        return _yarn(config, plain)
    return plain, 1.0


def _llama3(config: DraftConfig, plain: list[float]) -> list[float]:
    """Slow wavelengths stretched, fast ones kept, a linear blend between."""
    factor = _number(config, "factor")
    low, high = _number(config, "low_freq_factor"), _number(config, "high_freq_factor")
    if low >= high:
        raise _wrong(config, "high_freq_factor", f"more than low_freq_factor {low:g}", high)
    original = _original_length(config)
    stretched = []
    for value in plain:
        turns = original * value / (2 * math.pi)
        kept = _clamp((turns - low) / (high - low))
        stretched.append(value * kept + value / factor * (1 - kept))
    return stretched


def _yarn(config: DraftConfig, plain: list[float]) -> tuple[list[float], float]:
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
    inverse = []
    for i, value in enumerate(plain):
        ramp = _clamp((i - low) / (high - low))
        inverse.append(value * (1 - ramp) + value / factor * ramp)

    def mscale(weight: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * weight * math.log(factor) + 1.0

    given = rope.get("attention_factor")
    if given is not None:
        return inverse, float(given)
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return inverse, mscale(rope["mscale"]) / mscale(rope["mscale_all_dim"])
    return inverse, mscale(1.0)


def _clamp(value: float) -> float:
    return min(max(value, 0.0), 1.0)


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
        hint="implemented are rope_type " + ", ".join(_TYPES),
    )
