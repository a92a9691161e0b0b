"""vLLM 0.20 to 0.24 reads a draft's QKV weight, which the CPU has packed away.

The CPU worker packs the weights of linear layers after loading and leaves an empty
tensor behind. The draft's attention multiplies by that tensor instead of calling the
layer: "size mismatch, got input (80), mat (80x576), vec (0)" while warming up.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from . import Shim


def apply(module: ModuleType) -> str:
    """Give ``DFlashQwen3Attention`` a forward that calls its linear layer."""

    def forward(self: Any, positions: Any, hidden_states: Any) -> Any:
        # hidden_states: [tokens, hidden]; the context's keys are in the cache already.
        qkv, _ = self.qkv_proj(hidden_states)
        query, key, value = qkv.split([self.q_size, self.kv_size, self.kv_size], dim=-1)
        query = self.q_norm(query.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        key = self.k_norm(key.unflatten(-1, (-1, self.head_dim))).flatten(-2)
        query, key = self.rotary_emb(positions, query, key)
        output, _ = self.o_proj(self.attn(query, key, value))
        return output

    module.DFlashQwen3Attention.forward = forward
    return "the draft's attention calls its QKV layer instead of reading the layer's weight"


SHIM = Shim(
    name="cpu-packed-qkv",
    symptom="the engine dies while warming up: size mismatch, got input (80), mat (80x576), "
    "vec (0)",
    mechanism="the draft's attention multiplies by qkv_proj.weight, which the CPU has packed "
    "and emptied; it calls qkv_proj instead",
    removal="when DFlashQwen3Attention.forward calls its layer (0.25), which "
    "test_each_repair_is_still_needed shows by failing",
    module="vllm.model_executor.models.qwen3_dflash",
    fingerprints={"DFlashQwen3Attention.forward": frozenset({"4b8f1429e223e5bb"})},
    apply=apply,
)
