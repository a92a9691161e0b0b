"""SGLang reads a draft's windows and causality from some of the fields that state them.

It knows ``layer_types``, ``sliding_window`` and ``is_causal``, not ``use_swa``,
``swa_window_size`` and ``causal`` of ``dflash_config``, nor lists with a different number
of layers than it uses.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..pair_config import layer_attention
from . import Shim

_OWN = ("use_swa", "swa_window_size", "causal")


def apply(module: Any) -> str:
    """Go by the draft's config where it uses those fields."""
    published = module._get_dflash_layer_attention_params
    types = module.AttentionType

    def _get_dflash_layer_attention_params(config: Any, layer_id: int) -> tuple[int, Any]:
        stated = getattr(config, "dflash_config", None) or {}
        if not any(field in stated for field in _OWN):
            return published(config, layer_id)
        layer = layer_attention(config.to_dict(), Path("the draft's config.json"))[layer_id]
        # SGLang counts the tokens before a query, the config the query's own too.
        window = -1 if layer.window is None else layer.window - 1
        return window, types.DECODER if layer.causal else types.ENCODER_ONLY

    module._get_dflash_layer_attention_params = _get_dflash_layer_attention_params
    return "windows and causality are those of the draft's config"


SHIM = Shim(
    name="sglang-draft-attention",
    symptom="drafts that state windows or causality in dflash_config are run without: acceptance "
    "falls, silently",
    mechanism="the fields use_swa, swa_window_size and causal are not read; they are, with the "
    "precedence of the reference",
    removal="when the release reads them, which test_each_repair_is_still_needed shows by failing",
    module="sglang.srt.models.dflash",
    fingerprints={
        "_get_dflash_layer_attention_params": frozenset(
            {
                "1b851a01a683c2b1",  # 0.5.18, 0.5.19
                "00a76c125663bdef",  # 0.5.20 - 0.5.23
            }
        ),
    },
    apply=apply,
)
