"""What about a pair's shapes breaks drafting in a way of its own: what a tiny replica keeps."""

from __future__ import annotations

from .architectures import LINEAR, Draft, Target
from .pair_config import FULL, SLIDING

TRAITS = {
    "moe": "the target is a mixture of experts",
    "mla": "the target's keys and values are one latent vector",
    "attention-sinks": "the target's heads have sinks",
    "linear-state": "the target has recurrent layers, whose state is rewound on rejection",
    "target-windows": "the target has sliding-window layers",
    "output-gate": "the target's attention output is gated",
    "partial-rotary": "the target rotates part of a head",
    "yarn": "yarn rope in the target or the draft",
    "llama3-rope": "llama3 rope in the target",
    "tied-head": "the target's head is its embedding",
    "keys-as-values": "the target's global layers use keys as values",
    "embedding-scale": "embeddings are multiplied by the root of the width",
    "softcap": "logits are capped",
    "two-head-sizes": "the heads of target and draft have two sizes: separate KV groups",
    "three-head-sizes": "they have three: the target alone has two",
    "draft-mixed-windows": "the draft has sliding and full layers",
    "draft-all-sliding": "all layers of the draft slide",
    "taps-linear-only": "every tap is on a recurrent layer",
    "taps-full-only": "every tap is on a full layer, of a target that has others too",
    "taps-mixed": "taps on layers of two kinds",
    "mask-past-tokenizer": "the mask token is beyond the tokenizer and within the embedding",
    "mask-low": "the mask token is one of the first ids",
    "dflash2": "a draft of the second kind: convolutions and a candidate selector",
}
"""What a tiny replica of a pair has to keep, by short name."""


def tap_kinds(target: Target, draft: Draft) -> tuple[str, ...]:
    """How each tapped target layer attends, in the order of the taps."""
    return tuple(target.kind(tap) for tap in draft.target_layer_ids)


def traits(target: Target | None, draft: Draft | None) -> tuple[str, ...]:
    """The names of :data:`TRAITS` that the pair is known to have."""
    found: set[str] = set()
    if target is not None:
        found |= _target_traits(target)
    if draft is not None:
        found |= _draft_traits(draft)
    if target is not None and draft is not None:
        kinds = set(tap_kinds(target, draft))
        sizes = {target.head_dim, target.global_head_dim, draft.head_dim} - {None}
        together = {
            "two-head-sizes": len(sizes) == 2,
            "three-head-sizes": len(sizes) == 3,
            "taps-linear-only": kinds == {LINEAR},
            "taps-full-only": kinds == {FULL} and len(set(target.unit)) > 1,
            "taps-mixed": len(kinds) > 1,
        }
        found |= {name for name, has in together.items() if has}
    return tuple(name for name in TRAITS if name in found)


def _target_traits(target: Target) -> set[str]:
    has = {
        "moe": bool(target.experts),
        "mla": bool(target.mla),
        "attention-sinks": target.attention_sinks,
        "linear-state": LINEAR in target.unit,
        "target-windows": SLIDING in target.unit,
        "output-gate": target.attn_output_gate,
        "partial-rotary": "partial_rotary_factor" in target.rope or "rotary_dim" in target.rope,
        "yarn": target.rope.get("rope_type") == "yarn",
        "llama3-rope": target.rope.get("rope_type") == "llama3",
        "tied-head": target.tie_word_embeddings is True,
        "keys-as-values": target.attention_k_eq_v,
        "embedding-scale": target.model_type.startswith("gemma"),
        "softcap": target.final_logit_softcapping is not None,
    }
    return {name for name, there in has.items() if there}


def _draft_traits(draft: Draft) -> set[str]:
    full = draft.num_hidden_layers - draft.sliding_layers
    has = {
        "yarn": draft.rope.get("rope_type") == "yarn",
        "softcap": draft.final_logit_softcapping is not None,
        "draft-mixed-windows": bool(draft.sliding_layers and full),
        "draft-all-sliding": bool(draft.sliding_layers and not full),
        "mask-past-tokenizer": draft.mask_past_tokenizer,
        "mask-low": draft.mask_token_id is not None and draft.mask_token_id < 10,
        "dflash2": draft.dflash2 is not None,
    }
    return {name for name, there in has.items() if there}
