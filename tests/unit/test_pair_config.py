"""Draft and target configs: every published spelling, and what is said about wrong ones."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from pairs import draft_json, make_draft, parse, write_config

from dflash_plugin.errors import ModelNotFoundError, PairMismatchError
from dflash_plugin.pair import FULL, SLIDING, DraftConfig, LayerAttention, TargetConfig

DATA = Path(__file__).parents[1] / "data" / "published_configs.json"
PUBLISHED = json.loads(DATA.read_text(encoding="utf-8"))
PER_LAYER = 11


def attention(**changes) -> list[tuple[int | None, bool]]:
    """Window and causality of each of the two layers."""
    return [(layer.window, layer.causal) for layer in parse(draft_json(**changes)).layers]


def parameters(draft: DraftConfig) -> int:
    return sum(math.prod(shape) for shape in draft.tensor_shapes().values())


# --- published configs ---


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_configs_are_read(name):
    draft = parse(PUBLISHED[name])
    assert draft.block_size == 16
    assert draft.max_speculative_tokens == 15
    assert draft.head_dim == 128
    assert len(draft.tensor_shapes()) == 3 + PER_LAYER * draft.num_layers
    assert len(draft.layers) == draft.num_layers


@pytest.mark.parametrize(
    ("name", "layers", "taps", "depth", "mask"),
    [
        ("qwen3-4b-dflash", 5, (1, 9, 17, 25, 33), 36, 151669),
        ("qwen3-8b-dflash", 5, (1, 9, 17, 25, 33), 36, 151669),
        ("qwen3.5-4b-dflash", 5, (1, 8, 15, 22, 29), 32, 248070),
        ("qwen3.5-35b-a3b-dflash", 8, (1, 10, 19, 28, 37), 40, 248070),
        ("qwen3.6-27b-dflash", 5, (1, 16, 31, 46, 61), 64, 248070),
    ],
)
def test_published_layers_and_taps(name, layers, taps, depth, mask):
    draft = parse(PUBLISHED[name])
    assert (draft.num_layers, draft.target_layer_ids) == (layers, taps)
    assert (draft.num_target_layers, draft.mask_token_id) == (depth, mask)


@pytest.mark.parametrize("name", [name for name in PUBLISHED if "3.6-27b" not in name])
def test_published_full_attention_is_bidirectional(name):
    assert set(parse(PUBLISHED[name]).layers) == {LayerAttention(window=None, causal=False)}


def test_published_sliding_layers_are_causal():
    *sliding, full = parse(PUBLISHED["qwen3.6-27b-dflash"]).layers
    assert sliding == [LayerAttention(window=2048, causal=True)] * 4
    assert full == LayerAttention(window=None, causal=False)


@pytest.mark.parametrize(
    ("name", "count"), [("qwen3-4b-dflash", 537_427_200), ("qwen3-8b-dflash", 1_048_626_432)]
)
def test_tensors_have_the_published_number_of_parameters(name, count):
    assert parameters(parse(PUBLISHED[name])) == count


def test_parameters_of_a_published_draft_with_eight_taps():
    row = {
        **PUBLISHED["qwen3.5-35b-a3b-dflash"],
        "num_hidden_layers": 6,
        "num_key_value_heads": 8,
        "layer_types": [SLIDING] * 5 + [FULL],
        "sliding_window": 4096,
        "dflash_config": {
            "mask_token_id": 248070,
            "target_layer_ids": [1, 6, 11, 16, 22, 27, 32, 37],
        },
    }
    assert parameters(parse(row)) == 385_906_176


# --- spellings ---


def test_block_size_in_dflash_config_goes_before_the_top_level():
    assert parse(draft_json(block_size=..., dflash={"block_size": 4})).block_size == 4
    assert parse(draft_json(block_size=16, dflash={"block_size": 4})).block_size == 4
    assert parse(draft_json(block_size=16, dflash={"block_size": None})).block_size == 16


def test_mask_token_at_the_top_level_is_found():
    raw = draft_json(mask_token_id=9, dflash={"mask_token_id": ...})
    assert parse(raw).mask_token_id == 9


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, {"rope_type": "default", "rope_theta": 10000.0}),
        ({"rope_theta": 1000000}, {"rope_type": "default", "rope_theta": 1e6}),
        ({"rope_theta": 5, "rope_scaling": None}, {"rope_type": "default", "rope_theta": 5.0}),
        (
            {"rope_theta": 5, "rope_scaling": {"type": "yarn", "factor": 64.0}},
            {"rope_type": "yarn", "rope_theta": 5.0, "factor": 64.0},
        ),
        (
            {"rope_scaling": {"rope_type": "linear", "type": "yarn", "factor": 2.0}},
            {"rope_type": "linear", "type": "yarn", "rope_theta": 10000.0, "factor": 2.0},
        ),
        (
            {"rope_parameters": {"rope_type": "default", "rope_theta": 10000000}},
            {"rope_type": "default", "rope_theta": 1e7},
        ),
        (
            {"rope_theta": 5, "rope_parameters": {"rope_theta": 7.0, "factor": None}},
            {"rope_type": "default", "rope_theta": 7.0},
        ),
    ],
)
def test_rope_has_one_spelling(fields, expected):
    found = parse(draft_json(**fields)).rope
    assert found == expected
    assert isinstance(found["rope_theta"], float)


def test_defaults_of_what_may_be_left_out():
    draft = parse(
        draft_json(num_key_value_heads=..., head_dim=..., num_target_layers=None, architectures=...)
    )
    assert (draft.num_kv_heads, draft.head_dim, draft.num_target_layers) == (2, 8, None)
    assert (draft.rms_norm_eps, draft.hidden_act, draft.attention_bias) == (1e-6, "silu", False)
    assert (draft.input_embedding_scale, draft.final_logit_softcapping) == (1.0, None)
    assert draft.target_hidden_size == draft.hidden_size


@pytest.mark.parametrize("place", ["top", "nested"])
def test_embedding_scale_and_softcap_are_found_in_both_places(place):
    values = {"input_embedding_scale": 4, "final_logit_softcapping": 30.0}
    draft = parse(draft_json(**({"dflash": values} if place == "nested" else values)))
    assert (draft.input_embedding_scale, draft.final_logit_softcapping) == (4.0, 30.0)


@pytest.mark.parametrize(
    ("fields", "model_type", "expected"),
    [
        ({}, "gemma4_text", 16**0.5),
        ({}, "qwen3", 1.0),
        ({"input_embedding_scale": 1.0}, "gemma4_text", 1.0),
        ({"dflash": {"input_embedding_scale": 3.0}}, "gemma4_text", 3.0),
        ({"dflash": {"input_embedding_scale": 3.0}}, "llama", 3.0),
    ],
)
def test_a_gemma_target_scales_what_the_draft_says_nothing_of(fields, model_type, expected):
    assert parse(draft_json(hidden_size=16, **fields)).embedding_scale(model_type) == expected


def test_biases_are_tensors():
    shapes = parse(draft_json(attention_bias=True)).tensor_shapes()
    assert len(shapes) == 3 + 2 * (PER_LAYER + 4)
    assert shapes["layers.1.self_attn.k_proj.bias"] == (8,)


def test_taps_of_another_width_widen_the_projection():
    shapes = parse(draft_json(target_hidden_size=40)).tensor_shapes()
    assert shapes["fc.weight"] == (16, 2 * 40)


# --- attention, by vLLM's precedence ---


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, [(None, False)] * 2),
        ({"layer_types": [FULL, FULL]}, [(None, False)] * 2),
        (
            {"layer_types": [SLIDING, FULL], "sliding_window": 9},
            [(9, True), (None, False)],
        ),
        # use_swa makes every layer slide; causality still goes by layer_types.
        ({"dflash": {"use_swa": True}, "sliding_window": 9}, [(9, False)] * 2),
        (
            {"dflash": {"use_swa": True}, "sliding_window": 9, "layer_types": [FULL, FULL]},
            [(9, False)] * 2,
        ),
        (
            {"dflash": {"use_swa": True}, "sliding_window": 9, "layer_types": [FULL, SLIDING]},
            [(None, False), (9, True)],
        ),
        (
            {"dflash": {"use_swa": True, "swa_window_size": 5}, "sliding_window": 9},
            [(5, False)] * 2,
        ),
        ({"is_causal": True}, [(None, True)] * 2),
        ({"dflash": {"causal": True}}, [(None, True)] * 2),
        ({"is_causal": False, "dflash": {"causal": True}}, [(None, False)] * 2),
        ({"is_causal": None, "dflash": {"causal": True}}, [(None, True)] * 2),
        (
            {"is_causal": False, "layer_types": [SLIDING] * 2, "sliding_window": 9},
            [(9, False)] * 2,
        ),
        # A window without sliding layers means nothing.
        ({"sliding_window": 9}, [(None, False)] * 2),
    ],
)
def test_windows_and_causality(fields, expected):
    assert attention(**fields) == expected


@pytest.mark.parametrize("window", [None, 0, -1, True, "9", 9.0])
def test_sliding_layers_need_a_window(window):
    with pytest.raises(PairMismatchError, match="sliding_window"):
        attention(layer_types=[SLIDING, FULL], sliding_window=window)


# --- files ---


def test_from_dir_reads_the_file(tmp_path):
    draft = DraftConfig.from_dir(make_draft(tmp_path / "draft"))
    assert draft.source == tmp_path / "draft" / "config.json"


@pytest.mark.parametrize("read", [DraftConfig.from_dir, TargetConfig.from_dir])
def test_missing_folders_and_files_are_not_found(tmp_path, read):
    for folder in (tmp_path, tmp_path / "missing"):
        with pytest.raises(ModelNotFoundError, match=str(folder)):
            read(folder)


@pytest.mark.parametrize("read", [DraftConfig.from_dir, TargetConfig.from_dir])
@pytest.mark.parametrize("text", ["", "{", "[]", "5", "\xff", "[" * 50_000])
def test_what_is_not_a_json_object_is_named(tmp_path, read, text):
    (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(
        PairMismatchError, match=r"config\.json: (not readable JSON|expected a JSON)"
    ):
        read(tmp_path)


def test_multimodal_targets_are_read_by_their_text_config(tmp_path):
    text = {"model_type": "qwen3_5_text", "hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 9}
    write_config(tmp_path, {"model_type": "qwen3_5", "hidden_size": 99, "text_config": text})
    target = TargetConfig.from_dir(tmp_path)
    assert (target.model_type, target.hidden_size, target.num_layers) == ("qwen3_5_text", 8, 2)


@pytest.mark.parametrize("field", ["hidden_size", "num_hidden_layers", "vocab_size"])
def test_target_fields_are_named(tmp_path, field):
    raw = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 9}
    write_config(tmp_path, {**raw, field: "many"})
    with pytest.raises(PairMismatchError, match=rf'config\.json: {field} is "many"'):
        TargetConfig.from_dir(tmp_path)
