"""vLLM's DFlash draft ignores how a Gemma target scales its embeddings and caps its logits.

The draft borrows both tables of its target and was trained with the target's scaling of
the embedding and soft cap of the logits. ``qwen3_dflash`` applies neither (0.20 - 0.33;
the heads derived from it, DFlash2 and DSpark, have their own): blocks start from inputs
some 70 times too small, and acceptance falls silently. The cap does not move the
greedy choice; it matters for drafts that are sampled.
"""

from __future__ import annotations

from typing import Any

from ..pair import target_embedding_scale
from . import Shim


def stated(config: Any, name: str) -> float | None:
    """A draft's own value, from ``dflash_config`` or else the top level; None or 0: not stated."""
    nested = getattr(config, "dflash_config", None) or {}
    value = nested.get(name)
    return float((getattr(config, name, None) if value is None else value) or 0) or None


def embedding_scale(draft: Any, target: Any) -> float:
    """What embedding rows are multiplied by: the draft's own, else what its target does.

    Args:
        draft, target: Hugging Face configs, the target's of its text part.
    """
    own = stated(draft, "input_embedding_scale")
    if own is not None:
        return own
    return target_embedding_scale(str(getattr(target, "model_type", "")), target.hidden_size)


def apply(module: Any) -> str:
    """Build a subclass of the draft's model where there is a scale, and set the cap."""
    model: Any = module.DFlashQwen3Model
    head: Any = module.DFlashQwen3ForCausalLM

    # A class with a `forward` of its own: vLLM's cache of compiled models goes by its name.
    class ScaledDFlashQwen3Model(model):
        def __init__(self, *, vllm_config: Any, **kwargs: Any) -> None:
            super().__init__(vllm_config=vllm_config, **kwargs)
            target = vllm_config.model_config.hf_text_config
            self.input_embedding_scale = embedding_scale(self.config, target)
            module.logger.info(
                "dflash-plugin: the draft's input embeddings are scaled by %.4g",
                self.input_embedding_scale,
            )

        def embed_input_ids(self, input_ids: Any) -> Any:
            return super().embed_input_ids(input_ids) * self.input_embedding_scale

        def forward(self, input_ids: Any, positions: Any, input_embeds: Any = None) -> Any:
            return super().forward(input_ids, positions, input_embeds)

    def new(cls: Any, *_: Any, vllm_config: Any, **__: Any) -> Any:
        config = vllm_config.speculative_config.draft_model_config.hf_config
        target = vllm_config.model_config.hf_text_config
        scaled = cls is model and embedding_scale(config, target) != 1
        return object.__new__(ScaledDFlashQwen3Model if scaled else cls)

    original = head.__init__

    def initialise(self: Any, *, vllm_config: Any, prefix: str = "") -> None:
        original(self, vllm_config=vllm_config, prefix=prefix)
        if type(self) is head:
            self.logits_processor.soft_cap = stated(self.config, "final_logit_softcapping")

    model.__new__ = new
    head.__init__ = initialise
    return "drafts are given their target's embedding scale and their own soft cap"


SHIM = Shim(
    name="draft-scale",
    symptom="Gemma 4 drafts guess next to nothing right: acceptance near 1, silently",
    mechanism="the draft model applies neither input_embedding_scale (unless stated, the Gemma "
    "target's own, the square root of its width) nor final_logit_softcapping; both are applied",
    removal="when qwen3_dflash reads both, which test_draft_scale_is_still_needed shows by failing",
    module="vllm.model_executor.models.qwen3_dflash",
    fingerprints={
        "DFlashQwen3Model.embed_input_ids": frozenset({"d147f0b521a742ef"}),  # 0.25.0 - 0.33.0
        "DFlashQwen3Model.forward": frozenset({"710e43a6a29df2a5"}),  # 0.25.0 - 0.33.0
        "DFlashQwen3ForCausalLM.__init__": frozenset(
            {
                "f53522120952041e",  # 0.25.0 - 0.27.1
                "757121a72d7d408f",  # 0.28.0, 0.29.0
                "ff8aa26cfd473ba5",  # 0.30.0
                "2a20e19bd983eac2",  # 0.31.0 - 0.33.0
            }
        ),
    },
    apply=apply,
)
