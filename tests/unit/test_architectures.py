"""Shapes of published models: what is computed from them, against what is published."""

from __future__ import annotations

import pytest

from dflash_plugin import architectures, matrix, traits
from dflash_plugin.architectures import GIB, LINEAR
from dflash_plugin.errors import MatrixError
from dflash_plugin.pair_config import FULL, SLIDING, DraftConfig

DATA = architectures.load()


@pytest.mark.parametrize(
    ("draft", "parameters"),
    [
        ("qwen3-4b-b16", 537_427_200),
        ("qwen3-8b-b16", 1_048_626_432),
        ("qwen3.5-35b-a3b-8-taps", 385_906_176),
    ],
)
def test_parameters_of_drafts_are_the_published_ones(draft, parameters):
    assert DATA.drafts[draft].parameters() == parameters


@pytest.mark.parametrize(
    ("draft", "gib"),
    [
        ("qwen3-coder-30b-a3b", 0.88),
        ("llama-3.1-8b-ultrachat", 1.95),
        ("gpt-oss-20b", 1.46),
        ("qwen3.5-4b-5-taps", 1.00),
        ("qwen3.5-9b-5-taps", 1.95),
        ("qwen3.5-27b-5-taps", 3.22),
        ("qwen3.5-35b-a3b-5-taps", 0.88),
        ("qwen3.6-27b", 3.22),
        ("kimi-k2.5", 6.48),
        ("gemma-4-31b", 2.86),
        ("gemma-4-26b-a4b", 0.80),
        ("qwen3-coder-next", 0.88),
    ],
)
def test_sizes_of_drafts_are_those_of_their_files(draft, gib):
    assert round(2 * DATA.drafts[draft].parameters() / GIB, 2) == gib


def test_counting_agrees_with_the_tensors_of_the_format():
    row = DATA.drafts["qwen3-8b-b16"]
    config = DraftConfig.from_dict(
        {
            "architectures": ["DFlashDraftModel"],
            "num_hidden_layers": row.num_hidden_layers,
            "hidden_size": row.hidden_size,
            "intermediate_size": row.intermediate_size,
            "num_attention_heads": row.num_attention_heads,
            "num_key_value_heads": row.num_key_value_heads,
            "head_dim": row.head_dim,
            "vocab_size": row.vocab_size,
            "rope_theta": 1e6,
            "block_size": row.block_size,
            "dflash_config": {
                "mask_token_id": row.mask_token_id,
                "target_layer_ids": list(row.target_layer_ids),
            },
        },
        architectures.PATH,
    )
    sizes = 0
    for shape in config.tensor_shapes().values():
        size = 1
        for side in shape:
            size *= side
        sizes += size
    assert sizes == row.parameters()


@pytest.mark.parametrize(
    ("target", "billions"),
    [
        ("qwen3-4b", 4.0),
        ("qwen3-8b", 8.2),
        ("qwen3-coder-30b-a3b", 30.5),
        ("llama-3.1-8b", 8.0),
        ("gpt-oss-20b", 20.9),
        ("gpt-oss-120b", 116.8),
        ("qwen3.5-9b", 9),
        ("qwen3.5-27b", 27),
        ("qwen3.5-35b-a3b", 35),
        ("qwen3.5-122b-a10b", 122),
        ("kimi-k2.5", 1026),
        ("minimax-m2.5", 229),
        ("gemma-4-26b-a4b", 25.2),
        ("gemma-4-31b", 30.7),
        ("qwen3-coder-next", 80),
    ],
)
def test_parameters_of_targets_are_near_their_names(target, billions):
    counted = sum(DATA.targets[target].parameters())
    assert counted / 1e9 == pytest.approx(billions, rel=0.015)


def test_an_unknown_shape_is_counted_by_its_name_and_has_no_state():
    target = DATA.targets["qwen3.5-4b"]
    assert target.parameters() == (4_000_000_000, 0)
    assert target.state_bytes() is None


@pytest.mark.parametrize(
    ("target", "one_token", "sliding"),
    [
        ("qwen3-8b", 36 * 2 * 8 * 128 * 2, 0),
        ("kimi-k2.5", 61 * (512 + 64) * 2, 0),
        ("qwen3.5-27b", 16 * 2 * 4 * 256 * 2, 0),
        ("gemma-4-31b", 10 * 2 * 4 * 512 * 2, 50 * 2 * 16 * 256 * 2),
        ("gpt-oss-20b", 12 * 2 * 8 * 64 * 2, 12 * 2 * 8 * 64 * 2),
    ],
)
def test_kv_cache_grows_on_full_layers_and_stops_at_the_window(target, one_token, sliding):
    row = DATA.targets[target]
    assert row.kv_bytes(1) == one_token + sliding
    assert row.kv_bytes(5000) - row.kv_bytes(4999) == one_token


def test_the_state_of_a_recurrent_layer():
    # 48 layers x (48 heads x 128 x 128 in float32 + 3 inputs of the convolution)
    conv = 3 * (2 * 16 * 128 + 48 * 128) * 2
    assert DATA.targets["qwen3.5-27b"].state_bytes() == 48 * (48 * 128 * 128 * 4 + conv)
    assert DATA.targets["qwen3-8b"].state_bytes() == 0


def test_a_hybrid_keeps_a_state_for_every_drafted_token():
    target, draft = DATA.targets["qwen3.5-27b"], DATA.drafts["qwen3.6-27b"]
    few, many = (architectures.memory(target, draft, k, 100, 2) for k in (1, 15))
    assert many.cache - few.cache == 2 * 14 * target.state_bytes()


def test_quantised_experts_weigh_less():
    target = DATA.targets["gpt-oss-120b"]
    rest, routed = target.parameters()
    assert target.weight_bytes() == rest * 2 + routed * 4.25 / 8


def test_memory_is_unknown_where_a_half_is():
    target, draft = DATA.targets["qwen3-8b"], DATA.drafts["qwen3.8-27b-dflash2"]
    assert architectures.memory(target, draft, 7) is None


# --- traits ---


def kinds(target: str, draft: str) -> dict[str, list[int]]:
    taps = DATA.drafts[draft].target_layer_ids
    of = traits.tap_kinds(DATA.targets[target], DATA.drafts[draft])
    return {kind: [t for t, k in zip(taps, of, strict=True) if k == kind] for kind in set(of)}


@pytest.mark.parametrize(
    ("target", "draft", "full"),
    [
        ("qwen3.5-4b", "qwen3.5-4b-8-taps", []),
        ("qwen3.5-9b", "qwen3.5-9b-8-taps", []),
        ("qwen3.5-27b", "qwen3.5-27b-8-taps", [27, 35]),
        ("qwen3.5-35b-a3b", "qwen3.5-35b-a3b-8-taps", [11, 27]),
        ("qwen3.5-122b-a10b", "qwen3.5-122b-a10b-8-taps", [7, 39]),
        ("qwen3-coder-next", "qwen3-coder-next", [3, 11, 23, 35, 43]),
        ("qwen3.5-4b", "qwen3.5-4b-5-taps", [15]),
        ("gemma-4-31b", "gemma-4-31b", [23, 35]),
        ("gemma-4-26b-a4b", "gemma-4-26b-a4b", [11, 17]),
    ],
)
def test_taps_that_are_on_full_layers(target, draft, full):
    assert kinds(target, draft).get(FULL, []) == full


@pytest.mark.parametrize(
    ("pair", "has", "has_not"),
    [
        ("qwen3.5-4b", "linear-state taps-linear-only draft-mixed-windows", "taps-mixed moe"),
        ("qwen3.5-27b", "taps-mixed mask-past-tokenizer output-gate", "taps-linear-only"),
        ("qwen3-coder-next", "taps-full-only moe linear-state", "taps-mixed"),
        ("gemma-4-31b-it", "three-head-sizes softcap embedding-scale mask-low tied-head", "moe"),
        ("kimi-k2.5", "mla yarn moe", "tied-head"),
        ("gpt-oss-20b", "attention-sinks target-windows moe yarn", "two-head-sizes"),
        ("qwen3-4b", "tied-head", "taps-full-only two-head-sizes"),
        ("minimax-m2.5", "moe partial-rotary", "two-head-sizes"),
        ("muse-glimmer-30b-dflash2", "dflash2 draft-all-sliding softcap", "draft-mixed-windows"),
    ],
)
def test_traits(pair, has, has_not):
    row = matrix.load().pair(pair)
    found = traits.traits(row.target_shape, row.draft_shape)
    assert set(has.split()) <= set(found)
    assert not set(has_not.split()) & set(found)
    assert set(found) <= set(traits.TRAITS)


def test_layer_counts():
    target = DATA.targets["qwen3.5-27b"]
    assert {k: target.count(k) for k in (FULL, LINEAR, SLIDING)} == {
        FULL: 16,
        LINEAR: 48,
        SLIDING: 0,
    }
    assert DATA.targets["gemma-4-31b"].count(SLIDING) == 50


# --- the file and the pairs that name it ---


def test_every_shape_belongs_to_a_pair():
    pairs = matrix.load().pairs.values()
    assert {p.target_shape.id for p in pairs if p.target_shape} == set(DATA.targets)
    assert {p.draft_shape.id for p in pairs if p.draft_shape} == set(DATA.drafts)


@pytest.mark.parametrize("pair", [p for p in matrix.load().pairs.values() if p.draft_shape])
def test_the_halves_of_a_pair_fit(pair):
    target, draft = pair.target_shape, pair.draft_shape
    assert draft.block_size - 1 == pair.num_speculative_tokens
    if target is not None:
        assert draft.hidden_size == target.hidden_size
        assert draft.num_target_layers == target.num_hidden_layers
        assert draft.vocab_size in (None, target.vocab_size)
        assert draft.mask_token_id is None or draft.mask_token_id < target.vocab_size


GOOD = """
[[target]]
id = "t"
model_type = "qwen3"
num_hidden_layers = 2
hidden_size = 8
vocab_size = 16
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 4
source = "a test"

[[draft]]
id = "d"
num_hidden_layers = 2
hidden_size = 8
num_attention_heads = 2
num_key_value_heads = 1
head_dim = 4
num_target_layers = 2
target_layer_ids = [0, 1]
source = "a test"
"""


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("", "", ""),
        ('model_type = "qwen3"', "", "missing key 'model_type'"),
        ("vocab_size = 16", "vocab_size = 0", "vocab_size is 0"),
        ("vocab_size = 16", "vocab = 16", "vocab_size"),
        ('source = "a test"', 'source = "a test"\nlayer_type = []', "unknown key 'layer_type'"),
        ("head_dim = 4\nsource", "source", "neither mla nor"),
        ("head_dim = 4\nsource", 'head_dim = 4\nlayer_types = ["full"]\nsource', "layer_types"),
        ("head_dim = 4\nsource", "head_dim = 4\nlayer_types = []\nsource", "is empty"),
        ("head_dim = 4\nsource", 'head_dim = 4\nweights = { dtype = "f8" }\nsource', "'f8'"),
        ("head_dim = 4\nsource", "head_dim = 4\nmla = { q_lora_rank = 1 }\nsource", "kv_lora_rank"),
        ("[0, 1]", "[0, 2]", "of 2 layers"),
        ("num_target_layers = 2", "sliding_layers = 3", "3 of 2 layers slide"),
    ],
)
def test_a_wrong_file(tmp_path, old, new, said):
    path = tmp_path / "shapes.toml"
    path.write_text(GOOD.replace(old, new, 1) if old else GOOD, encoding="utf-8")
    if not said:
        assert set(architectures.load(path).drafts) == {"d"}
        return
    with pytest.raises(MatrixError) as caught:
        architectures.load(path)
    assert said in str(caught.value)
    assert str(path) in str(caught.value)
