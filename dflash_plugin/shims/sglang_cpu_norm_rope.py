"""SGLang normalises and rotates a bfloat16 draft's queries and keys with a Triton kernel.

Drafts of other types take plain torch modules, the same that a draft's context keys go
through; on a CPU all do now.
"""

from __future__ import annotations

from typing import Any

from . import Shim


def apply(module: Any) -> str:
    """Have each layer of a draft do without the kernel."""
    published = module.DFlashAttention.__init__

    def __init__(self: Any, *args: Any, **options: Any) -> None:  # noqa: N807
        published(self, *args, **options)
        self.use_table_qk_norm_rope = False

    module.DFlashAttention.__init__ = __init__
    return "bfloat16 drafts use torch's norm and rotation"


SHIM = Shim(
    name="sglang-cpu-norm-rope",
    symptom="bfloat16 drafts crash in their first layer: no active Triton driver",
    mechanism="a fused Triton kernel is used for bfloat16 on every device but NPUs; the way of "
    "float32 drafts is used instead",
    removal="when the release asks whether the platform has Triton, which "
    "test_each_cpu_repair_is_still_needed shows by failing",
    module="sglang.srt.models.dflash",
    fingerprints={
        "DFlashAttention.__init__": frozenset(
            {
                "28256a3ceb18401f",  # 0.5.18
                "519d44e96c2c3a97",  # 0.5.19
                "24112076b9be3c4f",  # 0.5.20
                "23b76e3a31b993c6",  # 0.5.21
                "3036741fb0e89788",  # 0.5.22
                "c62be02c457dc5d4",  # 0.5.23
            }
        ),
    },
    apply=apply,
)
