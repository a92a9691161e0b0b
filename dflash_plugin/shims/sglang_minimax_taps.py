"""SGLang's MiniMax-M2 hands out hidden states for EAGLE-3 and not for DFlash.

The server stops with "set_dflash_layers_to_capture": no draft of such a target runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from . import Shim


def apply(module: Any) -> str:
    """Have it hand them out by the same way, which names layers alike."""

    def set_dflash_layers_to_capture(self: Any, layer_ids: Sequence[int]) -> None:
        self.set_eagle3_layers_to_capture(list(layer_ids))

    module.MiniMaxM2ForCausalLM.set_dflash_layers_to_capture = set_dflash_layers_to_capture
    return "MiniMax-M2 targets hand out taps"


SHIM = Shim(
    name="sglang-minimax-taps",
    symptom="with a MiniMax-M2 target the server stops: no set_dflash_layers_to_capture",
    mechanism="the model lacks that method; it is that for EAGLE-3 with the layers named, which "
    "counts them alike",
    removal="when the model has the method, which test_each_repair_is_still_needed shows by "
    "failing",
    module="sglang.srt.models.minimax_m2",
    fingerprints={
        "MiniMaxM2ForCausalLM.set_eagle3_layers_to_capture": frozenset(
            {
                "4600c6545c450593",  # 0.5.18 - 0.5.20
                "baa761758905dd68",  # 0.5.21 - 0.5.23
            }
        ),
    },
    apply=apply,
)
