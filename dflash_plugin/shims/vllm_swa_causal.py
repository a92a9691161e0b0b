"""vLLM 0.25 on the V1 runner lets the block of a sliding-window draft look ahead.

Sliding layers were trained causal. The release's draft model resolves that per layer, and
its V1 proposer goes by ``dflash_config.causal`` alone, which published drafts do not state.
0.26 asks the model.
"""

from __future__ import annotations

from typing import Any

from . import Shim


def causal(config: Any) -> bool:
    """Whether all layers of a draft are: as stated, else if all are sliding."""
    stated = (getattr(config, "dflash_config", None) or {}).get("causal")
    if stated is not None:
        return bool(stated)
    kinds = getattr(config, "layer_types", None) or ()
    return bool(kinds) and all(kind == "sliding_attention" for kind in kinds)


def apply(module: Any) -> str:
    """Have the proposer go by the draft's layers."""
    proposer = module.DFlashProposer
    original = proposer.__init__

    def initialise(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        self.dflash_causal = causal(self.draft_model_config.hf_config)

    proposer.__init__ = initialise
    return "blocks of sliding-window drafts are causal"


SHIM = Shim(
    name="swa-causal",
    symptom="drafts whose layers are all sliding are run bidirectionally: acceptance falls, "
    "silently",
    mechanism="the proposer takes the causality of attention from dflash_config.causal alone; it "
    "is taken from the kind of the layers where that is not stated",
    removal="when 0.25 is no longer supported (0.26 has it right), which "
    "test_swa_causal_is_still_needed shows by failing",
    module="vllm.v1.spec_decode.dflash",
    fingerprints={
        "DFlashProposer.__init__": frozenset({"ac1b26193455dd6e"}),  # 0.25.0, 0.25.1
    },
    apply=apply,
)
