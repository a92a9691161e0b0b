"""One file patch applied to one text: at the lines it names, with every line as it says."""

from __future__ import annotations

import hashlib

from ..errors import PatchConflictError
from .format import FilePatch, Hunk


def apply_text(file_patch: FilePatch, old_text: str | None) -> str | None:
    """The text of a file after a patch.

    Args:
        old_text: the text before, newlines as they are in the file; None: no such file.

    Returns:
        The new text; None: the patch deletes the file.

    Raises:
        PatchConflictError: it does not apply at the very lines that it names.
    """
    if old_text is None:
        if not file_patch.adds:
            raise PatchConflictError(
                f"{file_patch.patch}: {file_patch.path}: no such file",
                path=file_patch.path,
                hint="the engine's files are not those of its release: reinstall it",
            )
        return "".join(text for hunk in file_patch.hunks for text in hunk.new)
    if file_patch.adds:
        raise PatchConflictError(
            f"{file_patch.patch}: {file_patch.path} is there already, and the patch adds it",
            path=file_patch.path,
            hint="someone else has changed this engine: reinstall it",
        )
    lines = old_text.split("\n")
    lines = [line + "\n" for line in lines[:-1]] + ([lines[-1]] if lines[-1] else [])
    new: list[str] = []
    done = 0
    for number, hunk in enumerate(file_patch.hunks, 1):
        start = hunk.old_start - (hunk.old_lines > 0)
        found = lines[start : start + hunk.old_lines]
        if tuple(found) != hunk.old or start > len(lines):
            raise _conflict(file_patch, number, hunk, start, found)
        new += lines[done:start]
        new += hunk.new
        done = start + hunk.old_lines
    new += lines[done:]
    if not file_patch.deletes:
        return "".join(new)
    if new:
        raise PatchConflictError(
            f"{file_patch.patch}: {file_patch.path} has lines that the patch, which deletes it, "
            f"does not know: {new[0]!r}",
            path=file_patch.path,
        )
    return None


def blob_id(data: bytes) -> str:
    """Git's id of a file with that content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


def _conflict(
    file_patch: FilePatch, number: int, hunk: Hunk, start: int, found: list[str]
) -> PatchConflictError:
    at = next(
        (i for i, (a, b) in enumerate(zip(found, hunk.old, strict=False)) if a != b), len(found)
    )
    expected = hunk.old[at] if at < len(hunk.old) else "the end of the file"
    there = found[at] if at < len(found) else "the end of the file"
    note = " (it has CRLF line ends)" if there == expected[:-1] + "\r\n" else ""
    return PatchConflictError(
        f"{file_patch.patch}: {file_patch.path}: hunk {number} ({hunk}) does not apply at line "
        f"{start + at + 1}: expected {expected!r}, found {there!r}{note}",
        path=file_patch.path,
        hunk=number,
        line=start + at + 1,
        hint="the file is not that of the release the patch is for: reinstall the engine",
    )
