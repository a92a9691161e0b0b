"""Offline rules for ``.github/workflows``: what is run there is pinned, and may do little."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

FOLDER = Path(".github/workflows")
_USES = re.compile(r"^\s*(?:-\s+)?uses:\s*(?P<what>\S+)\s*(?P<comment>#.*)?$")
_PINNED = re.compile(r"[\w.-]+/[\w./-]+@[0-9a-f]{40}")
_VERSION = re.compile(r"#\s*v\d+(\.\d+)*\s*")


def problems(root: Path) -> list[str]:
    """Every problem found, one line each; empty when all is well."""
    found: list[str] = []
    for path in sorted((root / FOLDER).glob("*.y*ml")):
        name = path.relative_to(root).as_posix()
        lines = path.read_text(encoding="utf-8").splitlines()
        found += [f"{name}:{problem}" for problem in _unpinned(lines)]
        for key in ("permissions:", "concurrency:"):
            if not any(line.startswith(key) for line in lines):
                found.append(f"{name}: no top-level {key[:-1]}")
    return found


def _unpinned(lines: list[str]) -> Iterator[str]:
    """Actions that are not `owner/name@<commit> # v1.2.3`; those of this repository may be."""
    for number, line in enumerate(lines, 1):
        if not re.match(r"\s*(-\s+)?uses\s*:", line):
            continue
        match = _USES.match(line)
        what = match["what"] if match else line.strip()
        if what.startswith("./"):
            continue
        if not _PINNED.fullmatch(what):
            yield f"{number}: {what} is not pinned by a commit"
        elif not _VERSION.fullmatch((match and match["comment"]) or ""):
            yield f"{number}: {what} has no version beside it (# v1.2.3)"
