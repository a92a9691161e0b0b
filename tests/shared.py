"""Material of the workplace that is not part of the repository: found, or the test is skipped."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def shared_file(name: str) -> Path:
    """``name`` below ``$DFLASH_SHARED`` or ``shared/`` beside the repository; else skip."""
    stated = os.environ.get("DFLASH_SHARED")
    folders = [Path(stated)] if stated else [ROOT.parent / "shared"]
    for folder in folders:
        if (folder / name).is_file():
            return folder / name
    pytest.skip(f"{name} is in none of {', '.join(map(str, folders))}; set DFLASH_SHARED")
