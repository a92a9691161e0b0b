"""vLLM 0.25 on the V2 runner lets the block of a sliding-window draft look ahead, too."""

from __future__ import annotations

from typing import Any

from . import Shim
from .vllm_swa_causal import SHIM as V1
from .vllm_swa_causal import causal


def apply(module: Any) -> str:
    """Have the speculator go by the draft's layers."""

    def get_dflash_causal(draft_model_config: Any) -> bool:
        return causal(draft_model_config.hf_config)

    module.get_dflash_causal = get_dflash_causal
    return "blocks of sliding-window drafts are causal"


SHIM = Shim(
    name="swa-causal-v2",
    symptom=V1.symptom,
    mechanism=V1.mechanism,
    removal=V1.removal,
    module="vllm.v1.worker.gpu.spec_decode.dflash.utils",
    fingerprints={"get_dflash_causal": frozenset({"3d09400596a84de3"})},  # 0.25.0, 0.25.1
    apply=apply,
)
