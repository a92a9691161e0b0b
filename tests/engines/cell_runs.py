"""One run of the harness, as the tests of real cells look at it."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
ENGINE = "vllm-0.32.0"


@dataclass(frozen=True)
class CellRun:
    """One finished `python -m ci` command: its exit code, output and first result."""

    exit_code: int
    output: str
    out: Path
    result: dict


def harness(out: Path, command: str, *args: str) -> CellRun:
    """Run the harness as a user would, in a process of its own."""
    line = [sys.executable, "-m", "ci", command, *args, "--out", str(out)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    results = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return CellRun(done.returncode, done.stdout + done.stderr, out, results[0])
