"""vLLM's CPU attention back-end cannot store keys and values apart from attending.

A draft's context keys and values come from the target's hidden states, not from a
forward pass, so they have to be put into the KV cache by themselves. GPU back-ends have
``do_kv_cache_update`` for that; the CPU's got it in 0.24.
"""

from __future__ import annotations

import inspect
from types import ModuleType
from typing import Any

from . import Shim


def halves(kv_cache: Any) -> tuple[Any, Any]:
    """Key and value cache, each [blocks, kv_heads, block_size, head_size].

    Below 0.23 they are the two entries of dimension 0; in 0.23 they lie side by side.
    """
    if kv_cache.ndim == 5:
        return kv_cache[0], kv_cache[1]
    blocks, heads, size, both = kv_cache.shape
    keys, values = kv_cache.view(blocks, heads, 2 * size, both // 2).chunk(2, dim=2)
    return keys, values


def apply(module: ModuleType) -> str:
    """Give ``CPUAttentionBackendImpl`` the method, if it has none."""
    impl = module.CPUAttentionBackendImpl
    if "do_kv_cache_update" in vars(impl):
        return "not needed, the back-end has it"
    isa_takes_cache_dtype = len(inspect.signature(module._get_attn_isa).parameters) > 3
    scaled = "k_scale" in inspect.signature(module.ops.cpu_attn_reshape_and_cache).parameters

    def do_kv_cache_update(  # type: ignore[no-untyped-def]  # noqa: PLR0917 (the other back-ends')
        self, layer, key, value, kv_cache, slot_mapping
    ):
        # key, value: [n, kv_heads, head_size]; slot_mapping: [n], negative ones are left out
        if not kv_cache.numel():  # a profiling run, before there is a cache
            return
        keys, values = halves(kv_cache)
        cache_dtype = (self.kv_cache_dtype,) if isa_takes_cache_dtype else ()
        isa = module._get_attn_isa(key.dtype, keys.shape[2], keys.shape[3], *cache_dtype)
        scales = {}
        if scaled:
            scales = {
                "k_scale": layer._k_scale_float,
                "v_scale": layer._v_scale_float,
                "kv_cache_dtype": self.kv_cache_dtype,
            }
        module.ops.cpu_attn_reshape_and_cache(key, value, keys, values, slot_mapping, isa, **scales)

    impl.do_kv_cache_update = do_kv_cache_update
    return "context keys and values can be stored"


SHIM = Shim(
    name="cpu-kv-update",
    symptom="drafting dies on the CPU: 'CPUAttentionBackendImpl' object has no attribute "
    "'do_kv_cache_update'",
    mechanism="the CPU back-end stores keys and values in forward() only; the method is added, "
    "by the same kernel",
    removal="when no supported CPU wheel lacks the method, which "
    "test_cpu_kv_update_is_still_needed shows by failing",
    module="vllm.v1.attention.backends.cpu_attn",
    fingerprints={
        "CPUAttentionBackend.get_kv_cache_shape": frozenset(
            {
                "c9c81dade35717d5",  # 0.18.0 to 0.22.1
                "2e1a74c76eab4abb",  # 0.23.0
            }
        ),
        "_get_attn_isa": frozenset(
            {
                "06edda894e1c1fb5",  # 0.18.0, 0.18.1
                "5c6139ce68ceb7ae",  # 0.19.0 to 0.20.2
                "a875c811502e20c6",  # 0.21.0
                "222c3249eddf381c",  # 0.22.0 to 0.23.0
            }
        ),
    },
    apply=apply,
)
