"""SGLang tries its Triton kernel for moving keys and values while it loads, on a CPU too.

The setting that moves them by torch (``SGLANG_NATIVE_MOVE_KV_CACHE``) does not skip the try.
"""

from __future__ import annotations

from typing import Any

from . import Shim


def apply(module: Any) -> str:
    """Skip the try, and move by torch."""

    def _init_kv_copy_and_warmup(self: Any) -> None:
        self._kv_copy_config = None
        self.use_native_move_kv_cache = True

    module.MHATokenToKVPool._init_kv_copy_and_warmup = _init_kv_copy_and_warmup
    return "torch moves keys and values"


SHIM = Shim(
    name="sglang-cpu-kv-copy",
    symptom="the server dies while it makes room for keys and values: no active Triton driver",
    mechanism="with speculation on, a Triton kernel is launched at load; torch does its work "
    "instead",
    removal="when the release does not launch it where a platform has no Triton, which "
    "test_each_cpu_repair_is_still_needed shows by failing",
    module="sglang.srt.mem_cache.memory_pool",
    fingerprints={
        "MHATokenToKVPool._init_kv_copy_and_warmup": frozenset(
            {
                "8719df3c19437539",  # 0.5.18 - 0.5.21
                "163650c185eee61c",  # 0.5.22, 0.5.23
            }
        ),
    },
    apply=apply,
)
