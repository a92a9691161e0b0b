"""Several files of a tree changed as one: old or new, whatever happens in between.

The new files are first written into a folder of their own in the tree, beside links to the old
ones, then a journal that names them; from there on every step is one rename or removal that can
be repeated. Files are replaced, never written into: who else has a link to one keeps the old. A
process which fails undoes what it did. What a killed one left is finished, or undone, by the next
command (:func:`recover`): the journal's name says which, because a rename needs no room on a full
disk.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..engines import PATCH_STAGING
from ..errors import PatchBusyError, PatchStateError, PatchTargetError

_FORWARD, _UNDO = "journal.json", "journal-undo.json"
_NO_LINKS = (errno.EPERM, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EMLINK, errno.EXDEV, errno.ENOSYS)


class Files:
    """Everything that is done to the file system; tests put one that fails in its place."""

    def mkdir(self, path: Path) -> None:
        """Make a folder; one that is there is well."""
        path.mkdir(exist_ok=True)

    def write(self, path: Path, data: bytes, mode: int) -> None:
        """A new file, on the disk when this returns."""
        fd = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        with os.fdopen(fd, "wb") as file:
            file.write(data)
            file.flush()
            os.fchmod(fd, mode)
            os.fsync(fd)

    def link(self, source: Path, target: Path) -> None:
        """Another name for a file; a copy where that cannot be."""
        try:
            os.link(source, target)
        except OSError as err:
            if err.errno not in _NO_LINKS:
                raise
            self.write(target, source.read_bytes(), stat.S_IMODE(source.stat().st_mode))

    def rename(self, source: Path, target: Path) -> None:
        """Move a file onto another in one step."""
        source.replace(target)

    def unlink(self, path: Path) -> None:
        """Remove a file."""
        path.unlink()

    def rmdir(self, path: Path) -> None:
        """Remove an empty folder."""
        path.rmdir()

    def sync(self, folder: Path) -> None:
        """The names in a folder are on the disk when this returns."""
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


@dataclass(frozen=True)
class Change:
    """What becomes of one file.

    Attributes:
        path: below the root.
        old, new: the contents; None: no such file.
        source: the path of a file that has the new content already; None: none has.
    """

    path: str
    old: bytes | None
    new: bytes | None
    mode: int = 0o644
    source: str | None = None


@contextmanager
def locked(root: Path) -> Iterator[None]:
    """The only command at work on this tree; the kernel frees the lock when its holder ends.

    Raises:
        PatchBusyError: another one is.
        PatchTargetError: the folder cannot be opened, or its file system has no locks.
    """
    import fcntl  # POSIX only

    try:
        fd = os.open(root, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as err:
        raise PatchTargetError(f"{root}: {err.strerror}") from err
    try:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as err:
            raise PatchBusyError(
                f"{root}: another patch command is at work there", hint="wait until it has ended"
            ) from err
        except OSError as err:
            raise PatchTargetError(f"{root}: cannot be locked: {err.strerror}") from err
        yield
    finally:
        os.close(fd)


def commit(root: Path, changes: Sequence[Change], files: Files) -> None:
    """Make all changes, or none; call with the tree locked and nothing to recover.

    Raises:
        PatchTargetError: the file system refuses (disk full, no permission); nothing is changed.
        PatchStateError: nor could what was done be undone; the next command tries again.
    """
    journal = _Journal(root, [_Entry.of(change) for change in changes], files)
    try:
        journal.stage(changes)
        try:
            journal.start()
            journal.forward()
        except BaseException:
            journal.undo()
            raise
    except OSError as err:
        raise _from_os_error(err, root) from err
    finally:
        journal.clear()


def interrupted(root: Path) -> bool:
    """Whether a command was stopped in the middle of changing this tree."""
    return any((root / PATCH_STAGING / name).exists() for name in (_FORWARD, _UNDO))


def recover(root: Path, files: Files) -> str | None:
    """Finish or undo what a killed command left; call with the tree locked.

    Returns:
        What was done, in a few words; None: there was nothing to do.

    Raises:
        PatchStateError: files were changed in the meantime.
        PatchTargetError: the file system refuses; the next command tries again.
    """
    staging = root / PATCH_STAGING
    if not staging.is_dir() or staging.is_symlink():
        return None
    found = next((staging / n for n in (_FORWARD, _UNDO) if (staging / n).exists()), None)
    try:
        if found is None:  # it was killed before it began, or after it had ended
            _Journal(root, (), files).clear()
            return None
        raw = json.loads(found.read_bytes())
        journal = _Journal(root, [_Entry(**entry) for entry in raw["changes"]], files)
        finish = journal.check() and found.name == _FORWARD
        if finish:
            journal.forward()
        else:
            journal.undo()
        journal.clear()
    except OSError as err:
        raise _from_os_error(err, root) from err
    return "an interrupted command was " + ("finished" if finish else "undone")


@dataclass(frozen=True)
class _Entry:
    """A change as the journal has it: sha256 of the contents, None: no such file."""

    path: str
    old: str | None
    new: str | None

    @classmethod
    def of(cls, change: Change) -> _Entry:
        return cls(change.path, _sha256(change.old), _sha256(change.new))


class _Journal:
    """The steps, each of which can be repeated."""

    def __init__(self, root: Path, entries: Sequence[_Entry], files: Files) -> None:
        self.root, self.entries, self.files = root, entries, files
        self.staging = root / PATCH_STAGING

    def _staged(self, side: str, number: int) -> Path:
        return self.staging / f"{side}-{number}"

    def stage(self, changes: Sequence[Change]) -> None:
        self.files.mkdir(self.staging)
        for number, change in enumerate(changes):
            staged = self._staged("new", number)
            if change.old is not None and change.new is not None:
                self.files.link(self.root / change.path, self._staged("old", number))
            if change.source is not None:
                self.files.link(self.root / change.source, staged)
            elif change.new is not None:
                self.files.write(staged, change.new, change.mode)
        raw = {"changes": [vars(entry) for entry in self.entries]}
        self.files.write(self.staging / "journal.tmp", json.dumps(raw).encode(), 0o644)
        self.files.sync(self.staging)

    def start(self) -> None:
        """From here on the changes are made, now or by the next command."""
        self.files.rename(self.staging / "journal.tmp", self.staging / _FORWARD)
        self.files.sync(self.staging)
        self.files.sync(self.root)

    def check(self) -> bool:
        """Whether the changes can be finished; if not they can be undone.

        Raises:
            PatchStateError: neither; somebody else has been at the files.
        """
        finish = True
        for number, entry in enumerate(self.entries):
            now = _sha256_at(self.root / entry.path)
            staged = {s: _sha256_at(self._staged(s, number)) for s in ("old", "new")}
            if now not in (entry.old, entry.new) or entry.old not in (now, None, staged["old"]):
                raise PatchStateError(
                    f"{self.root / entry.path}: neither as it was nor as an interrupted command "
                    "should leave it",
                    hint=f"remove {self.staging} and reinstall the engine",
                )
            finish = finish and entry.new in (now, None, staged["new"])
        return finish

    def forward(self) -> None:
        for number, entry in enumerate(self.entries):
            target = self.root / entry.path
            if entry.new is not None:
                self._put(self._staged("new", number), target)
            elif target.exists():
                self.files.rename(target, self._staged("old", number))
            self._forget_code(target)
        self._settle(_FORWARD)

    def undo(self) -> None:
        if (self.staging / _FORWARD).exists():
            self.files.rename(self.staging / _FORWARD, self.staging / _UNDO)
        elif not (self.staging / _UNDO).exists():
            return  # it had not begun
        for number, entry in reversed(list(enumerate(self.entries))):
            target = self.root / entry.path
            if entry.old is not None:
                self._put(self._staged("old", number), target)
            elif target.exists():
                self.files.unlink(target)
            self._forget_code(target)
        self._settle(_UNDO)

    def _put(self, staged: Path, target: Path) -> None:
        if not staged.exists():  # it is in place
            return
        for folder in reversed(target.relative_to(self.root).parents[:-1]):
            if not (self.root / folder).is_dir():
                self.files.mkdir(self.root / folder)
        self.files.rename(staged, target)

    def _forget_code(self, target: Path) -> None:
        if target.suffix == ".py":
            for cached in target.parent.glob(f"__pycache__/{glob.escape(target.stem)}.*.pyc"):
                self.files.unlink(cached)

    def _settle(self, journal: str) -> None:
        """Make what was done last, then forget how it was done."""
        folders = {self.root}
        for entry in self.entries:
            for folder in (self.root / entry.path).relative_to(self.root).parents[:-1]:
                there = self.root / folder
                for each in (there / "__pycache__", there):
                    if each.is_dir() and not any(each.iterdir()):
                        self.files.rmdir(each)
                folders.add(there)
        for there in sorted(folders):
            if there.is_dir():
                self.files.sync(there)
        self.files.unlink(self.staging / journal)

    def clear(self) -> None:
        """Remove the staged files unless they are needed; what stays is removed another time."""
        if not self.staging.is_dir() or interrupted(self.root):
            return
        with contextlib.suppress(OSError):
            for path in self.staging.iterdir():
                self.files.unlink(path)
            self.files.rmdir(self.staging)


def _sha256(data: bytes | None) -> str | None:
    return None if data is None else hashlib.sha256(data).hexdigest()


def _sha256_at(path: Path) -> str | None:
    return _sha256(path.read_bytes()) if path.is_file() else None


def _from_os_error(err: OSError, root: Path) -> PatchTargetError | PatchStateError:
    reason = os.strerror(err.errno) if err.errno else str(err)
    where = err.filename or root
    if interrupted(root):
        return PatchStateError(
            f"{where}: {reason}; the change is neither done nor undone yet",
            hint="run `dflash-plugin patch status` once the cause is gone: it settles it",
        )
    hint = "make it writable, or run as the owner of the engine's files"
    if err.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "free some space on that disk"
    return PatchTargetError(f"{where}: {reason}; nothing was changed", hint=hint)
