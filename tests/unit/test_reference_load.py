"""What the reference's draft loader refuses, and that it says what is wrong."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("safetensors")

from reference_helpers import HIDDEN, VOCAB, draft_json, make_draft, save_draft  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from dflash_plugin.errors import (  # noqa: E402
    CheckpointError,
    ModelNotFoundError,
    PairMismatchError,
)
from dflash_plugin.reference.model import DraftModel  # noqa: E402

pytestmark = pytest.mark.torch

SHARED = torch.zeros(VOCAB, HIDDEN)
Q_PROJ = "layers.1.self_attn.q_proj.weight"


def load(folder: Path) -> DraftModel:
    return DraftModel.load(folder, SHARED, SHARED, dtype=torch.float64)


def rewrite(folder: Path, **tensors: Any) -> None:
    path = folder / "model.safetensors"
    weights = load_file(path)
    for name, tensor in tensors.items():
        weights.pop(name, None)
        if tensor is not None:
            weights[name] = tensor
    save_file(weights, path)


def test_weights_arrive_unchanged(tmp_path: Path) -> None:
    folder = save_draft(tmp_path / "draft", attention_bias=True)
    draft = load(folder)
    saved = load_file(folder / "model.safetensors")
    assert draft._weights.keys() == saved.keys()
    assert all(torch.equal(draft._weights[name], saved[name]) for name in saved)
    assert draft.max_speculative_tokens == 5


def test_sharded_draft(tmp_path: Path) -> None:
    folder = save_draft(tmp_path / "draft")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    index = {}
    for number, part in enumerate((names[:9], names[9:])):
        file = f"model-{number}.safetensors"
        save_file({name: weights[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert load(folder)._weights.keys() == weights.keys()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({Q_PROJ: None}, f"missing: {Q_PROJ}"),
        ({"lm_head.weight": torch.zeros(2, 2)}, "not expected: lm_head.weight"),
        ({Q_PROJ: torch.zeros(64, 65)}, rf"misshapen: {Q_PROJ} is \[64, 65\], expected"),
        ({Q_PROJ: torch.zeros(64, 64, dtype=torch.int8)}, f"{Q_PROJ} is torch.int8"),
        ({"layers.0.self_attn.q_proj.bias": torch.zeros(64)}, "not expected: layers.0"),
    ],
)
def test_tensors_are_refused_by_name(tmp_path: Path, change: Any, message: str) -> None:
    folder = save_draft(tmp_path / "draft")
    rewrite(folder, **change)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize("keep", [0, 4, 100, 20_000])
def test_truncated_file(tmp_path: Path, keep: int) -> None:
    path = save_draft(tmp_path / "draft") / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: not a complete"):
        load(path.parent)


def test_missing_folder_and_weights(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="nowhere"):
        load(tmp_path / "nowhere")
    folder = save_draft(tmp_path / "draft")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelNotFoundError, match="safetensors"):
        load(folder)


@pytest.mark.parametrize(
    ("change", "field"),
    [
        ({"hidden_act": "relu"}, "hidden_act"),
        ({"draft_vocab_size": 32}, "draft_vocab_size"),
        ({"is_neox_style": False}, "is_neox_style"),
        ({"dflash": {"attention_sink_bias": True}}, "attention_sink_bias"),
        ({"dflash": {"add_swa_attention_sink_bias": True}}, "add_swa_attention_sink_bias"),
        ({"dflash": {"use_aux_hidden_state": False}}, "use_aux_hidden_state"),
        ({"rope_scaling": {"rope_type": "longrope"}}, "rope_parameters.rope_type"),
        ({"rope_scaling": {"rope_type": "linear"}}, "rope_parameters.factor"),
        ({"rope_scaling": {"rope_type": "linear", "factor": 0}}, "rope_parameters.factor"),
        ({"rope_parameters": {"mrope_section": [1]}}, "rope_parameters.mrope_section"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        (
            {
                "rope_parameters": {
                    "rope_type": "llama3",
                    "factor": 8.0,
                    "low_freq_factor": 4.0,
                    "high_freq_factor": 4.0,
                }
            },
            "high_freq_factor",
        ),
    ],
)
def test_options_it_does_not_implement(change: dict[str, Any], field: str) -> None:
    with pytest.raises(PairMismatchError, match=field):
        make_draft(SHARED, SHARED, **change)


def test_stated_defaults_are_fine() -> None:
    make_draft(
        SHARED,
        SHARED,
        draft_vocab_size=VOCAB,
        is_neox_style=True,
        dflash={"use_aux_hidden_state": True, "attention_sink_bias": False},
        rope_parameters={"partial_rotary_factor": 1.0},
    )


@pytest.mark.parametrize("which", ["embedding", "head"])
def test_target_of_another_size(which: str) -> None:
    sizes = {"embedding": SHARED, "head": SHARED, which: torch.zeros(VOCAB + 1, HIDDEN)}
    with pytest.raises(PairMismatchError, match=which):
        make_draft(sizes["embedding"], sizes["head"])


@pytest.mark.parametrize("k", [0, -1, 6])
def test_block_has_no_room(k: int) -> None:
    draft = make_draft(SHARED, SHARED)
    with pytest.raises(PairMismatchError, match=r"expected 1\.\.5"):
        draft.draft_logits(draft.new_cache(), 1, k)


def test_config_names_the_file(tmp_path: Path) -> None:
    folder = tmp_path / "draft"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(draft_json(hidden_act="relu")))
    with pytest.raises(PairMismatchError, match=r"config\.json: hidden_act is 'relu'"):
        load(folder)
