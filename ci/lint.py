"""Offline checks of the data in this repository: seconds, no engine, no network."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

from dflash_plugin import matrix
from dflash_plugin.errors import DFlashError

from . import images_cli, lock, patch_lint, report, workflows

ROOT = Path(__file__).parents[1]
_MACHINE_PATH = re.compile(r"(?<![\w.])/(?:home/\w+|root|work|tmp|opt)/[\w.-]+")
MAX_LINES = 450


def problems() -> list[str]:
    """Every problem found, one line each; empty when all is well."""
    return [
        *_matrix(),
        *_locks(),
        *_readme(),
        *patch_lint.problems(ROOT / "patches"),
        *images_cli.problems(ROOT),
        *workflows.problems(ROOT),
        *_files(),
    ]


def _matrix() -> list[str]:
    try:
        data = matrix.load()
    except DFlashError as err:
        return [err.message]
    return [
        f"{data.path.name}: {engine.id} {build.platform}: no lock {build.lock}"
        for engine in data.engines.values()
        for build in engine.builds.values()
        if build.lock and not (lock.LOCKS / build.lock).exists()
    ]


def _locks() -> list[str]:
    return [p for path in sorted(lock.LOCKS.glob("*.txt")) for p in lock.lock_problems(path)]


def _readme() -> list[str]:
    try:
        fresh = report.readme(
            matrix.load(), check=True, path=ROOT / "README.md", root=ROOT / "docs" / "results"
        )
    except (DFlashError, OSError) as err:
        return [str(err)]
    return [] if fresh else ["README.md: support table is stale: python -m ci report --readme"]


def _files() -> list[str]:
    found = []
    command = ["git", "ls-files", "-z"]
    try:
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError) as err:
        return [f"{ROOT}: git ls-files failed, so no file was looked at ({err})"]
    for name in filter(None, listed.stdout.split("\0")):
        path = ROOT / name
        if path.suffix not in {
            ".py",
            ".toml",
            ".md",
            ".yml",
            ".json",
            ".jsonl",
            ".txt",
            ".patch",
            ".Dockerfile",
            ".hcl",
            ".sh",
            "",
        }:
            continue
        try:
            lines = path.read_text(encoding="utf-8").splitlines()
        except (UnicodeDecodeError, FileNotFoundError, IsADirectoryError):
            continue
        if path.suffix == ".py" and not name.startswith("tests/") and len(lines) > MAX_LINES:
            found.append(f"{name}: {len(lines)} lines, at most {MAX_LINES}")
        for number, line in enumerate(lines, 1):
            if _MACHINE_PATH.search(line):
                found.append(f"{name}:{number}: a path of one machine: {line.strip()[:80]}")
    return found
