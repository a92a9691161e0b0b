"""SGLang on a CPU verifies drafts greedily whatever the temperature.

It has no kernel for rejection sampling there, warns once and goes on: the text at a
temperature above 0 is that of temperature 0 but for its first token.
"""

from __future__ import annotations

from typing import Any

from . import Shim


def apply(module: Any) -> str:
    """Verify by torch."""
    from . import sglang_torch_kernels as kernels

    module.tree_speculative_sampling_target_only = kernels.tree_speculative_sampling_target_only
    module._DFLASH_SAMPLING_VERIFY_AVAILABLE = True
    return "drafts are verified by rejection sampling"


SHIM = Shim(
    name="sglang-cpu-sampling",
    symptom="at temperature > 0 drafts are verified greedily: the text is not distributed as "
    "without speculation",
    mechanism="there is no kernel for rejection sampling on the CPU, and argmax takes its place; "
    "torch does it instead",
    removal="when the release samples on CPUs, which test_each_cpu_repair_is_still_needed shows "
    "by failing",
    module="sglang.srt.speculative.dflash_utils",
    fingerprints={
        "is_dflash_sampling_verify_available": frozenset({"dfc33a0545717023"}),  # 0.5.18 - 0.5.23
        "compute_dflash_sampling_correct_drafts_and_bonus": frozenset(
            {
                "424f113c845a8f55",  # 0.5.18
                "7ea25b10afcd0d00",  # 0.5.19
                "d46d0128b34da163",  # 0.5.20, 0.5.21
                "3fc6260db143d8d2",  # 0.5.22, 0.5.23
            }
        ),
    },
    apply=apply,
)
