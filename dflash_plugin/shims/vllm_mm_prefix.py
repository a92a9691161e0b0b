"""vLLM's V2 runner builds a draft as if it had its target's multimodal prefixes.

A target that reads images in both directions (``is_mm_prefix_lm``, Gemma 4) needs an
attention back-end for that. The draft sees text alone, and its bidirectional blocks need
another; asked for both, the selection finds none or a slow one. The V1 proposer clears
the mark, V2 does not. Not run: written against the sources of the CUDA wheels.
"""

from __future__ import annotations

import copy
from typing import Any

from . import Shim


def apply(module: Any) -> str:
    """Load drafts with a configuration that is the target's but for the mark."""
    original = module.load_dflash_model

    def load_dflash_model(target_model: Any, vllm_config: Any) -> Any:
        model_config = vllm_config.model_config
        if model_config.is_mm_prefix_lm:
            # Copies: the target's own configuration keeps the mark.
            vllm_config, model_config = copy.copy(vllm_config), copy.copy(model_config)
            model_config.model_arch_config = copy.copy(model_config.model_arch_config)
            model_config.model_arch_config.is_mm_prefix_lm = False
            vllm_config.model_config = model_config
        return original(target_model, vllm_config)

    module.load_dflash_model = load_dflash_model
    return "drafts do not inherit their target's multimodal prefixes"


SHIM = Shim(
    name="mm-prefix",
    symptom="with a Gemma 4 target the V2 runner finds no attention back-end for the draft, or "
    "a slow one",
    mechanism="the draft is built with its target's is_mm_prefix_lm; it is cleared in a copy",
    removal="when load_dflash_model clears it, which test_mm_prefix_is_still_needed shows by "
    "failing",
    module="vllm.v1.worker.gpu.spec_decode.dflash.utils",
    fingerprints={
        "load_dflash_model": frozenset(
            {
                "5add731cea7ae660",  # 0.25.0, 0.25.1
                "0e6fa9e3e3d9e8ab",  # 0.26.0 - 0.27.1
                "4bbccfb50570cf08",  # 0.28.0
                "8116497c3fd23b9c",  # 0.29.0
                "bca7d48bd0da2409",  # 0.30.0
                "7ea0a344bc0e6afe",  # 0.31.0 - 0.33.0
            }
        ),
    },
    apply=apply,
)
