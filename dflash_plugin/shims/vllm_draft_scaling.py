"""vLLM's DFlash model ignores a draft's embedding scale and logit soft cap.

As ``draft-scale``, for the model of these releases: it has another ``embed_input_ids``.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from . import Shim
from .vllm_draft_scale import embedding_scale, stated


def apply(module: ModuleType) -> str:
    """Scale embeddings and cap logits as the draft's config says, or its target does."""
    model, head = module.DFlashQwen3Model, module.DFlashQwen3ForCausalLM
    published_embed, published_init = model.embed_input_ids, head.__init__

    def embed_input_ids(self: Any, input_ids: Any) -> Any:
        embedded = published_embed(self, input_ids)
        scale = self.input_embedding_scale
        return embedded if scale == 1 else embedded * scale

    # The engine looks at the signature to know how old a model's code is.
    def __init__(self: Any, *, vllm_config: Any, prefix: str = "") -> None:  # noqa: N807
        published_init(self, vllm_config=vllm_config, prefix=prefix)
        target = vllm_config.model_config.hf_text_config
        self.model.input_embedding_scale = embedding_scale(self.config, target)
        self.logits_processor.soft_cap = stated(self.config, "final_logit_softcapping")

    model.embed_input_ids = embed_input_ids
    head.__init__ = __init__
    return "drafts' embedding scale and logit soft cap are applied"


SHIM = Shim(
    name="draft-scaling",
    symptom="drafts of Gemma targets propose almost nothing that is accepted, silently",
    mechanism="the draft model reads neither input_embedding_scale nor final_logit_softcapping; "
    "its embedding and its logits processor are given them",
    removal="when the release's qwen3_dflash reads both, which "
    "test_each_repair_is_still_needed shows by failing",
    module="vllm.model_executor.models.qwen3_dflash",
    fingerprints={
        "DFlashQwen3Model.embed_input_ids": frozenset({"be629745b4d93dc2"}),
        "DFlashQwen3ForCausalLM.__init__": frozenset(
            {
                "4c794d454bf27194",  # 0.20.0 to 0.21.0
                "d46b7113f5557574",  # 0.22.0, 0.22.1
                "1b0e5936d830ef16",  # 0.23.0, 0.24.0
            }
        ),
        "DFlashQwen3ForCausalLM.compute_logits": frozenset({"fe880cd0d1aee92d"}),
    },
    apply=apply,
)
