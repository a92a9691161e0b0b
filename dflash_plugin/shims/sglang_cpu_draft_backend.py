"""SGLang gives drafts FlashInfer where it does not know their attention back-end.

``torch_native`` is not in its list, and the draft worker never asks the platform.
"""

from __future__ import annotations

from typing import Any

from . import Shim


def apply(module: Any) -> str:
    """Add it to the list, which other modules share."""
    if "torch_native" not in module.DRAFT_ATTENTION_BACKEND_CHOICES:
        module.add_draft_attention_backend_choices(["torch_native"])
    return "drafts may use torch_native"


SHIM = Shim(
    name="sglang-cpu-draft-backend",
    symptom="the draft is given FlashInfer, which a CPU has not",
    mechanism="the list of draft back-ends lacks torch_native; SGLang's own function adds it",
    removal="when the draft worker asks the platform, or the list has it, which "
    "test_each_cpu_repair_is_still_needed shows by failing",
    module="sglang.srt.arg_groups.choices",
    fingerprints={},
    apply=apply,
)
