"""Replacing the packaged draft: all of the checks, and old or new but never a mixture."""

from __future__ import annotations

import errno
import json
import os
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest

from dflash_plugin import demo
from dflash_plugin.demo import manifest, replace
from dflash_plugin.errors import (
    CacheError,
    CheckpointError,
    ModelNotFoundError,
    PairMismatchError,
    UsageError,
)
from dflash_plugin.pair import DraftConfig

CONFIG = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 64,
    "num_target_layers": 4,
    "block_size": 8,
    "dflash_config": {"mask_token_id": 5, "target_layer_ids": [1, 3]},
}
TARGET = {"model_type": "llama", "hidden_size": 16, "num_hidden_layers": 4, "vocab_size": 64}
NAN, INF = 0x7FC0, 0xFF80  # bf16


def save(path: Path, tensors: dict[str, np.ndarray], dtype: str = "BF16") -> None:
    header, body = {}, b""
    for name, values in tensors.items():
        raw = values.tobytes()
        offsets = [len(body), len(body) + len(raw)]
        header[name] = {"dtype": dtype, "shape": list(values.shape), "data_offsets": offsets}
        body += raw
    text = json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + body)


def tensors(seed: int, dtype: str = "<u2") -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    shapes = DraftConfig.from_dict(CONFIG, Path("config.json")).tensor_shapes()
    return {name: rng.integers(0, 0x3F80, shape, dtype) for name, shape in shapes.items()}


def make_draft(folder: Path, seed: int, **changes: object) -> Path:
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(CONFIG | changes))
    save(folder / "model.safetensors", tensors(seed))
    return folder


@pytest.fixture
def target(tmp_path) -> Path:
    folder = tmp_path / "target"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(TARGET))
    save(folder / "model.safetensors", {"model.norm.weight": np.ones(16, "<u2")})
    return folder


@pytest.fixture
def packaged(tmp_path, monkeypatch) -> Path:
    """A packaged draft of its own, so that the real one stays."""
    monkeypatch.setenv("DFLASH_CACHE", str(tmp_path / "cache"))
    (tmp_path / "package").mkdir()
    folder = make_draft(tmp_path / "package" / "draft", seed=1)
    manifest.write(folder, demo.DRAFT_FILES)
    (folder / "README.md").write_text("old card")
    monkeypatch.setattr(demo, "DRAFT", folder)
    return folder


@pytest.fixture
def new(tmp_path) -> Path:
    return make_draft(tmp_path / "new", seed=2)


def files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_replaces_and_prints_both_hashes(packaged, new, target, capsys):
    old_sha256 = manifest.read(packaged)["files"]["model.safetensors"]["sha256"]
    done = replace.replace_draft(new, target=target)
    assert demo.packaged_draft(verify=True) == packaged
    for name in demo.DRAFT_FILES:
        assert (packaged / name).read_bytes() == (new / name).read_bytes()
    assert done.old_sha256 == old_sha256
    assert done.new_sha256 != old_sha256
    assert f"{old_sha256} -> {done.new_sha256}" in capsys.readouterr().out
    assert [path.name for path in packaged.parent.iterdir()] == ["draft"]


def test_model_card_comes_along_or_says_that_there_is_none(packaged, new, target):
    done = replace.replace_draft(new, target=target)
    card = (packaged / "README.md").read_text()
    assert "old card" not in card
    assert done.new_sha256 in card
    (new / "README.md").write_text("new card")
    replace.replace_draft(new, target=target)
    assert (packaged / "README.md").read_text() == "new card"


def test_damaged_or_absent_packaged_draft_can_be_replaced(packaged, new, target):
    shutil.rmtree(packaged)
    assert replace.replace_draft(new, target=target).old_sha256 == ""
    assert demo.packaged_draft(verify=True)


def test_packaged_draft_can_be_put_in_its_own_place(packaged, target):
    before = files(packaged)
    replace.replace_draft(packaged, target=target)
    assert files(packaged) == before


def poison(bits: int, dtype: str = "BF16"):
    def change(folder: Path) -> None:
        broken = tensors(2)
        broken["layers.0.mlp.up_proj.weight"][3, 3] = bits
        save(folder / "model.safetensors", broken, dtype)

    return change


def config(**changes: object):
    return lambda folder: (folder / "config.json").write_text(json.dumps(CONFIG | changes))


def without_tensor(folder: Path) -> None:
    save(folder / "model.safetensors", dict(list(tensors(2).items())[1:]))


def cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-2])


@pytest.mark.parametrize(
    "case",
    [
        (poison(NAN), CheckpointError, "layers.0.mlp.up_proj.weight holds NaN"),
        (poison(INF), CheckpointError, "layers.0.mlp.up_proj.weight holds NaN or infinity"),
        (poison(0, "F16"), CheckpointError, "is F16, expected BF16"),
        (without_tensor, CheckpointError, "missing: fc.weight"),
        (cut, CheckpointError, "not a complete safetensors file"),
        (config(hidden_size=32), CheckpointError, "misshapen"),
        (config(vocab_size=65), PairMismatchError, "vocab_size is 65"),
        (config(num_target_layers=5), PairMismatchError, "num_target_layers is 5"),
        (
            config(dflash_config={"mask_token_id": 64, "target_layer_ids": [1, 3]}),
            PairMismatchError,
            "mask_token_id is 64",
        ),
        (config(dflash_config=None), PairMismatchError, "no dflash_config"),
        (lambda folder: (folder / "config.json").unlink(), ModelNotFoundError, "config.json"),
        (
            lambda folder: (folder / "model.safetensors").unlink(),
            ModelNotFoundError,
            "model.safetensors",
        ),
    ],
)
def test_unfit_draft_is_refused_and_the_old_one_stays(packaged, new, target, case):
    change, error, named = case
    before = files(packaged)
    change(new)
    with pytest.raises(error) as caught:
        replace.replace_draft(new, target=target)
    assert named in caught.value.message
    assert files(packaged) == before


def test_size_limit(packaged, new, target, monkeypatch):
    size = (new / "model.safetensors").stat().st_size
    monkeypatch.setattr(replace, "MAX_BYTES", size)
    replace.replace_draft(new, target=target)
    monkeypatch.setattr(replace, "MAX_BYTES", size - 1)
    with pytest.raises(UsageError, match=f"{size} bytes, expected at most {size - 1}"):
        replace.replace_draft(new, target=target)


def test_packaged_draft_is_within_the_limit():
    assert (demo.DRAFT / "model.safetensors").stat().st_size <= replace.MAX_BYTES


@pytest.mark.parametrize("which", ["draft", "package"])
def test_read_only_package_is_refused_before_anything_else(packaged, new, monkeypatch, which):
    protected = packaged if which == "draft" else packaged.parent
    monkeypatch.setattr(os, "access", lambda path, _mode: path != protected)
    monkeypatch.setattr(demo, "demo_target", lambda: pytest.fail("built the target"))
    with pytest.raises(CacheError, match="not writable") as caught:
        replace.replace_draft(new)
    assert "checkout" in caught.value.hint


@pytest.mark.parametrize(
    "raised", [KeyboardInterrupt(), OSError(errno.ENOSPC, "No space left on device")]
)
def test_failing_half_way_keeps_the_old_draft(packaged, new, target, monkeypatch, raised):
    expected = CacheError if isinstance(raised, OSError) else KeyboardInterrupt
    before = files(packaged)
    copy = shutil.copyfile

    def fail_at_weights(source, to):
        if Path(to).suffix == ".safetensors":
            raise raised
        return copy(source, to)

    monkeypatch.setattr(shutil, "copyfile", fail_at_weights)
    with pytest.raises(expected):
        replace.replace_draft(new, target=target)
    assert files(packaged) == before
    assert [path.name for path in packaged.parent.iterdir()] == ["draft"]
