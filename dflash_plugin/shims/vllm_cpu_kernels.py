"""vLLM 0.30.0 on the CPU gives speculation no kernels.

That release moved the Triton kernels of speculation behind dispatchers, and its CPU
model runner still puts the CPU's kernels under the names the callers used before.
The first proposal ends in "Cannot inspect kernel parameters for function". 0.31
registers them elsewhere.
"""

from __future__ import annotations

from typing import Any

from . import Shim

KERNELS = {
    "vllm.v1.spec_decode.utils": ("copy_and_expand_dflash_inputs",),
    "vllm.v1.sample.rejection_sampler": (
        "rejection_greedy_sample",
        "rejection_random_sample",
        "sample_recovered_tokens",
    ),
}
"""Module -> kernels on DFlash's way; ``_<name>`` there is the dispatcher."""


def apply(module: Any) -> str:
    """Have the CPU model runner give the dispatchers the CPU's kernels too."""
    import importlib

    runner = module.CPUModelRunner
    original = runner._postprocess_triton

    def _postprocess_triton(self: Any) -> None:
        original(self)
        from vllm.triton_utils import HAS_TRITON

        if HAS_TRITON:  # then the dispatchers' own kernels run
            return
        for owner, names in KERNELS.items():
            for name in names:
                dispatcher = getattr(importlib.import_module(owner), f"_{name}")
                dispatcher.kernel = getattr(module.cpu_tl, f"{name}_kernel")

    runner._postprocess_triton = _postprocess_triton
    return "the CPU's kernels reach the dispatchers of speculation"


SHIM = Shim(
    name="cpu-kernels",
    symptom="the first proposal crashes: Cannot inspect kernel parameters for function",
    mechanism="the CPU model runner replaces kernels by the names used before there were "
    "dispatchers; the dispatchers' kernels are set as well",
    removal="when 0.30.0 is no longer supported (0.31 has it right), which "
    "test_cpu_kernels_are_still_needed shows by failing",
    module="vllm.v1.worker.cpu_model_runner",
    fingerprints={
        "CPUModelRunner._postprocess_triton": frozenset({"2b9cdbfc4e25732c"}),  # 0.30.0
        "vllm.model_executor.warmup.jit_warmup_triton_helper:VllmTritonJitKernel.launch": frozenset(
            {"9d26fe9dae774885"}  # 0.30.0
        ),
    },
    apply=apply,
)
