"""Mixed sliding/full drafts on the V1 runner, on a proposer that does what the engine's does."""

from __future__ import annotations

import logging
from dataclasses import dataclass, replace
from types import SimpleNamespace

import pytest
from shim_fakes import engine  # noqa: F401

from dflash_plugin import shims
from dflash_plugin.shims import vllm_mixed_swa as proposer_shim
from dflash_plugin.shims import vllm_mixed_swa_config as config_shim
from dflash_plugin.shims import vllm_mixed_swa_model as model_shim
from dflash_plugin.shims import vllm_swa_causal as causal_shim
from dflash_plugin.shims import vllm_swa_causal_v2 as causal_v2_shim

torch = pytest.importorskip("torch")
pytestmark = pytest.mark.torch

SLIDING, FULL = "sliding_attention", "full_attention"
K, REQUESTS = 3, 2
BLOCK_SIZES = {4: 16, 9: 32}  # by KV cache group


def resolve(config, layer):
    """As the releases do: window and causality of one layer; a mixture is refused."""
    kinds = config.layer_types
    if len(set(kinds)) > 1:
        raise NotImplementedError("the release's refusal")
    sliding = kinds[layer] == SLIDING
    return (config.sliding_window if sliding else None), sliding


@dataclass
class Metadata:
    """The fields of CommonAttentionMetadata that matter here."""

    num_reqs: int
    block_table_tensor: str
    slot_mapping: object = None
    causal: bool = False


class Base:
    """Two levels up: builds metadata and slot mappings from its own attributes."""

    def build_per_group_and_layer_attn_metadata(self, cad, draft_index=0):
        built = [SimpleNamespace(**vars(cad), group=g) for g in self.draft_attn_groups]
        pairs = zip(self.draft_attn_groups, built, strict=True)
        return built, {name: one for group, one in pairs for name in group}

    def _get_slot_mapping(self, num_tokens, slot_mapping=None):
        if slot_mapping is not None:
            self._slot_mapping_buffer[: len(slot_mapping)].copy_(slot_mapping)
            self._slot_mapping_buffer[len(slot_mapping) : num_tokens] = -1
        return dict.fromkeys(self._draft_attn_layer_names, self._slot_mapping_buffer[:num_tokens])

    def initialize_attn_backend(self, kv_cache_config, kernel_block_sizes=None):
        groups = kv_cache_config.kv_cache_groups
        found = {
            gid for gid, g in enumerate(groups) if self._draft_attn_layer_names & set(g.layer_names)
        }
        assert len(found) == 1, "all layers in one group"
        (self.kv_cache_gid,) = found
        self.draft_attn_groups = [sorted(self._draft_attn_layer_names)]
        self.block_size = BLOCK_SIZES[self.kv_cache_gid]


class Published(Base):
    """The release's DFlashProposer."""

    def __init__(self, vllm_config, device, runner=None):
        self.draft_model_config = SimpleNamespace(hf_config=vllm_config)
        self.dflash_causal = False
        self._context_slot_mapping_buffer = torch.zeros(8, dtype=torch.int64)
        self._slot_mapping_buffer = torch.zeros(12, dtype=torch.int64)
        self._context_positions_buffer = torch.arange(8)
        self.input_ids = torch.arange(12)
        self.calls = []

    def set_inputs_first_pass(self, *, cad, context):
        table = int(cad.block_table_tensor)
        self._context_slot_mapping_buffer[:context] = table * 1000 + self.block_size
        self._slot_mapping_buffer[: REQUESTS * (K + 1)] = table * 1000 + self.block_size + 1
        self._dflash_num_context, self._dflash_hidden_states = context, "states"
        made = replace(
            cad, slot_mapping=self._slot_mapping_buffer[: REQUESTS * (K + 1)], causal=False
        )
        return REQUESTS * (K + 1), f"indices of table {table}", made

    def build_per_group_and_layer_attn_metadata(self, cad, draft_index=0):
        per_group, per_layer = super().build_per_group_and_layer_attn_metadata(cad, draft_index)
        assert not any(one.causal for one in per_layer.values()), "the release's own assertion"
        return per_group, per_layer

    def build_model_inputs_first_pass(self, num_tokens, num_input_tokens, mm_embed_inputs):
        self.calls.append("published inputs")
        return {}, num_input_tokens

    def _get_positions(self, num_tokens):
        return torch.arange(num_tokens)


def layer(name):
    return SimpleNamespace(self_attn=SimpleNamespace(attn=SimpleNamespace(layer_name=name)))


@pytest.fixture
def module(engine):  # noqa: F811
    """The proposer's module with the shim applied."""
    engine("vllm.model_executor.models.qwen3_dflash", _resolve_layer_attention=resolve)
    made = engine(
        "vllm.v1.spec_decode.dflash", DFlashProposer=Published, logger=logging.getLogger("x")
    )
    proposer_shim.apply(made)
    return made


def proposer(module, kinds, groups):
    config = SimpleNamespace(layer_types=kinds, sliding_window=48, dflash_config={})
    tables = {
        gid: SimpleNamespace(get_device_tensor=lambda n, gid=gid: f"{gid}") for gid in BLOCK_SIZES
    }
    runner = SimpleNamespace(input_batch=SimpleNamespace(block_table=tables))
    made = module.DFlashProposer(config, "cpu", runner)
    names = [f"layer.{i}" for i in range(len(kinds))]
    made._draft_attn_layer_names = set(names)
    made.stored = []
    made.model = SimpleNamespace(
        model=SimpleNamespace(layers=[layer(name) for name in names]),
        precompute_and_store_context_kv=lambda *args: made.stored.append(args),
    )
    kv_groups = [SimpleNamespace(layer_names=[]) for _ in range(max(BLOCK_SIZES) + 1)]
    for name, gid in zip(names, groups, strict=True):
        kv_groups[gid].layer_names.append(name)
    made.initialize_attn_backend(SimpleNamespace(kv_cache_groups=kv_groups), [16])
    return made


def step(made, context=5):
    """One proposal, as far as block tables and slots go."""
    common = Metadata(REQUESTS, f"{made.kv_cache_gid}")
    tokens, indices, metadata = made.set_inputs_first_pass(cad=common, context=context)
    _, per_layer = made.build_per_group_and_layer_attn_metadata(metadata)
    inputs, padded = made.build_model_inputs_first_pass(tokens, tokens + 2, None)
    slots = made._get_slot_mapping(padded, metadata.slot_mapping)
    return indices, per_layer, inputs, slots


def test_uniform_drafts_use_the_published_proposer(module):
    made = proposer(module, [FULL, FULL], [4, 4])
    assert made.draft_attn_groups == [["layer.0", "layer.1"]]
    indices, per_layer, inputs, slots = step(made)
    assert (indices, inputs, made.calls) == ("indices of table 4", {}, ["published inputs"])
    assert set(per_layer) == set(slots) == {"layer.0", "layer.1"}


def test_the_class_looks_like_the_published_one(module):
    found = module.DFlashProposer
    assert issubclass(found, Published)
    assert (found.__name__, found.__qualname__) == ("Published", "Published")
    assert found.__module__ == "vllm.v1.spec_decode.dflash"


def test_each_layer_has_its_own_groups_table_slots_and_causality(module):
    made = proposer(module, [SLIDING, FULL, SLIDING], [9, 4, 9])
    assert (made.kv_cache_gid, made.block_size) == (9, 32), "the first layer's: the runner asks"
    assert made.draft_attn_groups == [["layer.0", "layer.2"], ["layer.1"]]
    indices, per_layer, inputs, slots = step(made)
    assert indices == "indices of table 9"
    for name, gid, causal in (("layer.0", 9, True), ("layer.1", 4, False), ("layer.2", 9, True)):
        metadata = per_layer[name]
        assert (metadata.block_table_tensor, metadata.causal) == (f"{gid}", causal)
        expected = gid * 1000 + BLOCK_SIZES[gid] + 1
        assert metadata.slot_mapping.tolist() == [expected] * (REQUESTS * (K + 1))
        assert slots[name].tolist() == [expected] * (REQUESTS * (K + 1)) + [-1, -1]
    assert set(inputs) == {"input_ids", "positions", "inputs_embeds"}
    assert len(inputs["input_ids"]) == REQUESTS * (K + 1) + 2


def test_context_goes_into_each_layers_own_slots(module):
    made = proposer(module, [SLIDING, FULL, SLIDING], [9, 4, 9])
    step(made, context=5)
    ((states, positions, slots),) = made.stored
    assert states == "states"
    assert positions.tolist() == [0, 1, 2, 3, 4]
    assert [one.tolist() for one in slots] == [[9032] * 5, [4016] * 5, [9032] * 5]


@pytest.mark.parametrize("kinds", [[FULL, FULL, FULL], [SLIDING, SLIDING, SLIDING]])
def test_layers_of_one_kind_in_several_groups(module, kinds):
    """What becomes of a draft with more layers than a target has of some kind (gpt-oss)."""
    made = proposer(module, kinds, [4, 9, 4])
    assert made.draft_attn_groups == [["layer.0", "layer.2"], ["layer.1"]]
    _, per_layer, _, slots = step(made, context=2)
    for name, gid in (("layer.0", 4), ("layer.1", 9), ("layer.2", 4)):
        metadata = per_layer[name]
        assert (metadata.block_table_tensor, metadata.causal) == (f"{gid}", kinds[0] == SLIDING)
        assert slots[name].tolist()[0] == gid * 1000 + BLOCK_SIZES[gid] + 1
    ((_, _, stored),) = made.stored
    assert [one.tolist() for one in stored] == [[4016] * 2, [9032] * 2, [4016] * 2]


def test_what_a_part_sees_does_not_stay(module):
    made = proposer(module, [SLIDING, FULL], [9, 4])
    before = {name: getattr(made, name) for name in made._parts[1].attributes}
    step(made)
    assert {name: getattr(made, name) for name in before} == before
    assert made._parts[0].attributes["_slot_mapping_buffer"] is not made._slot_mapping_buffer


def test_one_kv_cache_group_may_hold_both_kinds(module):
    """Without the hybrid KV cache manager all layers are in one group."""
    made = proposer(module, [SLIDING, FULL], [4, 4])
    _, per_layer, _, slots = step(made)
    assert [per_layer[f"layer.{i}"].causal for i in (0, 1)] == [True, False]
    assert slots["layer.0"].tolist() == slots["layer.1"].tolist()


def test_a_back_end_without_the_causality_is_an_error(module, monkeypatch):
    made = proposer(module, [SLIDING, FULL], [9, 4])

    def causal_only(self, cad, draft_index=0):
        return [], dict.fromkeys(self._draft_attn_layer_names, SimpleNamespace(causal=True))

    monkeypatch.setattr(Base, "build_per_group_and_layer_attn_metadata", causal_only)
    with pytest.raises(AssertionError, match=r"layer\.1 does not support causal=False"):
        step(made)


@pytest.mark.parametrize("in_place", [True, False])
def test_the_model_refuses_unless_the_proposer_is_in_place(engine, module, in_place):  # noqa: F811
    if in_place:
        setattr(module, shims._marker(proposer_shim.SHIM), True)
    model = SimpleNamespace(_resolve_layer_attention=resolve)
    model_shim.apply(model)
    mixed = SimpleNamespace(layer_types=[SLIDING, FULL], sliding_window=48)
    if in_place:
        assert model._resolve_layer_attention(mixed, 0) == (48, True)
        assert model._resolve_layer_attention(mixed, 1) == (None, False)
    else:
        with pytest.raises(NotImplementedError, match="the release's refusal"):
            model._resolve_layer_attention(mixed, 0)


def test_other_refusals_of_the_model_stay(engine, module):  # noqa: F811
    def refuse(config, layer):
        raise NotImplementedError("something else")

    setattr(module, shims._marker(proposer_shim.SHIM), True)
    model = SimpleNamespace(_resolve_layer_attention=refuse)
    model_shim.apply(model)
    with pytest.raises(NotImplementedError, match="something else"):
        model._resolve_layer_attention(SimpleNamespace(layer_types=[FULL, FULL]), 0)


@pytest.mark.parametrize(
    ("refuses_on_v1", "triton", "expected"),
    [(True, True, False), (True, False, False), (False, True, True), (False, False, False)],
)
def test_v2_is_still_chosen_where_it_can_run(engine, refuses_on_v1, triton, expected):  # noqa: F811
    class VllmConfig:
        def _dflash_needs_multi_kv_group(self):
            return True

    if refuses_on_v1:
        VllmConfig._get_v1_model_runner_unsupported_features = lambda self: []
    engine("vllm.triton_utils", HAS_TRITON=triton)
    config_shim.apply(SimpleNamespace(VllmConfig=VllmConfig))
    assert VllmConfig()._dflash_needs_multi_kv_group() is expected


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, False),
        ({"layer_types": None}, False),
        ({"layer_types": [FULL, FULL]}, False),
        ({"layer_types": [SLIDING, FULL]}, False),
        ({"layer_types": [SLIDING, SLIDING]}, True),
        ({"layer_types": [SLIDING], "dflash_config": {"causal": False}}, False),
        ({"layer_types": [FULL], "dflash_config": {"causal": True}}, True),
        ({"layer_types": [FULL], "dflash_config": {"causal": None}}, False),
    ],
)
def test_sliding_drafts_are_causal_in_both_runners_of_0_25(fields, expected):
    config = SimpleNamespace(**fields)
    module = SimpleNamespace(DFlashProposer=type("DFlashProposer", (Published,), {}))
    causal_shim.apply(module)
    assert module.DFlashProposer(config, "cpu").dflash_causal is expected
    module = SimpleNamespace()
    causal_v2_shim.apply(module)
    found = module.get_dflash_causal(SimpleNamespace(hf_config=config))
    assert found is expected
