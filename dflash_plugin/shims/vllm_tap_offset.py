"""vLLM 0.20 and 0.21 take a DFlash draft's features from the layer below each tap.

``dflash_config.target_layer_ids`` names layers whose output is meant; the engine collects
the input of the layers it is told, so it has to be told the next one each time.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from . import Shim


def apply(module: ModuleType) -> str:
    """Add one to every tap that comes from ``dflash_config``."""
    runner: Any = module.GPUModelRunner
    published = runner._get_eagle3_aux_layers_from_config

    def _get_eagle3_aux_layers_from_config(self: Any) -> tuple[int, ...] | None:
        layers: tuple[int, ...] | None = published(self)
        config = self.speculative_config
        if layers is None or config.method != "dflash":
            return layers
        if getattr(config.draft_model_config.hf_config, "eagle_aux_hidden_state_layer_ids", None):
            return layers  # that field counts as the engine does
        return tuple(layer + 1 for layer in layers)

    runner._get_eagle3_aux_layers_from_config = _get_eagle3_aux_layers_from_config
    return "a draft's features are the outputs of the layers it names"


SHIM = Shim(
    name="tap-offset",
    symptom="every draft is conditioned on the wrong layers of the target; acceptance is far "
    "below the draft's own, silently",
    mechanism="target_layer_ids are passed on as they are, where the engine counts layer inputs; "
    "one is added, as from 0.22 on",
    removal="when 0.21 and older are no longer supported, which "
    "test_each_repair_is_still_needed shows by failing",
    module="vllm.v1.worker.gpu_model_runner",
    fingerprints={
        "GPUModelRunner._get_eagle3_aux_layers_from_config": frozenset({"5ad7e8009ce59b07"}),
    },
    apply=apply,
)
