"""The platform ``dflash_cpu``: SGLang on plain torch, on machines without an accelerator.

SGLang's own CPU platform needs Intel's kernels and refuses DFLASH. Loaded by SGLang,
by the name that :func:`dflash_plugin.sglang_entry.activate` gives it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import sglang.srt.platforms.interface as published
from sglang.srt.platforms.cpu import CpuDeviceMixin
from sglang.srt.platforms.device_mixin import PlatformEnum

from . import sglang_cpu_guard as guard

ATTENTION = "torch_native"
_log = logging.getLogger("sglang.dflash_plugin")


class CpuPlatform(CpuDeviceMixin, published.SRTPlatform):
    """No Triton, no graphs, no pinned memory; attention by torch."""

    _enum = PlatformEnum.OOT

    def get_default_attention_backend(self) -> str:
        return ATTENTION

    def get_default_speculative_draft_attention_backend(self, algorithm: str) -> str:
        return ATTENTION

    def supports_speculative_algorithm(self, algorithm: str) -> bool:
        """DFLASH, and that only if every repair it needs here knows what it meets."""
        wrong = guard.unknown()
        for line in wrong:
            _log.error("dflash-plugin: %s", line)
        return algorithm == "DFLASH" and not wrong

    def supports_speculative_draft_attention_backend(self, algorithm: str, backend: str) -> bool:
        return backend == ATTENTION

    def is_pin_memory_available(self, device: Any = None) -> bool:
        return False

    def get_speculative_cache_locs_fn(self) -> Callable[..., Any]:
        from . import sglang_torch_kernels as kernels

        return kernels.assign_extend_cache_locs_func

    # Asked for up to 0.5.21, where the answer None means "not implemented".
    if not hasattr(published, "PlatformCapabilities"):

        def get_mha_kv_pool_cls(self) -> type:
            from sglang.srt.mem_cache.memory_pool import MHATokenToKVPool

            return MHATokenToKVPool

        def get_paged_allocator_cls(self) -> type:
            from sglang.srt.mem_cache.allocator import PagedTokenToKVPoolAllocator

            return PagedTokenToKVPoolAllocator
