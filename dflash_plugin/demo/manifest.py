"""``manifest.json``: size and SHA-256 of each file of a model folder, written by a program."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from ..cache import atomic_write_text
from ..checkpoint import sha256_file

NAME = "manifest.json"


def write(folder: Path, names: Iterable[str], **facts: Any) -> None:
    """Write ``folder/manifest.json`` over the files ``names``, with ``facts`` at its top."""
    files = {
        name: {"sha256": sha256_file(folder / name), "size": (folder / name).stat().st_size}
        for name in sorted(names)
    }
    atomic_write_text(folder / NAME, json.dumps({**facts, "files": files}, indent=2) + "\n")


def problem(folder: Path, names: Iterable[str], *, full: bool = False, **facts: Any) -> str:
    """What is wrong with ``folder``, in a few words; empty if nothing is.

    Args:
        names: the files that must be there, as the manifest describes them.
        full: compare SHA-256 too, not only sizes (reads every byte).
        facts: what the manifest's top must say.
    """
    return next(_problems(folder, names, full, facts), "")


def _problems(
    folder: Path, names: Iterable[str], full: bool, facts: Mapping[str, Any]
) -> Iterator[str]:
    try:
        manifest = read(folder)
        files = {name: manifest["files"][name] for name in names}
        expected = {name: (int(f["size"]), str(f["sha256"])) for name, f in files.items()}
    except FileNotFoundError:
        yield f"no {NAME}"
        return
    except (OSError, ValueError, LookupError, TypeError):
        yield f"{NAME} is damaged"
        return
    for key, value in facts.items():
        if manifest.get(key) != value:
            yield f"{NAME} has {key} {manifest.get(key)!r}, expected {value!r}"
    for name, (size, sha256) in expected.items():
        path = folder / name
        found = path.stat().st_size if path.is_file() else None
        if found is None:
            yield f"{name} is missing"
        elif found != size:
            yield f"{name} has {found} bytes, expected {size}"
        elif full and sha256_file(path) != sha256:
            yield f"{name} is not what was written: its sha256 differs"


def read(folder: Path) -> Mapping[str, Any]:
    """The parsed manifest; raises what ``open`` and ``json`` raise."""
    found = json.loads((folder / NAME).read_text(encoding="utf-8"))
    if not isinstance(found, dict):
        raise ValueError(f"{NAME} is not a JSON object")
    return found


def hashes(folder: Path) -> dict[str, str]:
    """SHA-256 by file name; raises what :func:`read` raises."""
    return {name: entry["sha256"] for name, entry in read(folder)["files"].items()}
