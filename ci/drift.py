"""How patches fare on newer releases: which still apply, and which are to be refreshed or go.

Text alone does not tell: a patch whose context is unchanged may stand by a definition that is
not. So each row also has what the shim says of the newer sources (its fingerprints).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from packaging.version import Version

from dflash_plugin import patchset, shims, support
from dflash_plugin.errors import PatchConflictError, UsageError, VerdictFailedError
from dflash_plugin.patchset import FilePatch, Hunk, Patch
from dflash_plugin.shims import sources

from . import patch_files
from .engine_sources import Tree, trees

APPLIES, ELSEWHERE, UPSTREAMED, CONFLICTS = (
    "applies",
    "applies elsewhere",
    "upstreamed",
    "conflicts",
)


@dataclass(frozen=True)
class Row:
    """One patch on one newer release.

    ``hunk``: the first that does not apply as it stands, and how. ``sources``: what the shim
    does not know there. ``work``: nobody has done yet what the suggestion says.
    """

    patch: str
    set: str
    release: str
    status: str
    hunk: str
    sources: tuple[str, ...]
    work: bool
    suggestion: str


def run(chosen: Sequence[tuple[str, str, str]], *, to: str | None, as_json: bool) -> int:
    """``python -m ci patches --drift``: the report; 1 if a newer release needs work.

    Args:
        chosen: (engine, release, variant) of each set.
        to: the release to hold them against; None: each against the next that is at hand.
    """
    rows: list[Row] = []
    for engine, version, variant in chosen:
        tree = _newer(engine, version, to)
        if tree is not None:
            one = patchset.load(patch_files.ROOT, engine, version, variant)
            rows += report(one.patches, tree, one.id)
    if not rows:
        raise UsageError(
            "no newer release is at hand, so nothing was compared",
            hint="python -m ci patches --drift --fetch --to VERSION gets those of a release",
        )
    if as_json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        print(*table(rows), sep="\n")
    open_rows = [row for row in rows if row.work]
    if open_rows:
        raise VerdictFailedError(
            f"{len(open_rows)} of {len(rows)} patches want a person", hint="see the suggestions"
        )
    return 0


def report(patches: Sequence[Patch], tree: Tree, name: str) -> list[Row]:
    """The rows of one set on a newer release, in the order of application.

    Every patch is put in as far as that goes: the next one may stand on it.
    """
    read = sources.installed(tree.site)
    texts: dict[str, str | None] = {}
    rows = []
    for patch in patches:
        for file in patch.files:
            path = tree.site / file.path
            if file.path not in texts:
                texts[file.path] = path.read_bytes().decode() if path.is_file() else None
        status, hunk, after = place(patch, texts)
        texts |= after
        unknown = tuple(
            line for shim in patch.replaces_shims for line in sources.differences(
                shims.load(shim), read)
        )  # fmt: skip
        needed = _needed(patch, tree)
        if needed is False:
            status = UPSTREAMED
        rows.append(
            Row(patch.name, name, tree.version, status, hunk, () if needed is False else unknown,
                *_suggestion(patch, tree, status, unknown, needed))
        )  # fmt: skip
    return rows


def place(patch: Patch, texts: Mapping[str, str | None]) -> tuple[str, str, dict[str, str | None]]:
    """(status, the first hunk that does not apply as it stands, the texts afterwards)."""
    status, told = APPLIES, ""
    after: dict[str, str | None] = {}
    for file in patch.files:
        text = texts[file.path]
        try:
            after[file.path] = patchset.apply_text(file, text)
            continue
        except PatchConflictError as err:
            told = told or err.message
        if text is not None and not file.adds and _all(text, [h.new for h in file.hunks]):
            status = UPSTREAMED if status in (APPLIES, UPSTREAMED) else status
            continue
        moved = None if text is None or file.adds else elsewhere(file, text)
        if moved is None:
            return CONFLICTS, told, {}
        status = ELSEWHERE
        after[file.path] = patchset.apply_text(moved, text)
    return status, told, after


def elsewhere(file: FilePatch, text: str) -> FilePatch | None:
    """The same hunks at the one place each where their old lines are; None: not one place."""
    lines = text.splitlines(keepends=True)
    hunks: list[Hunk] = []
    shift = 0
    for hunk in file.hunks:
        found = _places(lines, hunk)
        if len(found) != 1 or (hunks and found[0] < hunks[-1].old_start + hunks[-1].old_lines):
            return None
        hunks.append(replace(hunk, old_start=found[0], new_start=found[0] + shift))
        shift += hunk.new_lines - hunk.old_lines
    return replace(file, hunks=tuple(hunks))


def _places(lines: Sequence[str], hunk: Hunk) -> list[int]:
    """The line numbers, from 1, at which a hunk's old lines begin."""
    old = list(hunk.old)
    tags = [tag for tag, _ in hunk.lines]
    last = len(lines) - len(old)
    # Without context below it, it stands at the end of the file.
    candidates = range(last + 1) if tags[-1] == " " else range(max(last, 0), last + 1)
    return [at + 1 for at in candidates if list(lines[at : at + len(old)]) == old]


def _all(text: str, blocks: Sequence[Sequence[str]]) -> bool:
    return all("".join(block) in text for block in blocks)


def _needed(patch: Patch, tree: Tree) -> bool | None:
    """Whether ``support`` still has the difference in that release; None: an unknown release."""
    base = Version(tree.version)
    rows = support.differences(tree.engine)
    if base > max(Version(row.last) for row in rows):
        return None
    there = {row.shim for row in rows if Version(row.first) <= base <= Version(row.last)}
    return any(shim in there for shim in patch.replaces_shims)


def _suggestion(
    patch: Patch, tree: Tree, status: str, unknown: Sequence[str], needed: bool | None
) -> tuple[bool, str]:
    """Whether a person is needed, and what for; or what was done for that release already."""
    if needed is False:
        return False, f"remove it: support.py has no such difference in {tree.version}"
    if status == UPSTREAMED:
        return True, f"remove it: end the shim's range in support.py before {tree.version}"
    if unknown:
        return True, (
            f"read what changed, then give shim {', '.join(patch.replaces_shims)} the new "
            "fingerprint, or end its range in support.py"
        )
    if needed is None:
        return True, f"list {tree.version} in support.py and repairs.toml, then --write"
    return False, "keep it: the shim knows these sources; --write finds the new lines"


def _newer(engine: str, version: str, to: str | None) -> Tree | None:
    wanted = [tree for tree in trees(engine, to) if Version(tree.version) > Version(version)]
    return wanted[0] if wanted else None


def table(rows: Sequence[Row]) -> list[str]:
    """For people."""
    width = max(len(row.patch) for row in rows)
    lines = []
    for row in rows:
        lines.append(f"{row.set:20} -> {row.release:8} {row.patch:{width}}  {row.status}")
        if row.status == CONFLICTS or row.work:
            lines += [f"    {line}" for line in (row.hunk, *row.sources) if line]
        if row.status != APPLIES or row.work:
            lines.append(f"    {row.suggestion}")
    return lines
