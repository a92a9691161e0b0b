"""Wrong, missing and impossible fields of a draft's config: each named with its file."""

from __future__ import annotations

import pytest
from pairs import draft_json, parse

from dflash_plugin.errors import PairMismatchError
from dflash_plugin.pair import FULL


@pytest.mark.parametrize("names", [["DFlash2DraftModel"], ["Other", "DFlash2DraftModel"]])
def test_dflash_2_is_refused_by_name(names):
    with pytest.raises(PairMismatchError, match="DFlash2DraftModel is a DFlash 2 draft"):
        parse(draft_json(architectures=names))


@pytest.mark.parametrize("value", [..., None, [], "text"])
def test_a_config_without_the_dflash_table_is_not_a_draft(value):
    raw = draft_json()
    raw["dflash_config"] = value
    if value is ...:
        del raw["dflash_config"]
    with pytest.raises(PairMismatchError, match=r"draft/config\.json: no dflash_config table"):
        parse(raw)


REQUIRED = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"]
REQUIRED += ["vocab_size", "block_size"]


@pytest.mark.parametrize("field", REQUIRED)
@pytest.mark.parametrize("value", [..., None, 0, -1, True, "16", 1.5, [16]])
def test_required_numbers_are_named(field, value):
    with pytest.raises(PairMismatchError, match=rf"draft/config\.json: {field} is"):
        parse(draft_json(**{field: value}))


WRONG = {
    "architectures": [5, "DFlashDraftModel", [5], {}],
    "num_key_value_heads": [0, "1", 3, 1.0],
    "head_dim": [0, "8", False],
    "target_hidden_size": [0, "16"],
    "max_position_embeddings": [0, "8"],
    "num_target_layers": ["4", 0, 4.0, True],
    "num_hidden_layers": [10**6, 10**30],
    "block_size": [1],
    "rms_norm_eps": ["1e-6", 0, -1.0, True, [], float("nan"), float("inf"), 10**400],
    "rope_theta": ["1e6", 0, True, [1]],
    "rope_scaling": ["yarn", 5, []],
    "rope_parameters": ["yarn", 5, []],
    "hidden_act": [5, ["silu"]],
    "attention_bias": ["false", 0, 1],
    "is_causal": ["false", 0],
    "layer_types": ["full", [FULL], [FULL] * 3, ["other", FULL], [{}, FULL], [None, None], 5],
    "input_embedding_scale": ["4", 0, -1, [4]],
    "final_logit_softcapping": ["30", -1, True],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, vs in WRONG.items() for v in vs])
def test_wrong_values_are_named(field, value):
    with pytest.raises(PairMismatchError, match=rf"draft/config\.json: {field} is"):
        parse(draft_json(**{field: value}))


NESTED = {
    "target_layer_ids": [..., None, [], "1", [1, "3"], [-1], [True], [1.0], {"1": 3}],
    "mask_token_id": [..., None, -1, "5", True, 5.0],
    "use_swa": ["true", 1],
    "causal": ["true", 1],
    "block_size": ["8", 1, True],
}


@pytest.mark.parametrize(("field", "value"), [(f, v) for f, vs in NESTED.items() for v in vs])
def test_wrong_values_in_dflash_config_are_named(field, value):
    with pytest.raises(
        PairMismatchError, match=rf"draft/config\.json: (dflash_config\.)?{field} is"
    ):
        parse(draft_json(dflash={field: value}))


def test_a_head_of_no_width_is_refused():
    with pytest.raises(PairMismatchError, match="head_dim is 0"):
        parse(draft_json(head_dim=..., num_attention_heads=32, num_key_value_heads=1))
