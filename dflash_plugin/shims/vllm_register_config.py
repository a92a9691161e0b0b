"""vLLM 0.18 and 0.19: what a ``SpeculativeConfig`` whose method is dflash says of itself."""

from __future__ import annotations

import hashlib
from types import ModuleType

from . import Shim


def apply(module: ModuleType) -> str:
    """Answer the engine's questions for dflash; all other methods answer as published."""
    config = module.SpeculativeConfig
    use_eagle, compute_hash = config.use_eagle, config.compute_hash

    def answers_as_eagle(self) -> bool:  # type: ignore[no-untyped-def]
        # A draft model of its own in the target's process, with KV cache and taps.
        return bool(self.method == "dflash" or use_eagle(self))

    def use_dflash(self) -> bool:  # type: ignore[no-untyped-def]
        return bool(self.method == "dflash")

    def hash_of_graph(self) -> str:  # type: ignore[no-untyped-def]
        if self.method != "dflash":
            return str(compute_hash(self))
        # The taps change what the target's compiled graph returns.
        layers = tuple(self.draft_model_config.hf_config.eagle_aux_hidden_state_layer_ids)
        return hashlib.sha256(repr(("dflash", layers)).encode()).hexdigest()

    config.use_eagle = answers_as_eagle
    config.use_dflash = use_dflash
    config.compute_hash = hash_of_graph
    return "a configuration may be dflash's"


SHIM = Shim(
    name="register-config",
    symptom="vLLM would take dflash for a method without a draft model",
    mechanism="the questions a SpeculativeConfig answers by comparing its method",
    removal="with register-arguments; test_registration_is_still_needed",
    module="vllm.config.speculative",
    fingerprints={
        "SpeculativeConfig.use_eagle": frozenset(
            {
                "e594e0f1a19cb6b6",  # 0.18.0 to 0.19.1
            }
        ),
        "SpeculativeConfig.compute_hash": frozenset(
            {
                "9a72f37aa0aefa8e",  # 0.18.0 to 0.19.1
            }
        ),
    },
    apply=apply,
)
