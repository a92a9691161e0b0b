"""Put another draft in the place of the packaged one: for maintainers, in a checkout."""

from __future__ import annotations

import json
import os
import shutil
import struct
from dataclasses import dataclass
from pathlib import Path

from .. import demo
from ..cache import atomic_write_text, locked, staged_dir
from ..checkpoint import read_header
from ..errors import CacheError, CheckpointError, ModelNotFoundError, UsageError
from ..pair import preflight, require
from . import manifest
from .deps import need

MAX_BYTES = 25_000_000
"""Of the weights: they are part of the wheel and of the repository."""


@dataclass(frozen=True)
class Replacement:
    """SHA-256 of the weights before (empty: there were none) and after."""

    folder: Path
    old_sha256: str
    new_sha256: str


def replace_draft(new_folder: Path, *, target: Path | None = None) -> Replacement:
    """Check the draft in ``new_folder`` and put it in the packaged draft's place.

    The folder is exchanged whole, so the old or the new draft is there, never a
    mixture. ``README.md`` (the model card) is taken along; without one a card without
    numbers is written, because the old draft's would be wrong. Prints both hashes.

    Args:
        target: the demo target's folder (None: built if need be).

    Raises:
        CacheError: the package is not writable.
        UsageError: the weights are larger than :data:`MAX_BYTES`.
        ModelNotFoundError, PairMismatchError, CheckpointError: not a draft of the demo
            target, not bf16, or NaN or infinity in the weights.
    """
    _require_writable()
    for name in demo.DRAFT_FILES:
        if not (new_folder / name).is_file():
            raise ModelNotFoundError(
                f"{new_folder / name}: no such file",
                hint="give a folder with config.json and model.safetensors",
            )
    weights = new_folder / "model.safetensors"
    size = weights.stat().st_size
    if size > MAX_BYTES:
        raise UsageError(
            f"{weights}: {size} bytes, expected at most {MAX_BYTES}",
            hint="the packaged draft is part of the wheel; train a smaller one",
        )
    require(preflight(target or demo.demo_target(), new_folder))
    require_finite_bf16(weights)

    old = _sha256(demo.DRAFT)
    with locked("demo-draft", sweep=demo.DRAFT), staged_dir(demo.DRAFT) as staging:
        for name in demo.DRAFT_FILES:
            shutil.copyfile(new_folder / name, staging / name)
        manifest.write(staging, demo.DRAFT_FILES)
        new = _sha256(staging)
        card = new_folder / "README.md"
        if card.is_file():
            shutil.copyfile(card, staging / card.name)
        else:
            atomic_write_text(staging / card.name, _card(new))
    print(f"{demo.DRAFT}: sha256 {old or '(none)'} -> {new}")
    return Replacement(demo.DRAFT, old, new)


def require_finite_bf16(weights: Path) -> None:
    """Raise ``CheckpointError`` naming the first tensor that is not bf16 or not finite."""
    np = need("numpy")
    for name, info in read_header(weights).items():
        if info.dtype != "BF16":
            raise CheckpointError(
                f"{weights}: tensor {name} is {info.dtype}, expected BF16",
                hint="save the draft in bfloat16, as published drafts are",
            )
    with weights.open("rb") as file:
        (length,) = struct.unpack("<Q", file.read(8))
        header = json.loads(file.read(length))
    header.pop("__metadata__", None)
    bits = np.memmap(weights, dtype="<u2", mode="r", offset=8 + length)
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        exponents = bits[start // 2 : end // 2] & 0x7F80
        if (exponents == 0x7F80).any():
            raise CheckpointError(
                f"{weights}: tensor {name} holds NaN or infinity",
                hint="export the draft again from a checkpoint before training diverged",
            )


def _require_writable() -> None:
    for folder in (demo.DRAFT.parent, demo.DRAFT):
        if folder.exists() and not os.access(folder, os.W_OK):
            raise CacheError(
                f"{folder}: not writable",
                hint="work in a checkout that you own, installed with `pip install -e`",
            )


def _sha256(folder: Path) -> str:
    """The weights' hash according to the folder's manifest; empty without one."""
    try:
        return str(manifest.read(folder)["files"]["model.safetensors"]["sha256"])
    except (OSError, ValueError, LookupError, TypeError):
        return ""


def _card(sha256: str) -> str:
    return (
        "# DFlash draft of the demo pair\n\n"
        f"Weights: sha256 `{sha256}`.\n\n"
        "Put here by `dflash-plugin pair replace-demo-draft` from a folder without a model card:\n"
        "nothing is known of its training, licence or acceptance length.\n"
    )
