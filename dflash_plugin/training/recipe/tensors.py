"""Safetensors files that are whole or not there."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ...cache import make_dir
from ...errors import CheckpointError, from_os_error

_FACTS = "facts"
_OS_ERROR = re.compile(r"os error (\d+)")


def save(path: Path, tensors: Mapping[str, Tensor], facts: Mapping[str, Any]) -> None:
    """Write ``path`` beside its place, then move it there.

    Raises:
        CacheError: disk full, no permission; ``path`` is as it was.
    """
    make_dir(path.parent)
    temp = path.with_name(f".{path.name}.tmp")
    whole = {name: value.contiguous() for name, value in tensors.items()}
    try:
        save_file(whole, temp, metadata={_FACTS: json.dumps(facts)})
        temp.replace(path)
    except (OSError, SafetensorError) as err:
        temp.unlink(missing_ok=True)
        code = _OS_ERROR.search(str(err))
        known = err if isinstance(err, OSError) else OSError(int(code[1]) if code else 0, str(err))
        if code and not isinstance(err, OSError):
            known = OSError(int(code[1]), os.strerror(int(code[1])))
        raise from_os_error(known, str(path)) from err
    except BaseException:
        temp.unlink(missing_ok=True)
        raise


def facts(path: Path) -> dict[str, Any]:
    """What was told of a file when it was saved.

    Raises:
        CheckpointError: it is not there, cut off or damaged.
    """
    with opened(path) as file:
        found: dict[str, Any] = json.loads((file.metadata() or {}).get(_FACTS, "{}"))
    return found


def load(path: Path) -> dict[str, Tensor]:
    """Every tensor; raises ``CheckpointError``."""
    with opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)


def opened(path: Path) -> Any:
    """An open file, mapped into memory; raises ``CheckpointError``."""
    try:
        return safe_open(path, "pt")
    except (OSError, SafetensorError) as err:
        raise CheckpointError(
            f"{path}: not readable ({err})", hint="delete it and run its stage again"
        ) from err
