"""Apply, revert, check, status: of a whole patch set, on a tree of an engine's files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from ..engines import PATCH_STAGING
from ..errors import PatchConflictError, PatchStateError, PatchVersionError
from . import distinfo, transaction
from .format import Patch, reverse
from .series import PatchSet, available, load
from .state import State
from .text import apply_text, blob_id
from .transaction import Change, Files
from .tree import Contents, Tree, check_access, read, sha256


@dataclass(frozen=True)
class Status:
    """What state an engine is in.

    Attributes:
        version, release: as the metadata says, and without what is not the release's; a git
            checkout that is not patched: None.
        variant: the patch set it has; None: none.
        edited: files that are neither as published nor as the patch set leaves them.
        current: whether its patch set is the one this package has; None: not patched.
        variants: what there is for its release.
        settled: what was done about an interrupted command; None: there was none.
    """

    engine: str
    root: str
    version: str | None
    release: str | None
    variant: str | None
    edited: tuple[str, ...]
    current: bool | None
    variants: tuple[str, ...]
    replaces_shims: tuple[str, ...]
    settled: str | None

    def line(self) -> str:
        """One line for people."""
        what = f"{self.engine} {self.version or 'checkout'}: "
        if self.variant:
            what += f"patched: {self.variant} for {self.release}"
            what += "" if self.current else " (not the patch set of this dflash-plugin)"
        else:
            what += "not patched"
        return what + (f", and edited: {', '.join(self.edited)}" if self.edited else "")


def status(tree: Tree, patches: Path, files: Files | None = None) -> Status:
    """The state of an engine; settles what an interrupted command left."""
    settled = _settle(tree.root, files or Files())
    state, version = tree.state(), tree.version()
    release = state.release if state else version and distinfo.release(version)
    variants = [v for e, r, v in available(patches) if (e, r) == (tree.engine, release)]
    current: bool | None = None
    if state is None:
        # The files that patch sets for it would touch: the others are not this tool's.
        sets = [load(patches, tree.engine, str(release), name) for name in variants]
        paths = sorted({tree.prefix + path for found in sets for path in found.paths})
        edited = tree.edited(paths) if paths else []
    else:
        edited = [path for path, (_, now) in state.files.items() if _sha256(tree, path) != now]
        current = state.variant in variants and (
            load(patches, tree.engine, state.release, state.variant).sha256 == state.series_sha256
        )
    return Status(
        tree.engine,
        str(tree.root),
        version,
        release,
        state.variant if state else None,
        tuple(edited),
        current,
        tuple(variants),
        state.replaces_shims if state else (),
        settled,
    )


def check(tree: Tree, patch_set: PatchSet, files: Files | None = None) -> Contents:
    """What :func:`apply` would do; changes nothing, and raises what it would raise."""
    with _ready(tree, files or Files()):
        contents, changes = _apply_plan(tree, patch_set)
        check_access(tree.root, [change.path for change in changes])
    return contents


def apply(tree: Tree, patch_set: PatchSet, files: Files | None = None) -> Contents:
    """Apply a patch set: every file, or none.

    Returns:
        Path -> content before and after, of each file of the engine that was changed.

    Raises:
        PatchVersionError: it is for another release.
        PatchStateError: the engine is patched already, or its files were edited.
        PatchConflictError: a hunk does not apply; names file, hunk and line.
        PatchTargetError: files may not, or cannot, be written.
        PatchBusyError: another command is at work.
    """
    files = files or Files()
    with _ready(tree, files):
        contents, changes = _apply_plan(tree, patch_set)
        _commit(tree, changes, files)
    return contents


def revert(tree: Tree, files: Files | None = None) -> State:
    """Undo the patch set an engine has; returns what it was.

    Raises:
        PatchStateError: it has none, or its files were edited since.
        PatchTargetError, PatchBusyError: as :func:`apply`.
    """
    files = files or Files()
    with _ready(tree, files):
        state = tree.state()
        if state is None:
            raise PatchStateError(
                f"{tree.root}: {tree.engine} is not patched, so there is nothing to revert"
            )
        try:
            contents = _plan(tree, [*reversed(state.parsed())], undo=True)
        except PatchConflictError as err:
            raise PatchStateError(
                f"{err.path} was changed after the patches were applied: {err.message}",
                hint="reinstall the engine instead of reverting",
            ) from err
        for path, (before, after) in state.files.items():
            old, new = contents.get(path, (None, None))
            if (_sha(old), _sha(new)) != (after, before):
                raise PatchStateError(
                    f"{path}: is not as the patches left it", hint="reinstall the engine"
                )
        _commit(tree, tree.restored(contents, state), files)
    return state


@contextmanager
def _ready(tree: Tree, files: Files) -> Iterator[None]:
    with transaction.locked(tree.root):
        transaction.recover(tree.root, files)
        yield


def _settle(root: Path, files: Files) -> str | None:
    if not (root / PATCH_STAGING).exists():
        return None
    with transaction.locked(root):
        return transaction.recover(root, files)


def _apply_plan(tree: Tree, patch_set: PatchSet) -> tuple[Contents, Sequence[Change]]:
    """The files of the engine as they will be, and every change that makes them so."""
    state, version = tree.state(), tree.version()
    if state is not None:
        raise PatchStateError(
            f"{tree.root}: {tree.engine} is patched already: {state.variant} for {state.release}",
            hint="dflash-plugin patch revert",
        )
    if version is not None and distinfo.release(version) != patch_set.version:
        raise PatchVersionError(
            f"{tree.root}: {tree.engine} is {version}, and the patches are for {patch_set.version}",
            hint="dflash-plugin patch list",
        )
    unsuited = tree.suits(patch_set.variant)
    if unsuited:
        raise PatchVersionError(
            f"{tree.root}: {unsuited}, and the patch set `{patch_set.variant}` is for nothing else",
            hint="dflash-plugin patch list",
        )
    paths = [tree.prefix + path for path in patch_set.paths]
    check_access(tree.root, paths)
    try:
        contents = _plan(tree, patch_set.patches)
    except PatchConflictError as err:
        if tree.edited([tree.prefix + err.path]):
            raise PatchStateError(
                f"{err.path} is not as it was published: {err.message}",
                hint=err.hint,
            ) from err
        raise
    edited = tree.edited(paths)
    if edited:
        raise PatchStateError(
            f"{tree.root}: not as they were published: {', '.join(edited)}",
            hint="reinstall the engine; in a git checkout commit or stash the changes",
        )
    base = version or patch_set.version
    done = State(
        tree.engine,
        patch_set.version,
        patch_set.variant,
        base,
        base if version is None else distinfo.patched_version(base, patch_set.variant),
        patch_set.sha256,
        patch_set.replaces_shims,
        {path: (_sha(old), _sha(new)) for path, (old, new) in contents.items()},
        tuple((patch.name, patch.text) for patch in patch_set.patches),
    )
    return contents, tree.finished(contents, done)


def _plan(tree: Tree, patches: Sequence[Patch], *, undo: bool = False) -> Contents:
    """The content of each touched file before and after."""
    before: dict[str, bytes | None] = {}
    now: dict[str, bytes | None] = {}
    for patch in patches:
        for file in patch.files:
            step, path = reverse(file) if undo else file, tree.prefix + file.path
            if path not in before:
                before[path] = now[path] = read(tree.root, path)
            old = now[path]
            try:
                text = None if old is None else old.decode()
            except UnicodeDecodeError as err:
                raise PatchConflictError(
                    f"{patch.name}: {path}: is not UTF-8 text", path=file.path
                ) from err
            new = apply_text(step, text)
            now[path] = None if new is None else new.encode()
            if old is not None and blob_id(old) != step.old_blob:
                raise PatchConflictError(
                    f"{patch.name}: {path}: its hunks apply, but the file is not the one the "
                    f"patch is for: git id {blob_id(old)}, expected {step.old_blob}",
                    path=file.path,
                    hint="the file differs elsewhere: reinstall the engine",
                )
            if new is not None and blob_id(new.encode()) != step.new_blob:
                raise PatchConflictError(
                    f"{patch.name}: {path}: the patch does not lead to the file it promises",
                    path=file.path,
                    hint="the patch was edited by hand: write it anew with `patch export`",
                )
    return {path: (before[path], now[path]) for path in before}


def _commit(tree: Tree, changes: Sequence[Change], files: Files) -> None:
    check_access(tree.root, [change.path for change in changes])
    transaction.commit(tree.root, changes, files)


def _sha(data: bytes | None) -> str | None:
    return None if data is None else sha256(data)


def _sha256(tree: Tree, path: str) -> str | None:
    return _sha(read(tree.root, path))
