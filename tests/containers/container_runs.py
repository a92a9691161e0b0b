"""`python -m ci run CELL --env image`, as a person starts it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]


def start(out: Path, cell: str, *args: str, **env: str) -> subprocess.Popen[str]:
    """Start it; ``env`` is added to the environment."""
    line = [sys.executable, "-m", "ci", "run", cell, "--env", "image", "--profile", "tiny"]
    return subprocess.Popen(
        [*line, "--out", str(out), *args],
        cwd=ROOT,
        env={**os.environ, **env},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def end(out: Path, process: subprocess.Popen[str]) -> tuple[int, str, dict[str, Any]]:
    """Wait for it: exit code, output and the cell's result."""
    output, _ = process.communicate()
    (result,) = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return process.returncode, output, result


def run(out: Path, cell: str, *args: str, **env: str) -> tuple[int, str, dict[str, Any]]:
    """:func:`start` and :func:`end`."""
    return end(out, start(out, cell, *args, **env))
