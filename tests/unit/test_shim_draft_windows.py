"""Windows and causality of draft layers, on stand-ins for the engine's classes."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field, replace
from types import ModuleType, SimpleNamespace

import pytest

from dflash_plugin.errors import PairMismatchError
from dflash_plugin.pair import LayerAttention
from dflash_plugin.shims import vllm_draft_windows as repair
from dflash_plugin.shims import vllm_draft_windows_v2 as repair_v2

FULL, SLIDING = "full_attention", "sliding_attention"
WINDOW = LayerAttention(window=16, causal=True)


@dataclass(frozen=True)
class Spec:
    block_size: int
    sliding_window: int | None = None


@dataclass
class Common:
    causal: bool
    tokens: int = 3


class Builder:
    """Builds what it is asked for, as the engine's does."""

    def __init__(self, spec):
        self.kv_cache_spec = spec

    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        return SimpleNamespace(
            causal=common_attn_metadata.causal,
            window=self.kv_cache_spec.sliding_window,
            fast=fast_build,
        )

    def build_for_drafting(self, common_attn_metadata, draft_index):
        return self.build(0, common_attn_metadata, fast_build=True)


class NeverCausal(Builder):
    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        return SimpleNamespace(causal=False)


@dataclass
class Group:
    backend: type
    layer_names: list[str]
    kv_cache_spec: Spec
    metadata_builders: list = field(default_factory=list)

    def create_metadata_builders(self, vllm_config, device, kernel_block_size=None):
        spec = replace(self.kv_cache_spec, block_size=kernel_block_size)
        self.metadata_builders = [self.backend(spec)]

    def get_metadata_builder(self):
        return self.metadata_builders[0]


class Attention:
    def __init__(self, *, prefix, per_layer_sliding_window=None, backend="CPU_ATTN"):
        self.layer_name = prefix
        self.sliding_window = per_layer_sliding_window
        window = per_layer_sliding_window
        self.impl = SimpleNamespace(sliding_window=(window - 1, 0) if window else (-1, -1))
        self.attn_backend = SimpleNamespace(get_name=lambda: backend)


class BaseProposer:
    """The parts of the engine's proposer that matter here."""

    backend = Builder

    def __init__(self, vllm_config, models):
        self.vllm_config, self.models, self.device = vllm_config, models, "cpu"

    def _get_model(self):
        config = self.vllm_config
        made = [
            self.models.Attention(prefix=f"model.layers.{30 + i}.self_attn.attn")
            for i in range(config.made)
        ]
        config.compilation_config.static_forward_context |= {a.layer_name: a for a in made}
        return made

    def initialize_attn_backend(self, kv_cache_config, kernel_block_sizes=None):
        names = list(self.vllm_config.compilation_config.static_forward_context)
        group = Group(self.backend, names, Spec(block_size=64))
        group.create_metadata_builders(self.vllm_config, self.device, kernel_block_size=32)
        self.draft_attn_groups = [group]

    def build_per_group_and_layer_attn_metadata(self, common, draft_index=0):
        layers = {}
        for group in self.draft_attn_groups:
            built = group.get_metadata_builder().build_for_drafting(common, draft_index)
            layers |= dict.fromkeys(group.layer_names, built)
        return list(layers.values()), layers


@pytest.fixture
def engine(monkeypatch):
    """A factory: (draft config fields) -> proposer with the shim applied."""

    def make(backend=Builder, made=None, **fields):
        models = ModuleType("qwen3_dflash")
        models.Attention = Attention
        package = ModuleType("vllm.model_executor.models")
        package.qwen3_dflash = models
        monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
        monkeypatch.setitem(sys.modules, "vllm.model_executor", ModuleType("x"))
        monkeypatch.setitem(sys.modules, "vllm.model_executor.models", package)

        class DFlashProposer(BaseProposer):
            def build_per_group_and_layer_attn_metadata(self, common, draft_index=0):
                groups, layers = super().build_per_group_and_layer_attn_metadata(common)
                assert all(built.causal is False for built in layers.values())
                return groups, layers

        module = ModuleType("dflash")
        module.DFlashProposer, module.SpecDecodeBaseProposer = DFlashProposer, BaseProposer
        assert "window" in repair.apply(module)
        hf = SimpleNamespace(**{"dflash_config": {}, **fields})
        config = SimpleNamespace(
            speculative_config=SimpleNamespace(
                draft_model_config=SimpleNamespace(hf_config=hf, model="the/draft")
            ),
            compilation_config=SimpleNamespace(static_forward_context={}),
            made=hf.num_hidden_layers if made is None else made,
        )
        proposer = DFlashProposer(config, models)
        proposer.backend = backend
        return proposer

    return make


def metadata(proposer):
    proposer._get_model()
    proposer.initialize_attn_backend(None)
    _, layers = proposer.build_per_group_and_layer_attn_metadata(Common(causal=False))
    return [(built.window, built.causal) for _, built in sorted(layers.items())]


def test_each_layer_gets_its_window_and_causality(engine):
    proposer = engine(num_hidden_layers=3, layer_types=[SLIDING, SLIDING, FULL], sliding_window=16)
    layers = proposer._get_model()
    assert [layer.impl.sliding_window for layer in layers] == [(15, 0), (15, 0), (-1, -1)]
    assert [layer.dflash_attention for layer in layers] == [WINDOW, WINDOW, repair.PLAIN]
    # The KV cache is laid out by this field: all layers keep the whole sequence.
    assert all(layer.sliding_window is None for layer in layers)
    proposer.initialize_attn_backend(None)
    names = [group.layer_names for group in proposer.draft_attn_groups]
    assert names == [
        ["model.layers.30.self_attn.attn", "model.layers.31.self_attn.attn"],
        ["model.layers.32.self_attn.attn"],
    ]
    assert all(
        group.get_metadata_builder().kv_cache_spec.block_size == 32
        for group in proposer.draft_attn_groups
    )
    assert metadata(proposer) == [(16, True), (16, True), (None, False)]


@pytest.mark.parametrize(
    ("fields", "causal"),
    [
        ({}, True),
        ({"is_causal": False}, False),
        ({"dflash_config": {"causal": False}}, False),
        ({"is_causal": True, "dflash_config": {"causal": False}}, True),
    ],
)
def test_causality_is_what_the_config_says(engine, fields, causal):
    proposer = engine(num_hidden_layers=1, layer_types=[SLIDING], sliding_window=4, **fields)
    assert metadata(proposer) == [(4, causal)]


def test_full_layers_may_be_causal(engine):
    proposer = engine(num_hidden_layers=1, layer_types=[FULL], dflash_config={"causal": True})
    assert metadata(proposer) == [(None, True)]


def test_a_plain_draft_runs_as_published(engine):
    proposer = engine(num_hidden_layers=2, layer_types=[FULL, FULL], sliding_window=16)
    layers = proposer._get_model()
    assert not any(hasattr(layer, "dflash_attention") for layer in layers)
    proposer.initialize_attn_backend(None)
    assert len(proposer.draft_attn_groups) == 1
    with pytest.raises(AssertionError):  # the published check is still there
        proposer.build_per_group_and_layer_attn_metadata(Common(causal=True))


def test_attention_is_the_engines_own_again(engine):
    proposer = engine(num_hidden_layers=1, layer_types=[SLIDING], sliding_window=4)
    proposer._get_model()
    assert proposer.models.Attention is Attention


def test_a_layer_that_was_not_made_here_is_an_error(engine):
    proposer = engine(num_hidden_layers=2, layer_types=[SLIDING] * 2, sliding_window=4, made=1)
    with pytest.raises(RuntimeError, match="2 layers, 1 were made"):
        proposer._get_model()
    assert proposer.models.Attention is Attention


def test_a_window_that_is_not_stated_is_refused(engine):
    proposer = engine(num_hidden_layers=1, layer_types=[SLIDING])
    with pytest.raises(PairMismatchError, match="sliding_window"):
        proposer._get_model()


def test_a_back_end_that_cannot_is_refused(engine):
    proposer = engine(
        backend=NeverCausal, num_hidden_layers=1, layer_types=[SLIDING], sliding_window=4
    )
    with pytest.raises(NotImplementedError, match="causal=True"):
        metadata(proposer)


@pytest.mark.parametrize(
    ("backend", "expected"), [("CPU_ATTN", (15, 0)), ("FLASH_ATTN", (15, 15)), ("TRITON_ATTN", 0)]
)
def test_windows_that_look_ahead(backend, expected):
    layer = Attention(prefix="x", per_layer_sliding_window=16, backend=backend)
    if expected:
        repair._look_ahead(layer, 16)
        assert layer.impl.sliding_window == expected
    else:
        with pytest.raises(NotImplementedError, match="TRITON_ATTN"):
            repair._look_ahead(layer, 16)


def test_the_v2_speculator(engine):
    proposer = engine(num_hidden_layers=2, layer_types=[SLIDING, FULL], sliding_window=16)

    class DFlashSpeculator:
        vllm_config, device = proposer.vllm_config, "cuda"

        def load_draft_model(self, target, names):
            return BaseProposer._get_model(proposer)

        def set_attn(self, *_):
            BaseProposer.initialize_attn_backend(proposer, None)
            self.attn_groups = [[], proposer.draft_attn_groups]

    module = ModuleType("speculator")
    module.DFlashSpeculator = DFlashSpeculator
    assert "window" in repair_v2.apply(module)
    speculator = DFlashSpeculator()
    layers = speculator.load_draft_model(None, set())
    assert [layer.dflash_attention for layer in layers] == [WINDOW, repair.PLAIN]
    speculator.set_attn(None, None, None)
    empty, groups = speculator.attn_groups
    assert empty == []
    built = [group.get_metadata_builder().build(0, Common(causal=False)) for group in groups]
    assert [(one.window, one.causal) for one in built] == [(16, True), (None, False)]
