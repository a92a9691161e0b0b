"""Offline checks of ``patches/``: every file is listed, readable, small, and up to date."""

from __future__ import annotations

from pathlib import Path

from dflash_plugin import patchset, shims
from dflash_plugin.errors import DFlashError
from dflash_plugin.patchset import Patch

from . import patch_files
from .patch_files import Repairs

CONTEXT = 3
"""Lines on either side of a change, as git writes them; fewer only at the ends of a file."""
MAX_LINES = 120
"""Of one patch file: new code belongs into ``dflash_plugin``, and the patch calls it."""
_REFRESH = "python -m ci patches --write"


def problems(root: Path | None = None) -> list[str]:
    """Every problem of the patch sets below ``root``, one line each."""
    root = root or patch_files.ROOT
    try:
        repairs = {engine: patch_files.read(engine, root) for engine in patch_files.ENGINES}
    except DFlashError as err:
        return [err.message]
    wanted = {
        (engine, version, variant)
        for engine, of_engine in repairs.items()
        for version, variant, _ in of_engine.sets()
    }
    there = set(patchset.available(root))
    found = [f"patches/{'/'.join(one)}: missing: {_REFRESH}" for one in sorted(wanted - there)]
    found += [
        f"patches/{'/'.join(one)}: not asked for by repairs.toml: remove it, or list its release"
        for one in sorted(there - wanted)
    ]
    for engine, version, variant in sorted(there):
        found += _set_problems(root, engine, version, variant, repairs.get(engine))
    folders = {root.joinpath(*one) for one in there}
    known = {root / "README.md", *(root / engine / "repairs.toml" for engine in repairs)}
    found += [
        f"patches/{path.relative_to(root)}: in no set (a set is a folder with a series)"
        for path in sorted(root.rglob("*"))
        if path.is_file() and path.parent not in folders and path not in known
    ]
    return found


def _set_problems(
    root: Path, engine: str, version: str, variant: str, repairs: Repairs | None
) -> list[str]:
    folder = root / engine / version / variant
    where = f"patches/{engine}/{version}/{variant}"
    try:
        one = patchset.load(root, engine, version, variant)
    except DFlashError as err:
        return [f"{where}: {err.message}"]
    names = {patch.name for patch in one.patches}
    found = [
        f"{where}/{path.name}: not listed in the series"
        for path in sorted(folder.iterdir())
        if path.name not in {*names, "series"}
    ]
    for patch in one.patches:
        found += [f"{where}/{patch.name}: {what}" for what in patch_problems(patch, engine)]
    if repairs is not None:
        expected = repairs.of(version, variant)
        if [repair.file for repair in expected] != [patch.name for patch in one.patches]:
            found.append(f"{where}/series: not the order of support.py: {_REFRESH}")
        messages = {r.file: patch_files.message(r, shims.load(r.shim)) for r in expected}
        found += [
            f"{where}/{patch.name}: text or fields are not those of repairs.toml and the shim: "
            f"{_REFRESH}"
            for patch in one.patches
            if messages.get(patch.name, patch.message) != patch.message
        ]
    return found


def patch_problems(patch: Patch, engine: str) -> list[str]:
    """What is wrong with one patch that was read, of an engine."""
    found = []
    lines = patch.text.count("\n")
    if lines > MAX_LINES:
        found.append(f"{lines} lines, at most {MAX_LINES}: move code into dflash_plugin")
    if not patch.replaces_shims:
        found.append("replaces no shim, so nothing tells when it is to go")
    found += [
        f"replaces shim {name!r}, which there is not"
        for name in patch.replaces_shims
        if name not in shims.names(engine)
    ]
    for file in patch.files:
        for number, hunk in enumerate(file.hunks, 1):
            tags = "".join(tag for tag, _ in hunk.lines)
            before, after = (len(t) - len(t.lstrip(" ")) for t in (tags, tags[::-1]))
            # Fewer lines come before a change only at the head of a file, after it at its end.
            if max(before, after) < CONTEXT or (before < CONTEXT and hunk.old_start > 1):
                found.append(
                    f"{file.path} hunk {number}: {before} and {after} lines of context, "
                    f"expected {CONTEXT}"
                )
    return found
