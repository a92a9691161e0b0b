"""vLLM's DFlash model ignores a draft's embedding scale and logit soft cap.

Gemma multiplies embeddings by a constant outside the table that a draft shares with it,
and bounds its logits. A draft's config says so in ``dflash_config.input_embedding_scale``
and ``final_logit_softcapping``; without the scale its inputs are far too small.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from . import Shim


def stated(config: Any, name: str) -> float | None:
    """A number from ``dflash_config`` or, failing that, the config itself."""
    value = (getattr(config, "dflash_config", None) or {}).get(name)
    value = getattr(config, name, None) if value is None else value
    return None if value is None else float(value)


def apply(module: ModuleType) -> str:
    """Scale embeddings and cap logits where the draft's config says so."""
    model, head = module.DFlashQwen3Model, module.DFlashQwen3ForCausalLM
    published_embed, published_init = model.embed_input_ids, head.__init__

    def embed_input_ids(self: Any, input_ids: Any) -> Any:
        embedded = published_embed(self, input_ids)
        scale = stated(self.config, "input_embedding_scale")
        return embedded if scale in (None, 1.0) else embedded * scale

    # The engine looks at the signature to know how old a model's code is.
    def __init__(self: Any, *, vllm_config: Any, prefix: str = "") -> None:  # noqa: N807
        published_init(self, vllm_config=vllm_config, prefix=prefix)
        self.logits_processor.soft_cap = stated(self.config, "final_logit_softcapping") or None

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
