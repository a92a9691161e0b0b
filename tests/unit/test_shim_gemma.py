"""Gemma targets: embedding scale and soft cap, multimodal prefixes, Triton's geometry."""

from __future__ import annotations

import logging
from types import SimpleNamespace

import pytest

from dflash_plugin.shims import vllm_draft_scale as scale
from dflash_plugin.shims import vllm_mm_prefix as mm_prefix
from dflash_plugin.shims import vllm_triton_geometry as geometry

GEMMA = SimpleNamespace(model_type="gemma4_text", hidden_size=2816)
QWEN = SimpleNamespace(model_type="qwen3", hidden_size=4096)


def draft(**fields):
    return SimpleNamespace(**fields)


@pytest.mark.parametrize(
    ("config", "target", "expected"),
    [
        (draft(), QWEN, 1.0),
        (draft(dflash_config=None), QWEN, 1.0),
        (draft(), GEMMA, 2816**0.5),
        (draft(input_embedding_scale=2.5), GEMMA, 2.5),
        (draft(input_embedding_scale=2.5), QWEN, 2.5),
        (draft(dflash_config={"input_embedding_scale": 3}), GEMMA, 3.0),
        (draft(input_embedding_scale=2, dflash_config={"input_embedding_scale": 3}), QWEN, 3.0),
    ],
)
def test_the_scale_is_the_drafts_own_else_its_gemma_targets(config, target, expected):
    assert scale.embedding_scale(config, target) == expected


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (draft(), None),
        (draft(final_logit_softcapping=None), None),
        (draft(final_logit_softcapping=0), None),
        (draft(final_logit_softcapping=30.0), 30.0),
        (draft(dflash_config={"final_logit_softcapping": 15}), 15.0),
    ],
)
def test_the_cap_is_the_drafts_own(config, expected):
    assert scale.stated(config, "final_logit_softcapping") == expected


@pytest.fixture
def model():
    """The engine's module: a model, a head with it, and a derived model with its own scale."""

    class DFlashQwen3Model:
        def __init__(self, *, vllm_config, start_layer_id=0, prefix=""):
            self.config = vllm_config.speculative_config.draft_model_config.hf_config
            self.start = start_layer_id

        def embed_input_ids(self, input_ids):
            return input_ids * 10

        def forward(self, input_ids, positions, input_embeds=None):
            return self.embed_input_ids(input_ids) if input_embeds is None else input_embeds

    class Derived(DFlashQwen3Model):
        pass

    class DFlashQwen3ForCausalLM:
        def __init__(self, *, vllm_config, prefix=""):
            self.config = vllm_config.speculative_config.draft_model_config.hf_config
            self.logits_processor = SimpleNamespace(soft_cap=None)

    class DerivedForCausalLM(DFlashQwen3ForCausalLM):
        pass

    module = SimpleNamespace(
        DFlashQwen3Model=DFlashQwen3Model,
        DFlashQwen3ForCausalLM=DFlashQwen3ForCausalLM,
        Derived=Derived,
        DerivedForCausalLM=DerivedForCausalLM,
        logger=logging.getLogger("test-draft-scale"),
    )
    scale.apply(module)
    return module


def config(own, target):
    speculation = SimpleNamespace(draft_model_config=SimpleNamespace(hf_config=own))
    model_config = SimpleNamespace(hf_text_config=target)
    return SimpleNamespace(speculative_config=speculation, model_config=model_config)


def test_a_draft_without_a_scale_is_built_as_published(model):
    built = model.DFlashQwen3Model(vllm_config=config(draft(), QWEN), start_layer_id=3)
    assert type(built) is model.DFlashQwen3Model
    assert built.start == 3
    assert built.forward(2, None) == 20


def test_a_draft_with_a_scale_is_scaled_once(model):
    own = draft(input_embedding_scale=0.5)
    built = model.DFlashQwen3Model(vllm_config=config(own, GEMMA), start_layer_id=3)
    assert isinstance(built, model.DFlashQwen3Model)
    assert built.start == 3
    assert built.forward(2, None) == 10
    assert built.forward(None, None, 7) == 7, "embeddings from elsewhere are as they are"


def test_its_compiled_code_is_not_that_of_other_drafts(model):
    """vLLM's cache of compiled models goes by the name and line of `forward`."""
    own = draft(input_embedding_scale=0.5)
    scaled = model.DFlashQwen3Model(vllm_config=config(own, QWEN))
    plain = model.DFlashQwen3Model(vllm_config=config(draft(), QWEN))
    assert scaled.forward.__qualname__ != plain.forward.__qualname__


def test_derived_models_scale_for_themselves(model):
    built = model.Derived(vllm_config=config(draft(input_embedding_scale=0.5), GEMMA))
    assert type(built) is model.Derived
    assert built.forward(2, None) == 20


def test_the_cap_is_set_on_plain_drafts(model):
    own = draft(final_logit_softcapping=30.0)
    assert (
        model.DFlashQwen3ForCausalLM(vllm_config=config(own, QWEN)).logits_processor.soft_cap == 30
    )
    plain = model.DFlashQwen3ForCausalLM(vllm_config=config(draft(), QWEN))
    assert plain.logits_processor.soft_cap is None
    derived = model.DerivedForCausalLM(vllm_config=config(own, QWEN))
    assert derived.logits_processor.soft_cap is None


def prefixed(is_mm_prefix_lm):
    class ModelConfig:
        def __init__(self):
            self.model_arch_config = SimpleNamespace(is_mm_prefix_lm=is_mm_prefix_lm, layers=4)

        @property
        def is_mm_prefix_lm(self):
            return self.model_arch_config.is_mm_prefix_lm

    return SimpleNamespace(model_config=ModelConfig(), other="kept")


@pytest.mark.parametrize("given", [True, False])
def test_the_draft_has_no_multimodal_prefixes_and_the_target_keeps_them(given):
    seen = []
    module = SimpleNamespace(
        load_dflash_model=lambda target, c: seen.append((target, c)) or "draft"
    )
    mm_prefix.apply(module)
    target_config = prefixed(given)
    assert module.load_dflash_model("target", target_config) == "draft"
    ((target, found),) = seen
    assert target == "target"
    assert found.model_config.is_mm_prefix_lm is False
    assert (found.other, found.model_config.model_arch_config.layers) == ("kept", 4)
    assert target_config.model_config.is_mm_prefix_lm is given
    assert (found is target_config) is not given


def builder_module():
    class TritonAttentionMetadataBuilder:
        def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
            self.vllm_config = vllm_config
            model = vllm_config.model_config
            self.found = model.get_num_kv_heads(None), model.get_head_size(), model.rswa_window

    module = SimpleNamespace(TritonAttentionMetadataBuilder=TritonAttentionMetadataBuilder)
    geometry.apply(module)
    return module


@pytest.mark.parametrize(
    ("speculation", "expected"),
    [
        (SimpleNamespace(method="dflash"), (2, 128, None)),
        (SimpleNamespace(method="eagle3"), (4, 512, None)),
        (None, (4, 512, None)),
    ],
)
def test_buffers_are_sized_by_their_own_group_with_dflash(speculation, expected):
    target = SimpleNamespace(
        get_num_kv_heads=lambda _: 4, get_head_size=lambda: 512, rswa_window=None
    )
    given = SimpleNamespace(speculative_config=speculation, model_config=target)
    spec = SimpleNamespace(num_kv_heads=2, head_size=128)
    built = builder_module().TritonAttentionMetadataBuilder(spec, ["a"], given, "cpu")
    assert built.found == expected
    assert built.vllm_config is given
    assert given.model_config is target
