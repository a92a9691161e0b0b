"""SGLang before 0.5.21 reads a request's KV slots with a Triton kernel, on a CPU too.

From 0.5.21 it asks the platform for a function.
"""

from __future__ import annotations

from typing import Any

from . import Shim
from .replacing import replace


def apply(module: Any) -> str:
    """Have torch read them."""
    from . import sglang_torch_kernels as kernels

    replace(module, "assign_extend_cache_locs_func", kernels.assign_extend_cache_locs_func)
    return "torch reads the KV slots of requests"


SHIM = Shim(
    name="sglang-cpu-cache-locs",
    symptom="the first draft crashes: no way to read KV slots on this device",
    mechanism="the slots of a block are read by a Triton kernel; torch reads them instead",
    removal="when releases before 0.5.21, which asks the platform, are no longer supported",
    module="sglang.kernels.ops.speculative.cache_locs",
    fingerprints={
        "assign_extend_cache_locs_func": frozenset({"5469146c910f8441"}),  # 0.5.18 - 0.5.20
    },
    apply=apply,
)
