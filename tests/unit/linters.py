"""Linters that are programs of their own: beside this Python, or on the path."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest


def complaints(name: str, files: Sequence[Path], *, package: str) -> str:
    """What the linter prints about ``files``; the test is "not run" where it is not installed."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    program = shutil.which(name, path=path)
    if program is None:
        pytest.skip(f"not run: no {name} (pip install {package})")
    done = subprocess.run(
        [program, *map(str, files)],
        env={**os.environ, "PATH": path},  # actionlint asks shellcheck about the scripts
        capture_output=True,
        text=True,
        check=False,
    )
    said = done.stdout + done.stderr
    return said or (f"exit code {done.returncode}" if done.returncode else "")
