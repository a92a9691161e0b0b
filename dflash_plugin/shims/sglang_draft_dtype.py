"""SGLang casts a draft's input to bfloat16, whatever the draft's own type is.

A float32 or float16 draft then dies in its first product.
"""

from __future__ import annotations

from typing import Any

from . import Shim


def apply(module: Any) -> str:
    """Give DFlash drafts their input in their own type; others get what they got."""
    published = module.ModelRunner._extend_forward_kwargs

    def _extend_forward_kwargs(self: Any, forward_batch: Any, pp_proxy_tensors: Any) -> Any:
        kwargs = published(self, forward_batch, pp_proxy_tensors)
        embeds, algorithm = forward_batch.input_embeds, forward_batch.spec_algorithm
        if self.is_draft_worker and embeds is not None and algorithm.is_dflash():
            kwargs["input_embeds"] = embeds.to(self.dtype)
        return kwargs

    module.ModelRunner._extend_forward_kwargs = _extend_forward_kwargs
    return "drafts get their input in their own type"


SHIM = Shim(
    name="sglang-draft-dtype",
    symptom="float32 and float16 drafts crash: mat1 and mat2 must have the same dtype",
    mechanism="the model runner casts input embeddings to bfloat16; those of DFlash drafts are "
    "cast to the draft's type instead",
    removal="when the release casts to the model's type, which "
    "test_each_repair_is_still_needed shows by failing",
    module="sglang.srt.model_executor.model_runner",
    fingerprints={
        "ModelRunner._extend_forward_kwargs": frozenset({"b989138b43d25047"}),  # 0.5.18 - 0.5.23
    },
    apply=apply,
)
