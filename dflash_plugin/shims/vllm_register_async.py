"""vLLM 0.18 and 0.19 switch asynchronous scheduling off for methods they do not list.

Drafts stay on the device between two steps, so nothing stands against it. On the CPU
there is no device to overlap with, and it stays off.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

from . import Shim


def apply(module: Any) -> str:
    """Add dflash to the methods that asynchronous scheduling is allowed with."""
    from vllm.platforms import current_platform

    if current_platform.is_cpu():
        return "not needed, the CPU schedules synchronously"
    if "dflash" in get_args(module.EagleModelTypes):
        return "not needed, dflash is in the list"
    module.EagleModelTypes = Literal[module.EagleModelTypes, "dflash"]
    return "asynchronous scheduling is allowed with dflash"


SHIM = Shim(
    name="register-async",
    symptom="dflash would run with synchronous scheduling only",
    mechanism="VllmConfig allows asynchronous scheduling with a fixed list of methods",
    removal="with register-arguments; test_registration_is_still_needed",
    module="vllm.config.vllm",
    fingerprints={
        "VllmConfig.__post_init__": frozenset(
            {
                "871e1d0763752334",  # 0.18.0
                "676ae66952f0d37c",  # 0.18.1
                "8a172cfc673a76bc",  # 0.19.0 to 0.19.1
            }
        )
    },
    apply=apply,
)
