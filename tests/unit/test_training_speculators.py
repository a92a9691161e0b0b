"""Drafts of `speculators` to the published format and back: the same draft."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from pairs import make_target, write_config  # noqa: E402
from reference_helpers import HIDDEN, VOCAB, save_draft  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from dflash_plugin import cli  # noqa: E402
from dflash_plugin.errors import CheckpointError, PairMismatchError  # noqa: E402
from dflash_plugin.pair import DraftConfig  # noqa: E402
from dflash_plugin.training.recipe import speculators  # noqa: E402

pytestmark = pytest.mark.torch
SLIDING = {
    "use_sliding_window": True,
    "sliding_window": 5,
    "layer_types": ["sliding_attention"] * 2,
}


@pytest.fixture
def target(tmp_path) -> Path:
    return make_target(
        tmp_path / "target",
        hidden_size=HIDDEN,
        vocab_size=VOCAB,
        architectures=["Qwen3ForCausalLM"],
    )


@pytest.mark.parametrize(
    "changes", [{}, SLIDING, {**SLIDING, "is_causal": False}], ids=["full", "causal", "not causal"]
)
def test_there_and_back_is_the_same_draft(tmp_path, target, changes):
    source = save_draft(tmp_path / "draft", **changes)
    theirs, back = tmp_path / "theirs", tmp_path / "back"
    assert cli.main(["pair", "convert", str(source), str(theirs), "--target", str(target)]) == 0
    config = json.loads((theirs / "config.json").read_text())
    assert config["aux_hidden_state_layer_ids"] == [1, 3]
    assert config["speculators_config"]["verifier"]["architectures"] == ["Qwen3ForCausalLM"]
    assert "dflash_config" not in config["transformer_layer_config"]
    assert cli.main(["pair", "convert", str(theirs), str(back)]) == 0
    one, other = DraftConfig.from_dir(source), DraftConfig.from_dir(back)
    assert one.target_layer_ids == other.target_layer_ids and one.layers == other.layers
    assert one.block_size == other.block_size and one.rope == other.rope
    assert one.mask_token_id == other.mask_token_id
    weights = load_file(back / "model.safetensors")
    for name, value in load_file(source / "model.safetensors").items():
        assert torch.equal(weights[name], value)


def theirs(tmp_path, target, **changes) -> Path:
    folder = tmp_path / "theirs"
    source = save_draft(tmp_path / "draft")
    speculators.from_published(source, target, folder, target_name="t")
    raw = json.loads((folder / "config.json").read_text())
    return write_config(folder, {**raw, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"speculators_model_type": "eagle3"}, "is 'eagle3', expected 'dflash'"),
        ({"draft_vocab_size": 32}, "draft_vocab_size is 32, expected 50"),
        ({"sample_from_anchor": True}, "sample_from_anchor is True"),
        ({"aux_hidden_state_layer_ids": [0]}, "expected layer numbers from 1"),
        ({"aux_hidden_state_layer_ids": None}, "expected layer numbers from 1"),
    ],
)
def test_what_the_published_format_cannot_say(tmp_path, target, changes, message):
    folder = theirs(tmp_path, target, **changes)
    with pytest.raises(PairMismatchError, match=message):
        speculators.to_published(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_targets_tensors_are_left_out_and_missing_ones_told(tmp_path, target):
    folder = theirs(tmp_path, target)
    held = load_file(folder / "model.safetensors")
    save_file({**held, "lm_head.weight": torch.zeros(VOCAB, HIDDEN)}, folder / "model.safetensors")
    speculators.to_published(folder, tmp_path / "out")
    assert set(load_file(tmp_path / "out" / "model.safetensors")) == set(held)
    del held["layers.1.mlp.up_proj.weight"]
    save_file(held, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        speculators.to_published(folder, tmp_path / "other")
    assert not (tmp_path / "other").exists()


def test_a_tap_on_the_last_layer(tmp_path, target):
    source = save_draft(tmp_path / "draft", dflash={"target_layer_ids": [1, 3]})
    with pytest.raises(PairMismatchError, match="last layer 3"):
        speculators.from_published(source, target, tmp_path / "out", target_name="t")


def test_to_speculators_needs_the_target(tmp_path, capsys):
    source = save_draft(tmp_path / "draft")
    assert cli.main(["pair", "convert", str(source), str(tmp_path / "out")]) == 2
    assert "--target is missing" in capsys.readouterr().err
