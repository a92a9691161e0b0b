"""vLLM's configuration keeps mixed sliding/full drafts away from the V1 runner.

0.26 - 0.28 choose the V2 runner for them, also where it cannot run; 0.29 - 0.33 refuse
them on V1. What V1 can do is decided where the draft is built.
"""

from __future__ import annotations

from typing import Any

from . import Shim
from .vllm_mixed_swa import SHIM as PROPOSER


def apply(module: Any) -> str:
    """Leave the decision to the draft model unless it is V2's to make."""
    config = module.VllmConfig
    original = config._dflash_needs_multi_kv_group
    # Only the older of the two is asked in order to choose V2.
    chooses = not hasattr(config, "_get_v1_model_runner_unsupported_features")

    def _dflash_needs_multi_kv_group(self: Any) -> bool:
        from vllm.triton_utils import HAS_TRITON

        if chooses and HAS_TRITON:  # then V2 can run
            return bool(original(self))
        return False

    config._dflash_needs_multi_kv_group = _dflash_needs_multi_kv_group
    return "drafts that mix sliding and full layers are not refused on the V1 runner"


SHIM = Shim(
    name="mixed-swa-config",
    symptom=PROPOSER.symptom,
    mechanism="the configuration asks for V2 or refuses; it no longer does, and a draft that V1 "
    "cannot take is refused when it is built (shim mixed-swa-model)",
    removal=PROPOSER.removal,
    module="vllm.config.vllm",
    fingerprints={
        "VllmConfig._dflash_needs_multi_kv_group": frozenset(
            {"fa49a8f96cdd361d"}  # 0.26.0 - 0.33.0
        ),
    },
    apply=apply,
)
