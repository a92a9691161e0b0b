"""Which replica stands for which published pair: the one of its family that keeps its traits.

Traits of both are read by the same code (:mod:`dflash_plugin.traits`): of a published pair from
its facts, of a replica from the very configs it is built with.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from dflash_plugin import traits
from dflash_plugin.architectures import Draft, Target
from dflash_plugin.errors import UnknownCellError
from dflash_plugin.matrix import DFLASH2, REPLICA, Pair
from dflash_plugin.pair_config import FULL, DraftConfig

from . import replica_specs
from .replica_builder import tokenizer
from .replica_specs import PairSpec, Specs

_TEXT_MODELS = {"kimi_k25": "deepseek_v3", "gemma4": "gemma4_text", "qwen3_5": "qwen3_5_text",
                "qwen3_5_moe": "qwen3_5_moe_text"}  # fmt: skip
"""The text model of a published model_type, where its config has another name for it."""
_GATED = ("qwen3_next", "qwen3_5_text", "qwen3_5_moe_text")
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_MLA = ("kv_lora_rank", "q_lora_rank", "qk_rope_head_dim", "qk_nope_head_dim", "v_head_dim")


def of_replica(spec: PairSpec) -> tuple[str, ...]:
    """The traits that a replica has."""
    return traits.traits(_target(spec.target.config), _draft(spec))


def of_pair(row: Pair) -> tuple[str, ...]:
    """The traits that a published pair is known to have."""
    return traits.traits(row.target_shape, row.draft_shape)


def stand_in(row: Pair, specs: Specs | None = None) -> PairSpec | None:
    """The replica of a published pair, or of a replica's own row; None: it is to have none.

    Of its family, with every trait of the pair and as few others as may be; the first of
    several. The demo pair, DFlash 2 and targets without a draft have none.

    Raises:
        UnknownCellError: no replica keeps the traits.
    """
    specs = specs or replica_specs.load()
    if row.status == REPLICA and row.replica:
        return specs.pair(row.replica)
    if row.target_shape is None or row.status == DFLASH2 or row.embedded:
        return None
    family = _TEXT_MODELS.get(row.target_shape.model_type, row.target_shape.model_type)
    wanted = set(of_pair(row))
    found = [
        (len(kept - wanted), spec)
        for spec in specs.pairs.values()
        if spec.target.config["model_type"] == family and wanted <= (kept := set(of_replica(spec)))
    ]
    if not found:
        raise UnknownCellError(
            f"{specs.path}: no replica of {family} keeps {', '.join(sorted(wanted)) or 'nothing'}, "
            f"which {row.id} has",
            hint="add a [[pair]] there",
        )
    return min(found, key=lambda pair: pair[0])[1]


def _target(config: Mapping[str, Any]) -> Target:
    experts = {name: config[name] for name in _EXPERTS if name in config}
    if config["model_type"] == "gemma4_text" and not config["enable_moe_block"]:
        experts = {}
    layers = config.get("layer_types") or [FULL] * config["num_hidden_layers"]
    rope = config["rope_parameters"]
    return Target(
        id="replica",
        model_type=config["model_type"],
        num_hidden_layers=config["num_hidden_layers"],
        hidden_size=config["hidden_size"],
        vocab_size=config["vocab_size"],
        num_attention_heads=config["num_attention_heads"],
        intermediate_size=config["intermediate_size"],
        num_key_value_heads=config["num_key_value_heads"],
        # Of latent attention the size is no KV head's.
        head_dim=None if "kv_lora_rank" in config else config["head_dim"],
        sliding_window=config.get("sliding_window"),
        global_head_dim=config.get("global_head_dim"),
        num_global_key_value_heads=config.get("num_global_key_value_heads"),
        named_parameters=None,
        unit=tuple(layers),
        tie_word_embeddings=config["tie_word_embeddings"],
        attention_k_eq_v=config.get("attention_k_eq_v", False),
        attention_sinks=config["model_type"] == "gpt_oss",
        attn_output_gate=config["model_type"] in _GATED,
        final_logit_softcapping=config.get("final_logit_softcapping"),
        experts=experts,
        linear={k: v for k, v in config.items() if k.startswith("linear_")},
        mla={name: config[name] for name in _MLA if name in config},
        rope=rope if "rope_type" in rope else {},  # Gemma has one for each kind of layer
        weights={},
        source="its config",
    )


def _draft(spec: PairSpec) -> Draft:
    config = DraftConfig.from_dict(spec.draft, replica_specs.PATH)
    windows = [layer.window for layer in config.layers if layer.window]
    return Draft(
        id=spec.id,
        num_hidden_layers=config.num_layers,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        block_size=config.block_size,
        sliding_layers=len(windows),
        sliding_window=max(windows, default=None),
        target_layer_ids=config.target_layer_ids,
        num_taps=len(config.target_layer_ids),
        num_target_layers=config.num_target_layers,
        mask_token_id=config.mask_token_id,
        mask_past_tokenizer=config.mask_token_id >= tokenizer.SIZE,
        vocab_size=config.vocab_size,
        final_logit_softcapping=config.final_logit_softcapping,
        rope=config.rope,
        dflash2=None,
        source="its config",
    )
