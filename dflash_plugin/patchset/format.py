"""The patch files accepted here: ``git format-patch`` output with DEP-3 fields, read strictly.

A file is what this prints for one commit::

    git format-patch --zero-commit --full-index --no-renames --no-signature -N

in ASCII up to the first ``diff --git``, the paths those of a wheel (``vllm/…``, ``sglang/…``). The
last paragraph of the commit's message holds the fields of :data:`FIELDS`; a line that begins with
a blank continues the one above it. Of what git can express only this is accepted: text files
(UTF-8, LF) that are modified, added or deleted; no rename, copy, binary file or change of mode.

An own reader, because being strict is its purpose: unidiff 1.0 and whatthepatch 1.0 accept hunks
whose line numbers do not add up, carriage returns, text after the last hunk, and `..` in paths.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import date
from email.utils import parsedate_to_datetime
from types import MappingProxyType

from ..errors import PatchError

FIELDS: Mapping[str, bool] = MappingProxyType(
    {
        "Origin": True,
        "Bug": True,
        "Forwarded": True,
        "Applied-Upstream": True,
        "Last-Update": True,
        "Removal-Condition": True,
        "Effect": True,
        "Replaces-Shim": False,
    }
)
"""Field name -> whether every patch needs it. The first five are DEP-3's."""

NO_BLOB = "0" * 40
FROM_LINE = f"From {NO_BLOB} Mon Sep 17 00:00:00 2001"
SUBJECT = "Subject: [PATCH] "
MAX_SUBJECT = 78 - len(SUBJECT)
"""Longer subjects are folded by git, and are not read here."""

_HUNK = re.compile(r"@@ -(\d+)(?:,(\d+))? \+(\d+)(?:,(\d+))? @@(?: (.*))?")
_INDEX = re.compile(r"index ([0-9a-f]{40})\.\.([0-9a-f]{40})(?: (100644|100755))?")
_FIELD = re.compile(r"([A-Z][A-Za-z]*(?:-[A-Z][A-Za-z]*)*): (\S.*)")
_NO_NEWLINE = "\\ No newline at end of file"
_UNSUPPORTED = (
    "old mode",
    "new mode",
    "similarity index",
    "dissimilarity index",
    "rename ",
    "copy ",
    "Binary files",
    "GIT binary patch",
)


@dataclass(frozen=True)
class Hunk:
    """One ``@@`` block. ``lines``: ``(tag, text)``, tag `` ``, ``-`` or ``+``, text with its LF."""

    old_start: int
    old_lines: int
    new_start: int
    new_lines: int
    lines: tuple[tuple[str, str], ...]

    @property
    def old(self) -> tuple[str, ...]:
        """The lines it expects."""
        return tuple(text for tag, text in self.lines if tag != "+")

    @property
    def new(self) -> tuple[str, ...]:
        """The lines it leaves."""
        return tuple(text for tag, text in self.lines if tag != "-")

    def __str__(self) -> str:
        return f"@@ -{self.old_start},{self.old_lines} +{self.new_start},{self.new_lines} @@"


@dataclass(frozen=True)
class FilePatch:
    """What one patch does to one file.

    Attributes:
        path: as in a wheel, ``/`` between folders.
        hunks: in order, not overlapping.
        old_blob, new_blob: git's ids of the whole file before and after; :data:`NO_BLOB`
            where there is none (a file that is added, or deleted).
        patch: the name of the patch file, for messages.
    """

    path: str
    hunks: tuple[Hunk, ...]
    old_blob: str
    new_blob: str
    patch: str = ""

    @property
    def adds(self) -> bool:
        """The file must not be there before."""
        return self.old_blob == NO_BLOB

    @property
    def deletes(self) -> bool:
        """The file is not there afterwards."""
        return self.new_blob == NO_BLOB


@dataclass(frozen=True)
class Patch:
    """One patch file. ``message``: the commit's, with subject and fields; ``text``: all of it."""

    name: str
    subject: str
    author: str
    date: str
    message: str
    fields: Mapping[str, str]
    files: tuple[FilePatch, ...]
    text: str = field(repr=False)

    @property
    def replaces_shims(self) -> tuple[str, ...]:
        """The shims this patch stands for."""
        named = self.fields.get("Replaces-Shim", "")
        return tuple(name.strip() for name in named.split(",") if name.strip())


def parse(text: str, name: str) -> Patch:
    """Read a patch file.

    Args:
        text: its content, newlines as they are in the file.
        name: its file name, for messages.

    Raises:
        PatchError: it is not in the form above; names the line, and the file and hunk in it.
    """
    return _Reader(text, name).patch()


def reverse(file_patch: FilePatch) -> FilePatch:
    """The file patch which undoes this one."""
    swap = {" ": " ", "-": "+", "+": "-"}
    hunks = tuple(
        Hunk(
            hunk.new_start,
            hunk.new_lines,
            hunk.old_start,
            hunk.old_lines,
            tuple((swap[tag], text) for tag, text in hunk.lines),
        )
        for hunk in file_patch.hunks
    )
    return replace(
        file_patch, hunks=hunks, old_blob=file_patch.new_blob, new_blob=file_patch.old_blob
    )


def check_path(path: str) -> str | None:
    """Why ``path`` cannot be a path inside a package, or None."""
    parts = path.split("/")
    if not path or path.startswith("/") or ":" in parts[0]:
        return "is not a relative path"
    if any(part in ("", ".", "..") for part in parts):
        return "has an empty, `.` or `..` part"
    if any(ord(c) < 33 or c in ',"\\\x7f' for c in path):
        return "has a blank, comma, quote, backslash or control character"
    return None


class _Reader:
    """A cursor over the lines of a patch file."""

    def __init__(self, text: str, name: str) -> None:
        self.name, self.text = name, text
        if "\r" in text:
            line = text[: text.index("\r")].count("\n") + 1
            raise PatchError(
                f"{name}:{line}: {self._place_of(line)}has a carriage return; expected LF alone",
                hint="turn off line-end conversion (git config core.autocrlf false), get it again",
            )
        if not text.endswith("\n"):
            raise self._error(
                text.count("\n") + 1, "ends in the middle of a line: the file is truncated"
            )
        self.lines = text[:-1].split("\n")
        self.at = 0

    def _place_of(self, line: int) -> str:
        """The file and hunk that a line of a file not parsed yet belongs to."""
        before = [part.rstrip("\r") for part in self.text.split("\n")[:line]]
        diffs = [part for part in before if part.startswith("diff --git ")]
        hunks = [part for part in before if part.startswith("@@ ")]
        place = f"{diffs[-1].rpartition(' b/')[2]}: " if diffs else ""
        return place + (f"hunk {hunks[-1]} " if diffs and hunks else "")

    def _error(self, line: int, what: str, hint: str = "") -> PatchError:
        return PatchError(
            f"{self.name}:{line}: {self._place_of(line)}{what}",
            hint=hint or "write it anew with `dflash-plugin patch export`",
        )

    def _fail(self, what: str, hint: str = "") -> PatchError:
        return self._error(min(self.at + 1, len(self.lines)), what, hint)

    def _peek(self) -> str | None:
        return self.lines[self.at] if self.at < len(self.lines) else None

    def _take(self, prefix: str) -> str:
        line = self._peek()
        if line is None:
            raise self._fail(f"the file ends where {prefix!r} was expected: it is truncated")
        if not line.startswith(prefix):
            raise self._fail(f"expected {prefix!r}, found {line[:60]!r}")
        self.at += 1
        return line[len(prefix) :]

    def patch(self) -> Patch:
        if self._take(FROM_LINE):
            raise self._error(
                1, f"expected the line {FROM_LINE!r} (git format-patch --zero-commit)"
            )
        author = self._take("From: ")
        if not re.fullmatch(r"[^<>\"@]+ <[^<>\s]+@[^<>\s]+>", author):
            raise self._error(2, f"expected `From: Name <mail>`, found {author!r}")
        when = self._take("Date: ")
        try:
            if parsedate_to_datetime(when).tzinfo is None:
                raise ValueError("no time zone")
        except ValueError as err:
            raise self._error(3, f"{when!r} is not a date of a mail ({err})") from err
        subject = self._take(SUBJECT)
        if not subject.strip() or subject != subject.strip() or len(subject) > MAX_SUBJECT:
            raise self._error(
                4, f"expected a subject of at most {MAX_SUBJECT} characters on 1 line"
            )
        if self._take(""):
            raise self._error(5, "expected an empty line after the subject")
        body = self._message()
        message = "\n".join([subject, "", *body]) + "\n"
        fields = self._fields(body)
        while (line := self._peek()) is not None and not line.startswith("diff --git "):
            if line and not line.startswith(" "):
                raise self._fail(f"expected the summary of changes or `diff --git`, found {line!r}")
            self.at += 1
        head = "\n".join(self.lines[: self.at])
        if not head.isascii():
            raise self._error(1, "characters other than ASCII before the first `diff --git`")
        files: list[FilePatch] = []
        while self._peek() is not None:
            files.append(self._file())
            if [f.path for f in files].count(files[-1].path) > 1:
                raise self._fail(f"{files[-1].path} is in it twice")
        if not files:
            raise self._fail("no `diff --git`: it changes nothing, or is truncated")
        return Patch(self.name, subject, author, when, message, fields, tuple(files), self.text)

    def _message(self) -> list[str]:
        body = []
        while (line := self._peek()) != "---":
            if line is None or line.startswith("diff --git "):
                raise self._fail("no line `---` between the message and the changes")
            body.append(line)
            self.at += 1
        self.at += 1
        if not body or not body[-1] or any(line != line.rstrip() for line in body):
            raise self._fail("blanks at the end of the message, or of a line in it")
        return body

    def _fields(self, body: Sequence[str]) -> Mapping[str, str]:
        """Those of the last paragraph of the message."""
        start = len(body) - next(
            (i for i, line in enumerate(reversed(body)) if not line), len(body)
        )
        found: dict[str, str] = {}
        last = ""
        for number, line in enumerate(body[start:], 6 + start):
            match = _FIELD.fullmatch(line)
            if line.startswith(" ") and last:
                found[last] += " " + line.strip()
                continue
            if not match:
                raise self._error(number, f"expected `Field: value`, found {line!r}")
            last, value = match[1], match[2]
            if last not in FIELDS:
                raise self._error(number, f"unknown field {last}", f"known: {', '.join(FIELDS)}")
            if last in found:
                raise self._error(number, f"field {last} is there twice")
            found[last] = value
        missing = [name for name, needed in FIELDS.items() if needed and name not in found]
        if missing:
            raise self._error(
                6 + start,
                f"missing fields: {', '.join(missing)}",
                "they are the last paragraph of the message, before the line `---`",
            )
        try:
            date.fromisoformat(found["Last-Update"])
        except ValueError as err:
            raise self._error(6 + start, f"Last-Update: {err}", "write it as 2026-01-31") from err
        return MappingProxyType(found)

    def _file(self) -> FilePatch:
        names = self._take("diff --git ")
        path = names[2 : 2 + (len(names) - 5) // 2]
        if names != f"a/{path} b/{path}":
            raise self._fail(f"expected `a/PATH b/PATH` of one file, found {names!r}")
        wrong = check_path(path)
        if wrong:
            raise self._fail(f"the path {path!r} {wrong}")
        line = self._peek() or ""
        if line.startswith(_UNSUPPORTED):
            raise self._fail(f"{line!r}: only text files that are modified, added or deleted")
        adds, deletes = line == "new file mode 100644", line == "deleted file mode 100644"
        self.at += adds or deletes
        index = _INDEX.fullmatch(self._peek() or "")
        if index is None:
            raise self._fail(
                f"expected `index` with two whole ids (--full-index), found {self._peek()!r}"
            )
        self.at += 1
        old, new, mode = index.groups()
        if (old == NO_BLOB) != adds or (new == NO_BLOB) != deletes or old == new:
            raise self._fail(f"the ids of {path} do not fit what is done to it")
        if (mode is None) != (adds or deletes):
            raise self._fail(f"the mode of {path} is missing, or given twice")
        hunks: list[Hunk] = []
        if (self._peek() or "").startswith(("--- ", *_UNSUPPORTED)):
            for prefix, there in (("--- ", not adds), ("+++ ", not deletes)):
                side = f"{'a' if prefix == '--- ' else 'b'}/{path}" if there else "/dev/null"
                found = self._take(prefix)
                if found != side:
                    raise self._fail(f"expected {prefix + side!r}, found {prefix + found!r}")
            while (self._peek() or "").startswith("@@ "):
                hunks.append(self._hunk(hunks))
        empty = "e69de29bb2d1d6434b8b29ae775ad8c2e48c5391"  # git's id of an empty file
        if not hunks and empty not in (old, new):
            raise self._fail(f"{path} has no hunk: the file is truncated")
        return FilePatch(path, tuple(hunks), old, new, self.name)

    def _hunk(self, before: Sequence[Hunk]) -> Hunk:
        head = self.at
        match = _HUNK.fullmatch(self.lines[head])
        if match is None:
            raise self._fail("is not a hunk's heading")
        old_start, old_lines, new_start, new_lines = (
            1 if part is None else int(part) for part in match.groups()[:4]
        )
        self.at += 1
        lines: list[tuple[str, str]] = []
        left = {"-": old_lines, "+": new_lines}
        while left["-"] or left["+"]:
            line = self._peek()
            tag = line[:1] if line else ""
            if line is None or tag not in (" ", "-", "+"):
                raise self._error(
                    head + 1,
                    f"promises {old_lines} old and {new_lines} new lines; {left['-']} and "
                    f"{left['+']} of them are missing at line {self.at + 1}: it is truncated",
                )
            for side in ("-", "+") if tag == " " else (tag,):
                left[side] -= 1
            lines.append((tag, line[1:] + "\n"))
            self.at += 1
            if self._peek() == _NO_NEWLINE:
                lines[-1] = (tag, line[1:])
                self.at += 1
            if min(left.values()) < 0:
                raise self._error(head + 1, "has more lines than its heading says")
        hunk = Hunk(old_start, old_lines, new_start, new_lines, tuple(lines))
        shift = sum(h.new_lines - h.old_lines for h in before)
        # An empty side is numbered by the line before it.
        starts = old_start + (not old_lines), new_start + (not new_lines)
        end = before[-1].old_start + before[-1].old_lines if before else 1
        if starts[0] < end or starts[0] + shift != starts[1] or hunk.old == hunk.new:
            raise self._error(
                head + 1, "overlaps, changes nothing, or its line numbers do not add up"
            )
        whole = [text.endswith("\n") for text in (*hunk.old[:-1], *hunk.new[:-1])]
        if not all(whole):
            raise self._error(head + 1, "a line without a newline that is not the last one")
        return hunk
