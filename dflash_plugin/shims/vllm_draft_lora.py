"""vLLM lets a draft embed through its target's LoRA-wrapped table.

With LoRA on, the target's embedding is a wrapper that looks up which adapter each row of
the target's batch has. A draft's rows are others, and more: its forward pass dies, or reads
another request's adapter. Drafts are not adapted; theirs is the table inside.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from . import Shim


def unwrapped(layer: Any) -> Any:
    """A layer without what vLLM's LoRA manager has put around it."""
    return getattr(layer, "base_layer", layer)


def apply(module: ModuleType) -> str:
    """Take the table out of its wrapper once a DFlash draft has been given it."""
    proposer: Any = module.SpecDecodeBaseProposer
    published = proposer._maybe_share_embeddings

    def _maybe_share_embeddings(self: Any, target_language_model: Any) -> None:
        published(self, target_language_model)
        if self.method == "dflash":
            inner = self.model.model
            inner.embed_tokens = unwrapped(inner.embed_tokens)

    proposer._maybe_share_embeddings = _maybe_share_embeddings
    return "drafts embed without their target's LoRA adapters"


SHIM = Shim(
    name="draft-lora",
    symptom="with LoRA enabled the engine dies of the first draft (einsum: rows of two batches)",
    mechanism="the proposer shares the target's embedding as the LoRA manager has wrapped it; "
    "the draft is given the table inside",
    removal="when the proposer shares the table without its wrapper, which "
    "test_lora_dies_without_the_repair shows by failing",
    module="vllm.v1.spec_decode.llm_base_proposer",
    fingerprints={
        "SpecDecodeBaseProposer._maybe_share_embeddings": frozenset(
            {
                "ea07a59a89380542",  # 0.20.0 to 0.24.0
                "3ffe9645a9a22c75",  # 0.25.0 to 0.26.0
                "d005011da594ba2b",  # 0.27.0 to 0.30.0
                "2496235c671d19b6",  # 0.31.0, 0.32.0
                "df713182e0ed264f",  # 0.33.0
            }
        ),
    },
    apply=apply,
)
