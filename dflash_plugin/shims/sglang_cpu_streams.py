"""SGLang's DFlash worker marks a tensor as used by a device's stream, on a CPU too.

``Tensor.record_stream`` has no CPU kernel, so the first decode step ends in
"Could not run 'aten::record_stream'".
"""

from __future__ import annotations

from typing import Any

from . import Shim


def apply(module: Any) -> str:
    """Have the call do nothing for tensors on the CPU, which has no streams."""
    import torch

    published = torch.Tensor.record_stream

    def record_stream(self: Any, stream: Any) -> None:
        if self.device.type != "cpu":
            published(self, stream)

    torch.Tensor.record_stream = record_stream
    return "tensors on the CPU need no stream"


SHIM = Shim(
    name="sglang-cpu-streams",
    symptom="the first decode step crashes: Could not run 'aten::record_stream'",
    mechanism="the worker records streams of tensors on any device; on CPU tensors that does "
    "nothing now",
    removal="when the worker asks for a device with streams first, which "
    "test_each_cpu_repair_is_still_needed shows by failing",
    module="sglang.srt.speculative.dflash_worker_v2",
    fingerprints={
        "DFlashWorkerV2.forward_batch_generation": frozenset(
            {
                "c8aac0f5ee1c9d8e",  # 0.5.18
                "6374918c6d542068",  # 0.5.19
                "5febc14ddf74643b",  # 0.5.20
                "4686ea38eddac766",  # 0.5.21
                "ba050e969bec9e61",  # 0.5.22
                "f807dc5a4dcb3f41",  # 0.5.23
            }
        ),
    },
    apply=apply,
)
