"""Which release's targets hand out taps, read from its model classes: what support.py states."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from packaging.version import Version
from test_repairs_new import site_packages

from dflash_plugin import matrix, support

RELEASES = sorted(
    {
        engine.version
        for engine in matrix.load().engines.values()
        if engine.name == "vllm" and "cpu" in engine.builds
    },
    key=Version,
)
# The class that says it; Qwen3.5's published architecture inherits it from Qwen3-VL's.
CLASSES = {
    "qwen3": "qwen3.Qwen3ForCausalLM",
    "qwen3_moe": "qwen3_moe.Qwen3MoeForCausalLM",
    "llama": "llama.LlamaForCausalLM",
    "gpt_oss": "gpt_oss.GptOssForCausalLM",
    "qwen3_5": "qwen3_vl.Qwen3VLForConditionalGeneration",
    "qwen3_5_moe": "qwen3_vl.Qwen3VLForConditionalGeneration",
    "kimi_k25": "kimi_k25.KimiK25ForConditionalGeneration",
    "minimax_m2": "minimax_m2.MiniMaxM2ForCausalLM",
    "gemma4": "gemma4_mm.Gemma4ForConditionalGeneration",
    "qwen3_next": "qwen3_next.Qwen3NextForCausalLM",
}


def hands_out_taps(models: Path, name: str) -> bool:
    module, class_name = name.split(".")
    path = models / f"{module}.py"
    if not path.exists():
        return False
    classes = [n for n in ast.parse(path.read_text()).body if isinstance(n, ast.ClassDef)]
    bases = {c.name: {b.id for b in c.bases if isinstance(b, ast.Name)} for c in classes}
    return "SupportsEagle3" in bases[class_name]


def test_every_family_of_the_matrix_is_looked_at() -> None:
    shapes = [row.target_shape for row in matrix.load().pairs.values() if row.target_shape]
    assert {shape.model_type for shape in shapes} == set(CLASSES)


@pytest.mark.parametrize("version", RELEASES)
def test_targets_hand_out_taps_from_the_release_stated(version: str) -> None:
    models = site_packages(version) / "vllm" / "model_executor" / "models"
    found = {family: hands_out_taps(models, name) for family, name in CLASSES.items()}
    stated = {
        family: Version(support.first_release(family)) <= Version(version) for family in CLASSES
    }
    # Gemma 4 has taps before it has drafts.
    assert found.pop("gemma4") or not stated["gemma4"]
    del stated["gemma4"]
    assert found == stated
