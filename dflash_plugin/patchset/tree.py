"""The files that a patch set is applied to: an installation, an unpacked wheel, a git checkout."""

from __future__ import annotations

import hashlib
import os
import stat
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

from ..engines import PATCH_STATE
from ..errors import EngineNotFoundError, PatchStateError, PatchTargetError
from . import distinfo
from .state import Recorded, State, read_state
from .transaction import Change

Contents = Mapping[str, tuple[bytes | None, bytes | None]]
"""Path below the root -> content before and after; None: no such file."""


class Tree(Protocol):
    """An engine's files below ``root``; ``prefix`` comes before a patch's paths."""

    @property
    def root(self) -> Path: ...
    @property
    def engine(self) -> str: ...
    @property
    def prefix(self) -> str: ...

    def version(self) -> str | None:
        """As the metadata says; None: nothing says."""

    def state(self) -> State | None:
        """What was done to it by this tool."""

    def suits(self, variant: str) -> str | None:
        """Why a variant cannot be applied to this build; None: it can."""

    def edited(self, paths: Iterable[str]) -> list[str]:
        """Those of the paths that are not as they were published."""

    def finished(self, contents: Contents, state: State) -> list[Change]:
        """The changes which make ``contents`` and ``state`` true."""

    def restored(self, contents: Contents, state: State) -> list[Change]:
        """The changes which make ``contents`` true, and forget ``state``."""


@dataclass(frozen=True)
class SiteTree:
    """A site-packages folder, or a wheel unpacked: both have a dist-info."""

    root: Path
    engine: str
    prefix: str = ""

    def _info(self) -> distinfo.DistInfo:
        return distinfo.find(self.root, self.engine)

    def version(self) -> str | None:
        """As its METADATA says."""
        return self._info().version

    def state(self) -> State | None:
        """The file beside METADATA."""
        info = self._info()
        found = read_state(info.path / PATCH_STATE)
        if found is None and "dflash." in info.version.partition("+")[2]:
            raise PatchStateError(
                f"{info.path}: the version says patched, and {PATCH_STATE} is not there",
                hint="reinstall the engine",
            )
        return found

    def suits(self, variant: str) -> str | None:
        """`cpu` is for CPU builds: vLLM takes any version with these letters for one.

        SGLang has one build for every platform.
        """
        info = self._info()
        if variant != "cpu" or self.engine == "sglang" or distinfo.is_cpu(info):
            return None
        return f"{info.distribution} {info.version} is not a CPU build"

    def edited(self, paths: Iterable[str]) -> list[str]:
        """Those which are not what RECORD says; a file it does not list must not be there."""
        recorded = distinfo.recorded(self._info().record())
        found = []
        for path in paths:
            data = read(self.root, path)
            if (None if data is None else distinfo.record_hash(data)) != recorded.get(path):
                found.append(path)
        return found

    def finished(self, contents: Contents, state: State) -> list[Change]:
        """The files, then the dist-info under its new name."""
        info = self._info()
        folder = f"{info.folder.partition('-')[0]}-{state.version}.dist-info"
        old = info.files()
        record, metadata = info.record(), old[f"{info.folder}/METADATA"]
        new = {f"{folder}/{path.partition('/')[2]}": data for path, data in old.items()}
        new[f"{folder}/METADATA"] = distinfo.set_version(metadata, state.version)
        edits: dict[str, bytes | None] = {path: after for path, (_, after) in contents.items()}
        edits[f"{folder}/METADATA"] = new[f"{folder}/METADATA"]
        edits[f"{folder}/{PATCH_STATE}"] = b""
        # The state holds the lines that go, RECORD the hash of the state.
        _, dropped = distinfo.edit_record(record, edits, info.folder, folder)
        undo = Recorded(info.folder, tuple(dropped))
        new[f"{folder}/{PATCH_STATE}"] = replace(state, recorded=undo).dump()
        edits[f"{folder}/{PATCH_STATE}"] = new[f"{folder}/{PATCH_STATE}"]
        new[f"{folder}/RECORD"], _ = distinfo.edit_record(record, edits, info.folder, folder)
        return [*_changes(self.root, contents), *_moved(self.root, old, new)]

    def restored(self, contents: Contents, state: State) -> list[Change]:
        """The files, then the dist-info under its old name."""
        info, undo = self._info(), state.recorded
        if undo is None:
            raise PatchStateError(f"{info.path}/{PATCH_STATE}: is not of an installation")
        own = [f"{info.folder}/{name}" for name in ("METADATA", PATCH_STATE)]
        wrong = self.edited([*contents, *own])
        if wrong:
            raise PatchStateError(
                f"{self.root}: was changed after the patches were applied: {', '.join(wrong)}",
                hint="reinstall the engine instead of reverting",
            )
        old = info.files()
        new = {f"{undo.folder}/{path.partition('/')[2]}": data for path, data in old.items()}
        del new[f"{undo.folder}/{PATCH_STATE}"]
        new[f"{undo.folder}/METADATA"] = distinfo.set_version(old[own[0]], state.base_version)
        # Whoever installed a wheel that was patched before has written RECORD anew.
        new[f"{undo.folder}/RECORD"] = distinfo.restore_record(
            info.record(), undo.dropped, [*contents, *own], undo.folder, info.folder
        )
        return [*_changes(self.root, contents), *_moved(self.root, old, new)]


@dataclass(frozen=True)
class GitTree:
    """A git checkout of the engine; its state is kept in the `.git` folder."""

    root: Path
    engine: str
    prefix: str
    state_path: str

    def version(self) -> str | None:
        """Nothing says it reliably: the blob ids of the patches do."""
        return None

    def state(self) -> State | None:
        """The file in the `.git` folder."""
        return read_state(self.root / self.state_path)

    def suits(self, variant: str) -> str | None:
        """A checkout can be built for anything."""
        return None

    def edited(self, paths: Iterable[str]) -> list[str]:
        """Those which are not as in HEAD."""
        command = ["status", "--porcelain=v1", "-z", "--no-renames", "--ignored", "--"]
        listed = git(self.root, *command, *paths).decode().split("\0")
        return [line[3:] for line in listed if line]

    def finished(self, contents: Contents, state: State) -> list[Change]:
        """The files and the state."""
        return [*_changes(self.root, contents), Change(self.state_path, None, state.dump())]

    def restored(self, contents: Contents, state: State) -> list[Change]:
        """The files, and no state."""
        old = (self.root / self.state_path).read_bytes()
        return [*_changes(self.root, contents), Change(self.state_path, old, None)]


def site_tree(folder: Path, engine: str) -> SiteTree:
    """The tree of a site-packages folder or an unpacked wheel; raises ``EngineNotFoundError``."""
    root = folder.resolve()
    if not root.is_dir():
        raise EngineNotFoundError(f"{folder}: no such folder")
    distinfo.find(root, engine)
    return SiteTree(root, engine)


def git_tree(folder: Path, engine: str) -> GitTree:
    """The tree of a git checkout.

    Raises:
        EngineNotFoundError: it is none, or not of that engine.
        PatchTargetError: its `.git` is not in it (a linked work tree).
    """
    root = Path(os.fsdecode(git(folder, "rev-parse", "--show-toplevel")).rstrip("\n"))
    inside = Path(os.fsdecode(git(root, "rev-parse", "--absolute-git-dir")).rstrip("\n"))
    prefix = "python/" if engine == "sglang" else ""
    if not (root / prefix / engine).is_dir():
        raise EngineNotFoundError(f"{root}: no folder {prefix}{engine}, so not a checkout of it")
    if root not in inside.parents:
        raise PatchTargetError(
            f"{root}: its git folder is elsewhere ({inside})", hint="use a checkout of its own"
        )
    return GitTree(root, engine, prefix, f"{inside.relative_to(root).as_posix()}/{PATCH_STATE}")


def git(
    folder: Path, *args: str, data: bytes | None = None, env: Mapping[str, str] | None = None
) -> bytes:
    """What a git command prints.

    Raises:
        EngineNotFoundError: no git, or ``folder`` is not in a checkout.
        PatchTargetError: git refuses; its own words are in the message.
    """
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *args],
            input=data,
            capture_output=True,
            check=False,
            env={**os.environ, "LC_ALL": "C", **(env or {})},  # its messages are read below
        )
    except OSError as err:
        raise EngineNotFoundError(f"git cannot be run: {err}", hint="install git") from err
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip()
        if "not a git repository" in words or "cannot change to" in words:
            raise EngineNotFoundError(f"{folder}: {words}")
        raise PatchTargetError(f"{folder}: git {args[0]}: {words}")
    return done.stdout


def read(root: Path, path: str) -> bytes | None:
    """A file's content; None: no such file. Raises ``PatchTargetError``."""
    try:
        return (root / path).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as err:
        raise PatchTargetError(f"{root / path}: {err.strerror}") from err


def check_access(root: Path, paths: Sequence[str]) -> None:
    """Whether these files may be replaced, added or removed by this user.

    Raises:
        PatchTargetError: a link, another owner, or something read-only is on the way.
    """
    _check_one(root, root)
    for path in paths:
        here = root
        for part in path.split("/"):
            here = here / part
            if not os.path.lexists(here):
                break
            _check_one(here, root)


def _check_one(path: Path, root: Path) -> None:
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        where = path.resolve()
        outside = "" if root in where.parents else ", outside the tree"
        raise PatchTargetError(
            f"{path}: is a symbolic link to {where}{outside}; only files of the tree are changed",
            hint="install the engine with copied files (uv: --link-mode=copy)",
        )
    if found.st_uid != os.geteuid():
        raise PatchTargetError(
            f"{path}: belongs to user {found.st_uid}, and this runs as user {os.geteuid()}",
            hint="run it as the owner of the engine's files",
        )
    # Root may write anywhere; a mode without `w` is still meant.
    if not found.st_mode & stat.S_IWUSR or not os.access(path, os.W_OK):
        raise PatchTargetError(f"{path}: is read-only", hint="make it writable (chmod u+w)")


def sha256(data: bytes) -> str:
    """Of a file's content, in hex."""
    return hashlib.sha256(data).hexdigest()


def _mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode) if path.exists() else 0o644


def _changes(root: Path, contents: Contents) -> list[Change]:
    return [
        Change(path, old, new, _mode(root / path))
        for path, (old, new) in sorted(contents.items())
        if old != new
    ]


def _moved(root: Path, old: Mapping[str, bytes], new: Mapping[str, bytes]) -> list[Change]:
    """A dist-info under a new name, file by file: some file systems cannot rename a folder."""
    before = {path.partition("/")[2]: path for path in old}
    changes = []
    for path, data in sorted(new.items()):
        was = before.get(path.partition("/")[2])
        same = was is not None and old[was] == data
        mode = _mode(root / was) if was else 0o644
        changes.append(Change(path, None, data, mode, was if same else None))
    return [*changes, *(Change(path, data, None) for path, data in sorted(old.items()))]
