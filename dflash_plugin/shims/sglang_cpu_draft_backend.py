"""SGLang gives drafts FlashInfer where it does not know their attention back-end.

``torch_native`` is not in its list, and the draft worker never asks the platform.
"""

from __future__ import annotations

from typing import Any

from . import Shim
from .replacing import replace


def apply(module: Any) -> str:
    """Name the back-end, as callers may that have looked at it themselves."""
    published = module.build_draft_tp_worker

    def build_draft_tp_worker(**options: Any) -> Any:
        if options["algo_label"] == "DFLASH" and not options.get("attention_backend_override"):
            options["attention_backend_override"] = "torch_native"
        return published(**options)

    replace(module, "build_draft_tp_worker", build_draft_tp_worker)
    return "drafts use torch_native"


SHIM = Shim(
    name="sglang-cpu-draft-backend",
    symptom="the draft is given FlashInfer, which a CPU has not",
    mechanism="the list of draft back-ends lacks torch_native, and what is not in it is replaced; "
    "it is named as already looked at",
    removal="when the draft worker asks the platform, or the list has it, which "
    "test_each_cpu_repair_is_still_needed shows by failing",
    module="sglang.srt.speculative.draft_worker_common",
    fingerprints={
        "build_draft_tp_worker": frozenset(
            {
                "f11c0b9ffa9dfd2c",  # 0.5.18
                "6389d2d58489d00e",  # 0.5.19, 0.5.20
                "74047b89823cbde1",  # 0.5.21
                "998d73f2a7fb72bd",  # 0.5.22, 0.5.23
            }
        ),
    },
    apply=apply,
)
