"""vLLM's Triton attention sizes a draft's buffers by its target's heads.

``TritonAttentionMetadataBuilder`` asks the target's configuration for KV heads and head
size, also for a draft's layers: Gemma 4 (256 and 512 wide) with its drafts (128 wide) get
each other's. Not run: written against the sources of the CUDA wheels.
"""

from __future__ import annotations

import copy
from typing import Any

from . import Shim


class Geometry:
    """A model's configuration with the heads of one KV cache group."""

    def __init__(self, config: Any, spec: Any) -> None:
        self._config, self._spec = config, spec

    def get_num_kv_heads(self, _: Any) -> int:
        return int(self._spec.num_kv_heads)

    def get_head_size(self) -> int:
        return int(self._spec.head_size)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def apply(module: Any) -> str:
    """With DFlash, have a builder ask its own KV cache group."""
    builder = module.TritonAttentionMetadataBuilder
    original = builder.__init__

    def initialise(
        self: Any, kv_cache_spec: Any, layer_names: Any, vllm_config: Any, device: Any
    ) -> None:
        speculation = vllm_config.speculative_config
        if speculation is None or speculation.method != "dflash":
            original(self, kv_cache_spec, layer_names, vllm_config, device)
            return
        shown = copy.copy(vllm_config)
        shown.__dict__["model_config"] = Geometry(vllm_config.model_config, kv_cache_spec)
        original(self, kv_cache_spec, layer_names, shown, device)
        self.vllm_config = vllm_config

    builder.__init__ = initialise
    return "buffers of Triton attention have the size of their KV cache group"


SHIM = Shim(
    name="triton-geometry",
    symptom="with Triton attention and a draft whose heads are not its target's (Gemma 4), "
    "decoding uses buffers of the wrong size",
    mechanism="the builder takes KV heads and head size from the target's configuration; with "
    "DFlash it is shown those of its own KV cache group",
    removal="when the builder reads its kv_cache_spec, which "
    "test_triton_geometry_is_still_needed shows by failing",
    module="vllm.v1.attention.backends.triton_attn",
    fingerprints={
        "TritonAttentionMetadataBuilder.__init__": frozenset(
            {
                "e82d241b329c5bfa",  # 0.25.0 - 0.31.0
                "2cc4f91c08804ef9",  # 0.32.0
                "e36533b75fced1cd",  # 0.33.0
            }
        ),
    },
    apply=apply,
)
