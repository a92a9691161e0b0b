"""Names, dtypes and shapes of a checkpoint, from the safetensors headers alone.

Format: https://huggingface.co/docs/safetensors (8-byte little-endian header
length, JSON header, tensor data). Reading it by hand needs neither torch nor
the safetensors package and no tensor data, so ``doctor`` can look at a 60 GB
target in milliseconds.
"""

from __future__ import annotations

import hashlib
import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import CheckpointError, ModelNotFoundError

_DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
_MAX_HEADER = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class TensorInfo:
    """One tensor as its file's header describes it."""

    dtype: str
    shape: tuple[int, ...]
    file: Path


def _bad(path: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{path}: not a complete safetensors file: {what}",
        hint="download or copy the file again and compare its checksum with the publisher's",
    )


def _unreadable(path: Path, err: OSError) -> CheckpointError:
    return CheckpointError(
        f"{path}: cannot be read ({err.strerror or err})", hint="check its permissions and the disk"
    )


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors of one safetensors file, by name.

    Raises:
        ModelNotFoundError: the file does not exist.
        CheckpointError: the header is unreadable, or the file is shorter or
            longer than the header says.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            prefix = file.read(8)
            if len(prefix) < 8:
                raise _bad(path, f"{size} bytes, expected at least 8")
            (length,) = struct.unpack("<Q", prefix)
            if length > min(_MAX_HEADER, size - 8):
                raise _bad(path, f"header of {length} bytes in a file of {size}")
            raw = file.read(length)
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as err:
        raise ModelNotFoundError(f"{path}: no such file", hint="check the model folder") from err
    except OSError as err:
        raise _unreadable(path, err) from err
    tensors, data = _parse_header(path, raw)
    if 8 + length + data != size:
        raise _bad(path, f"{size} bytes, expected {8 + length + data}")
    return tensors


def _parse_header(path: Path, raw: bytes) -> tuple[dict[str, TensorInfo], int]:
    """The tensors a header lists, and how many bytes of data they have together."""
    try:
        header: Any = json.loads(raw)
    except (ValueError, RecursionError) as err:
        raise _bad(path, f"header is not JSON ({err})") from err
    if not isinstance(header, dict):
        raise _bad(path, "header is not a JSON object")

    tensors: dict[str, TensorInfo] = {}
    spans: list[tuple[int, int, str]] = []
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        try:
            dtype, shape = entry["dtype"], _sizes(entry["shape"])
            start, end = _sizes(entry["data_offsets"])
        except (KeyError, TypeError, ValueError) as err:
            raise _bad(path, f"header entry {name!r} is malformed") from err
        if not isinstance(dtype, str):
            raise _bad(path, f"header entry {name!r} is malformed")
        width = _DTYPE_BYTES.get(dtype)
        if start > end or (width is not None and end - start != math.prod(shape) * width):
            raise _bad(path, f"{name}: offsets {start}..{end} do not fit {dtype}{list(shape)}")
        spans.append((start, end, name))
        tensors[name] = TensorInfo(dtype, shape, path)
    end_of_data = 0
    for start, end, name in sorted(spans):
        if start != end_of_data:  # a hole or an overlap; the format allows neither
            raise _bad(path, f"{name}: data starts at {start}, expected {end_of_data}")
        end_of_data = end
    return tensors, end_of_data


def _sizes(value: Any) -> tuple[int, ...]:
    """A JSON list of natural numbers; ``ValueError`` for anything that only looks like one."""
    if not isinstance(value, list) or not all(type(n) is int and n >= 0 for n in value):
        raise ValueError(value)
    return tuple(value)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a model folder, in order; shards by their index.

    Raises:
        ModelNotFoundError: no weights, or a shard named by the index is missing.
        CheckpointError: the index is not readable.
    """
    if not folder.is_dir():
        raise ModelNotFoundError(
            f"{folder}: no such model folder",
            hint="give a folder that holds config.json and *.safetensors",
        )
    index = folder / "model.safetensors.index.json"
    if index.exists():
        try:
            weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
            names = sorted(set(weight_map.values()))
            if not names or not all(isinstance(name, str) for name in names):
                raise ValueError(names)
        except (ValueError, KeyError, AttributeError, TypeError, RecursionError, OSError) as err:
            raise CheckpointError(
                f"{index}: no readable weight_map", hint="download the file again"
            ) from err
        missing = [name for name in names if not (folder / name).is_file()]
        if missing:
            raise ModelNotFoundError(
                f"{folder}: missing shard(s) named by {index.name}: {', '.join(missing)}",
                hint="finish the download of this model",
            )
        return [folder / name for name in names]
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise ModelNotFoundError(
            f"{folder}: no *.safetensors file", hint="DFlash drafts are published as safetensors"
        )
    return files


def read_tensors(folder: Path) -> dict[str, TensorInfo]:
    """Every tensor of a model folder by name; see :func:`read_header` for errors."""
    tensors: dict[str, TensorInfo] = {}
    for path in weight_files(folder):
        for name, info in read_header(path).items():
            if name in tensors:
                raise CheckpointError(
                    f"{folder}: tensor {name} is in {tensors[name].file.name} and {path.name}",
                    hint="remove the stale file",
                )
            tensors[name] = info
    return tensors


def check_tensors(folder: Path, expected: dict[str, tuple[int, ...]]) -> dict[str, TensorInfo]:
    """Compare a folder's tensors with ``expected`` shapes, by name.

    Returns the tensors found.

    Raises:
        CheckpointError: a tensor is missing, not expected, or misshapen; the
            message names the tensors.
    """
    found = read_tensors(folder)
    missing = sorted(set(expected) - set(found))
    extra = sorted(set(found) - set(expected))
    wrong = [
        f"{name} is {list(found[name].shape)}, expected {list(shape)}"
        for name, shape in sorted(expected.items())
        if name in found and found[name].shape != shape
    ]
    problems = []
    if missing:
        problems.append("missing: " + _few(missing))
    if extra:
        problems.append("not expected: " + _few(extra))
    if wrong:
        problems.append("misshapen: " + _few(wrong))
    if problems:
        raise CheckpointError(
            f"{folder}: tensors do not match its config.json; " + "; ".join(problems),
            hint="use the weights and the config.json of one and the same revision",
        )
    return found


def _few(names: list[str], most: int = 4) -> str:
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def sha256_file(path: Path, progress: Callable[[int], object] | None = None) -> str:
    """SHA-256 of a file, hex; ``progress`` is told the bytes of each chunk read."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
            if progress is not None:
                progress(len(chunk))
    return digest.hexdigest()
