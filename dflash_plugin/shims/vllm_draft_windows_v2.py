"""The V2 model runner of vLLM 0.24 ignores a draft's sliding windows as the V1 runner does.

It is chosen by VLLM_USE_V2_MODEL_RUNNER and needs a GPU. The repair is that of
``vllm_draft_windows``, at the places where its speculator loads the draft and sets up
attention. Written from the release's source; not run.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from . import Shim
from .vllm_draft_windows import LAYERS, PLAIN, layers_of, split, windows


def apply(module: ModuleType) -> str:
    """Teach ``DFlashSpeculator`` about windows."""
    from vllm.model_executor.models import qwen3_dflash as models

    speculator: Any = module.DFlashSpeculator
    published_load, published_set = speculator.load_draft_model, speculator.set_attn

    def plain(self: Any) -> bool:
        return set(layers_of(self.vllm_config)) == {PLAIN}

    def load_draft_model(self: Any, *args: Any, **kwargs: Any) -> Any:
        if plain(self):
            return published_load(self, *args, **kwargs)
        with windows(models, self.vllm_config):
            return published_load(self, *args, **kwargs)

    def set_attn(self: Any, *args: Any, **kwargs: Any) -> None:
        published_set(self, *args, **kwargs)
        if not plain(self):
            self.attn_groups = [
                split(groups, self.vllm_config, self.device) for groups in self.attn_groups
            ]

    speculator.load_draft_model, speculator.set_attn = load_draft_model, set_attn
    return "sliding-window layers of drafts have their window and causality"


SHIM = Shim(
    name="draft-windows-v2",
    symptom="with the V2 model runner, drafts with sliding-window layers run as if all were full "
    "attention; acceptance falls with the length of the sequence, silently",
    mechanism="as draft-windows, in DFlashSpeculator",
    removal="when 0.24 is no longer supported (0.25 refuses such drafts, 0.26 runs them), which "
    "test_the_shim_knows_the_source shows by failing",
    module="vllm.v1.worker.gpu.spec_decode.dflash.speculator",
    fingerprints={
        **LAYERS,
        "DFlashSpeculator.load_draft_model": frozenset({"5fc7c1480553a599"}),
        "DFlashSpeculator.set_attn": frozenset({"6bd0fbb24efb1966"}),
        "DFlashSpeculator.propose": frozenset({"719f25b5ee70f1a6"}),
        "vllm.v1.worker.gpu.spec_decode.speculator:DraftModelSpeculator.set_attn": frozenset(
            {"0e5dc15270c67560"}
        ),
        "vllm.v1.worker.gpu.attn_utils:build_attn_metadata": frozenset({"4bf89b79459fddc7"}),
    },
    apply=apply,
)
