"""vLLM's draft model refuses a mixture of sliding and full layers on the V1 runner."""

from __future__ import annotations

import sys
from typing import Any

from . import Shim, applied
from .vllm_mixed_swa import SHIM as PROPOSER
from .vllm_mixed_swa import OneKind, mixed


def apply(module: Any) -> str:
    """Lift the refusal where the proposer is known to take such a draft."""
    original = module._resolve_layer_attention

    def _resolve_layer_attention(config: Any, layer_idx: int) -> Any:
        try:
            return original(config, layer_idx)
        except NotImplementedError:
            proposer = sys.modules.get(PROPOSER.module)
            if not mixed(config) or not applied(PROPOSER, proposer):
                raise
        # The release's own answer for a draft whose layers are all of this layer's kind.
        return original(OneKind(config, layer_idx), layer_idx)

    module._resolve_layer_attention = _resolve_layer_attention
    return "drafts that mix sliding and full layers are built for the V1 runner too"


SHIM = Shim(
    name="mixed-swa-model",
    symptom=PROPOSER.symptom,
    mechanism="the draft model refuses before the proposer is asked; where shim mixed-swa is in "
    "place, each layer is resolved by itself",
    removal=PROPOSER.removal,
    module="vllm.model_executor.models.qwen3_dflash",
    fingerprints={
        "_resolve_layer_attention": frozenset(
            {
                "3b3bc3292ef75fcd",  # 0.25.0, 0.25.1
                "175247514d799cd3",  # 0.26.0 - 0.33.0
            }
        ),
    },
    apply=apply,
)
