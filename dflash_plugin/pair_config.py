"""What a draft's and a target's ``config.json`` say.

Facts about the published format: drafts are Qwen3-shaped, share embedding and
head with the target, and are conditioned on the target's hidden states at
``target_layer_ids`` ("taps"). Tap ``i`` is the OUTPUT of target layer ``i``,
i.e. Transformers' ``hidden_states[i + 1]``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from .config_file import Fields, read_config
from .errors import PairMismatchError

SLIDING = "sliding_attention"
FULL = "full_attention"
_MOST_LAYERS = 1000  # beyond it a typing error, and every layer is listed by name


@dataclass(frozen=True)
class LayerAttention:
    """How one draft layer attends.

    ``window`` counts positions including the query's own (None: full).
    ``causal`` False lets the tokens of a block see each other in both directions.
    """

    window: int | None
    causal: bool


@dataclass(frozen=True)
class DraftConfig:
    """A DFlash draft's ``config.json``, normalised across the published spellings."""

    source: Path
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    vocab_size: int
    rms_norm_eps: float
    max_position_embeddings: int
    rope: Mapping[str, Any]
    block_size: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    target_hidden_size: int
    num_target_layers: int | None
    layers: tuple[LayerAttention, ...]
    attention_bias: bool
    hidden_act: str
    input_embedding_scale: float
    final_logit_softcapping: float | None
    raw: Mapping[str, Any] = field(repr=False)

    @classmethod
    def from_dir(cls, folder: Path) -> DraftConfig:
        """Read ``folder/config.json``.

        Raises:
            ModelNotFoundError: no such folder or file.
            PairMismatchError: not a DFlash v1 draft, or a field is missing or impossible.
        """
        path = folder / "config.json"
        return cls.from_dict(read_config(folder), path)

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any], source: Path) -> DraftConfig:
        """Normalise an already parsed ``config.json``; ``source`` is for messages."""
        dflash = raw.get("dflash_config")
        get = Fields(source, raw, dflash if isinstance(dflash, Mapping) else {})
        for name in get.strings("architectures"):
            if "DFlash2" in name:
                raise PairMismatchError(
                    f"{source}: {name} is a DFlash 2 draft; only DFlash (v1) is supported",
                    hint="use the target's DFlashDraftModel checkpoint",
                )
        if not isinstance(dflash, Mapping):
            raise PairMismatchError(
                f"{source}: no dflash_config table, so this is not a DFlash draft",
                hint="check that --draft names the draft, not the target",
            )
        hidden, heads = get.integer("hidden_size"), get.integer("num_attention_heads")
        kv_heads = get.integer("num_key_value_heads", default=heads)
        if heads % kv_heads:
            raise get.wrong("num_key_value_heads", f"a divisor of {heads}", kv_heads)
        taps = dflash.get("target_layer_ids")
        if (
            not isinstance(taps, list)
            or not taps
            or not all(type(tap) is int and tap >= 0 for tap in taps)
        ):
            raise get.wrong("dflash_config.target_layer_ids", "a list of layer indices", taps)
        num_layers = get.integer("num_hidden_layers", at_most=_MOST_LAYERS)
        depth_is_stated = raw.get("num_target_layers") is not None
        num_target_layers = get.integer("num_target_layers") if depth_is_stated else None
        softcap = get.number("final_logit_softcapping", nested=True, default=0.0, at_least=0.0)
        return cls(
            source=source,
            hidden_size=hidden,
            intermediate_size=get.integer("intermediate_size"),
            num_layers=num_layers,
            num_heads=heads,
            num_kv_heads=kv_heads,
            head_dim=get.integer("head_dim", default=hidden // heads),
            vocab_size=get.integer("vocab_size"),
            rms_norm_eps=get.number("rms_norm_eps", default=1e-6),
            max_position_embeddings=get.integer("max_position_embeddings", default=1 << 31),
            rope=get.rope(),
            block_size=get.integer("block_size", nested=True, at_least=2),
            mask_token_id=get.integer("mask_token_id", nested=True, at_least=0),
            target_layer_ids=tuple(taps),
            target_hidden_size=get.integer("target_hidden_size", default=hidden),
            num_target_layers=num_target_layers,
            layers=_layer_attention(get, num_layers),
            attention_bias=get.boolean("attention_bias", raw) or False,
            hidden_act=get.text("hidden_act", default="silu"),
            input_embedding_scale=get.number("input_embedding_scale", nested=True, default=1.0),
            final_logit_softcapping=softcap or None,
            raw=raw,
        )

    def embedding_scale(self, model_type: str) -> float:
        """What rows of the target's embedding are multiplied by before they enter the draft.

        The draft's own ``input_embedding_scale``; where it states none, what a target of
        ``model_type`` does itself, as its drafts were trained with that.
        """
        nested = self.raw.get("dflash_config") or {}
        stated = (self.raw.get("input_embedding_scale"), nested.get("input_embedding_scale"))
        if stated != (None, None):
            return self.input_embedding_scale
        return target_embedding_scale(model_type, self.target_hidden_size)

    def for_target(self, model_type: str) -> DraftConfig:
        """With :meth:`embedding_scale` for that target."""
        return replace(self, input_embedding_scale=self.embedding_scale(model_type))

    @property
    def max_speculative_tokens(self) -> int:
        """``num_speculative_tokens`` that uses the whole block: block size - 1."""
        return self.block_size - 1

    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor the published format has for this config, with its shape."""
        d, f, hd = self.hidden_size, self.intermediate_size, self.head_dim
        q, kv = self.num_heads * hd, self.num_kv_heads * hd
        shapes: dict[str, tuple[int, ...]] = {
            "fc.weight": (d, len(self.target_layer_ids) * self.target_hidden_size),
            "hidden_norm.weight": (d,),
            "norm.weight": (d,),
        }
        for i in range(self.num_layers):
            layer = f"layers.{i}."
            attn = layer + "self_attn."
            shapes |= {
                layer + "input_layernorm.weight": (d,),
                layer + "post_attention_layernorm.weight": (d,),
                layer + "mlp.gate_proj.weight": (f, d),
                layer + "mlp.up_proj.weight": (f, d),
                layer + "mlp.down_proj.weight": (d, f),
                attn + "q_proj.weight": (q, d),
                attn + "k_proj.weight": (kv, d),
                attn + "v_proj.weight": (kv, d),
                attn + "o_proj.weight": (d, q),
                attn + "q_norm.weight": (hd,),
                attn + "k_norm.weight": (hd,),
            }
            if self.attention_bias:
                shapes |= {
                    attn + "q_proj.bias": (q,),
                    attn + "k_proj.bias": (kv,),
                    attn + "v_proj.bias": (kv,),
                    attn + "o_proj.bias": (d,),
                }
        return shapes


def target_embedding_scale(model_type: str, hidden_size: int) -> float:
    """Gemma multiplies its embeddings by the square root of its width; others do not.

    Source: Transformers' ``Gemma*TextScaledWordEmbedding``; vllm-project/vllm#41703.
    """
    return float(hidden_size) ** 0.5 if model_type.startswith("gemma") else 1.0


@dataclass(frozen=True)
class TargetConfig:
    """The few facts of a target that a draft depends on."""

    source: Path
    model_type: str
    hidden_size: int
    num_layers: int
    vocab_size: int

    @classmethod
    def from_dir(cls, folder: Path) -> TargetConfig:
        """Read ``folder/config.json``; multimodal targets by their ``text_config``."""
        raw, path = read_config(folder), folder / "config.json"
        text = raw.get("text_config")
        merged = {**raw, **text} if isinstance(text, Mapping) else raw
        get = Fields(path, merged, {})
        return cls(
            source=path,
            model_type=str(merged.get("model_type", "unknown")),
            hidden_size=get.integer("hidden_size"),
            num_layers=get.integer("num_hidden_layers"),
            vocab_size=get.integer("vocab_size"),
        )


def layer_attention(raw: Mapping[str, Any], source: Path) -> tuple[LayerAttention, ...]:
    """How each layer of the draft with this ``config.json`` attends.

    Raises:
        PairMismatchError: the fields that say so are missing or impossible.
    """
    dflash = raw.get("dflash_config")
    get = Fields(source, raw, dflash if isinstance(dflash, Mapping) else {})
    return _layer_attention(get, get.integer("num_hidden_layers", at_most=_MOST_LAYERS))


def _layer_attention(get: Fields, num_layers: int) -> tuple[LayerAttention, ...]:
    """Window and causality per layer, by the precedence vLLM's ``qwen3_dflash`` uses.

    Window: ``layer_types``, or every layer where ``dflash_config.use_swa``.
    Causality: ``is_causal``, else ``dflash_config.causal``, else sliding layers are causal.
    """
    types = get.raw.get("layer_types")
    if types is not None and (
        not isinstance(types, list)
        or len(types) != num_layers
        or not all(kind in (SLIDING, FULL) for kind in types)
    ):
        raise get.wrong("layer_types", f"{num_layers} of {FULL} / {SLIDING}", types)
    use_swa = get.boolean("use_swa", get.dflash) or False
    if types is None or (use_swa and SLIDING not in types):
        sliding = [use_swa] * num_layers
    else:
        sliding = [kind == SLIDING for kind in types]
    window = get.dflash.get("swa_window_size", get.raw.get("sliding_window"))
    if any(sliding) and (type(window) is not int or window < 1):
        raise get.wrong(
            "sliding_window", "an integer >= 1 (layer_types has sliding layers)", window
        )

    stated = get.boolean("is_causal", get.raw)
    if stated is None:
        stated = get.boolean("causal", get.dflash)
    named_sliding = [kind == SLIDING for kind in types] if types else [False] * num_layers
    return tuple(
        LayerAttention(
            window=window if is_sliding else None,
            causal=named if stated is None else stated,
        )
        for is_sliding, named in zip(sliding, named_sliding, strict=True)
    )
