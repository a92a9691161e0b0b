"""SGLang writes a request's KV slots with a Triton kernel, on a CPU too.

Its way for CPUs is taken with ``SGLANG_USE_CPU_ENGINE`` alone, and needs sgl_kernel.
"""

from __future__ import annotations

from typing import Any

from . import Shim
from .replacing import replace


def apply(module: Any) -> str:
    """Have torch write them."""
    from . import sglang_torch_kernels as kernels

    replace(module, "assign_req_to_token_pool_func", kernels.assign_req_to_token_pool_func)
    return "torch writes the KV slots of requests"


SHIM = Shim(
    name="sglang-cpu-req-to-token",
    symptom="speculation crashes when KV slots are reserved: no active Triton driver",
    mechanism="the slots are written by a Triton kernel; torch writes them instead",
    removal="when the release writes them without Triton where a platform has none, which "
    "test_each_cpu_repair_is_still_needed shows by failing",
    module="sglang.srt.mem_cache.allocation",
    fingerprints={
        "assign_req_to_token_pool_func": frozenset({"598fab3dd718a36d"}),  # 0.5.18 - 0.5.23
    },
    apply=apply,
)
