"""Tiny model folders written by hand: no torch, no safetensors package, no meaning."""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dflash_plugin.pair import DraftConfig

WIDTHS = {"BF16": 2, "F32": 4, "U8": 1}
DRAFT = {
    "architectures": ["DFlashDraftModel"],
    "model_type": "qwen3",
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 8,
    "vocab_size": 64,
    "num_target_layers": 4,
    "block_size": 8,
    "dflash_config": {"mask_token_id": 5, "target_layer_ids": [1, 3]},
}
TARGET = {"model_type": "qwen3", "hidden_size": 16, "num_hidden_layers": 4, "vocab_size": 64}
TARGET_TENSORS = {"model.embed_tokens.weight": (64, 16), "model.norm.weight": (16,)}


def header_of(shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16") -> dict[str, Any]:
    """A safetensors header, tensors one after the other."""
    header, at = {}, 0
    for name, shape in shapes.items():
        size = WIDTHS[dtype]
        for dim in shape:
            size *= dim
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    return header


def write_raw(path: Path, header: object, data: bytes | int = b"") -> Path:
    """A file with that JSON (or those bytes) as header; ``data`` may be a count of zeros."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + bytes(data))
    return path


def write_weights(
    path: Path, shapes: Mapping[str, tuple[int, ...]], dtype: str = "BF16", fill: int = 0
) -> Path:
    """A valid file with tensors of those shapes, every byte ``fill``."""
    header = header_of(shapes, dtype)
    size = max((entry["data_offsets"][1] for entry in header.values()), default=0)
    return write_raw(path, header, bytes([fill]) * size)


def write_config(folder: Path, config: object) -> Path:
    """``folder/config.json``; returns the folder."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def draft_json(**changes: Any) -> dict[str, Any]:
    """:data:`DRAFT` changed: ``dflash`` goes into ``dflash_config``; ``...`` removes a key."""
    nested = {**DRAFT["dflash_config"], **changes.pop("dflash", {})}  # type: ignore[dict-item]
    raw = {**DRAFT, "dflash_config": nested, **changes}
    for table in (raw, nested):
        for key in [key for key, value in table.items() if value is ...]:
            del table[key]
    return raw


def parse(raw: Mapping[str, Any]) -> DraftConfig:
    """A draft config as if read from ``draft/config.json``."""
    return DraftConfig.from_dict(raw, Path("draft/config.json"))


def make_draft(folder: Path, **changes: Any) -> Path:
    """A draft whose tensors fit its config, where that can be read."""
    raw = draft_json(**changes)
    write_config(folder, raw)
    write_weights(folder / "model.safetensors", parse(raw).tensor_shapes())
    return folder


def make_target(folder: Path, **changes: Any) -> Path:
    """A target with two tensors."""
    write_config(folder, {**TARGET, **changes})
    write_weights(folder / "model.safetensors", TARGET_TENSORS)
    return folder
