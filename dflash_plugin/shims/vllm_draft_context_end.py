"""vLLM 0.20 to 0.22 drafts one step too long at the end of the context.

A DFlash step needs room for K + 1 positions behind a sequence; the runner asks for K. In
the one step between, the last mask is past the block table: its key overwrites another's
in the last block, and attention reads a block number from beyond the table's row.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from . import Shim


def apply(module: ModuleType) -> str:
    """Shorten by one the context that the runner thinks a DFlash drafter has."""
    runner: Any = module.GPUModelRunner
    published = runner.__init__

    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        published(self, *args, **kwargs)
        config = self.speculative_config
        if config is not None and config.method == "dflash":
            self.effective_drafter_max_model_len -= 1

    runner.__init__ = __init__
    return "no draft reaches past the end of the context"


SHIM = Shim(
    name="draft-context-end",
    symptom="the last draft before the end of the context reads and writes past its KV blocks: "
    "a wrong block at best",
    mechanism="the runner drafts while K more positions fit and needs K + 1, as it asks for from "
    "0.23 on; the context it compares with is shortened by one",
    removal="when 0.22 and older are no longer supported, which "
    "test_the_shim_knows_the_source shows by failing",
    module="vllm.v1.worker.gpu_model_runner",
    fingerprints={
        # Sets the length anew for drafts without one of their own; DFlash drafts have one.
        "GPUModelRunner.update_max_model_len": frozenset({"34de97ab7efa8082"}),
        "GPUModelRunner.sample_tokens": frozenset(
            {
                "abc6e5eff616a468",  # 0.20.0 to 0.20.2
                "01c4efcbb58165af",  # 0.21.0
                "760678e8fc4ec01b",  # 0.22.0, 0.22.1
            }
        ),
    },
    apply=apply,
)
