"""Where downloaded and built things live, and how they are written safely.

Nothing is ever half there: files and folders are built beside their final place
and renamed into it, and what a killed process left is removed by the next one.
Errors of the file system become :class:`~dflash_plugin.errors.CacheError`.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import re
import secrets
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import CacheError, UsageError, from_os_error

_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)


def cache_dir() -> Path:
    """``$DFLASH_CACHE``, else ``$XDG_CACHE_HOME/dflash-plugin``, else ``~/.cache/dflash-plugin``.

    Absolute, not necessarily there yet. A relative ``XDG_CACHE_HOME`` is ignored, as the
    XDG base directory specification asks.

    Raises:
        CacheError: there is no home folder.
    """
    own = os.environ.get("DFLASH_CACHE")
    if own:
        return Path(own).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME", "")
    if Path(base).is_absolute():
        return Path(base) / "dflash-plugin"
    try:
        return Path.home() / ".cache" / "dflash-plugin"
    except RuntimeError as err:  # a container's user without HOME and passwd entry
        raise CacheError(
            "no home folder for the cache", hint="set DFLASH_CACHE to a folder you own"
        ) from err


def make_dir(path: Path) -> Path:
    """``path`` as an existing folder; raises ``CacheError``."""
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as err:
        raise from_os_error(err, str(path)) from err
    return path


def atomic_write_bytes(path: Path, data: bytes) -> None:
    """Write ``path`` so that any reader sees the old content or all of the new.

    Raises:
        CacheError: disk full, read-only, no permission; ``path`` is as it was.
    """
    make_dir(path.parent)
    temp = _temp_sibling(path)
    try:
        with temp.open("xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        temp.replace(path)
    except BaseException as err:
        with contextlib.suppress(OSError):
            temp.unlink()
        if isinstance(err, OSError):
            raise from_os_error(err, str(path)) from err
        raise


def atomic_write_text(path: Path, text: str) -> None:
    """:func:`atomic_write_bytes` for UTF-8 text."""
    atomic_write_bytes(path, text.encode())


@contextmanager
def staged_dir(final: Path) -> Iterator[Path]:
    """A new folder beside ``final`` that becomes ``final`` if the block succeeds.

    An existing ``final`` is replaced whole: in one step where the file system can
    exchange two folders, else by two renames. On any exception, Ctrl-C included, the
    new folder is removed and ``final`` is as it was. Paths written into the files
    must not name the temporary folder.

    Raises:
        CacheError: the folder cannot be made, filled (disk full) or renamed.
    """
    make_dir(final.parent)
    staging = _temp_sibling(final)
    try:
        try:
            staging.mkdir()
            yield staging
            _move_into_place(staging, final)
        except OSError as err:
            # The block's other OSErrors (a socket's, a missing input) are its caller's.
            if err.errno in _DISK or _concerns(err, staging, final):
                raise from_os_error(err, str(final)) from err
            raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)


@contextmanager
def locked(name: str, *, sweep: Path | None = None) -> Iterator[None]:
    """Hold the cache's lock ``name``: one process at a time; the others wait and say so.

    The kernel frees the lock when its holder ends, however it ends. Do not nest two
    uses of one name: the second would wait for the first.

    Args:
        name: letters, digits, ``.``, ``_`` and ``-``.
        sweep: the file or folder that this lock protects; what killed writers
            (:func:`staged_dir`, :func:`atomic_write_bytes`) left beside it is removed.

    Raises:
        CacheError: the lock file cannot be made, or the file system has no locks.
    """
    import fcntl  # POSIX only, and `import dflash_plugin.cache` must work anywhere

    if not re.fullmatch(r"[A-Za-z0-9._-]+", name):
        raise UsageError(f"lock name {name!r}: expected letters, digits, '.', '_' and '-'")
    path = make_dir(cache_dir() / "locks") / f"{name}.lock"
    try:
        file = path.open("a+b")
    except OSError as err:
        raise from_os_error(err, str(path)) from err
    with file:
        try:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                print(f"waiting for another process that is preparing {name} …", file=sys.stderr)
                fcntl.flock(file, fcntl.LOCK_EX)
        except OSError as err:
            raise CacheError(
                f"cannot lock {path}: {err.strerror}",
                hint="set DFLASH_CACHE to a folder on a local disk",
            ) from err
        if sweep is not None:
            remove_leftovers(sweep)
        yield


def remove_leftovers(final: Path) -> None:
    """Remove what killed writers of ``final`` left beside it; call with its lock held."""
    pattern = re.compile(rf"\.{re.escape(final.name)}\.[0-9a-f]{{8}}\.tmp")
    with contextlib.suppress(FileNotFoundError):
        for entry in list(final.parent.iterdir()):
            if pattern.fullmatch(entry.name):
                _remove(entry)


def _temp_sibling(path: Path) -> Path:
    return path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def _concerns(err: OSError, *folders: Path) -> bool:
    if not isinstance(err.filename, str | os.PathLike):
        return False
    path = Path(err.filename)
    return any(path == folder or folder in path.parents for folder in folders)


def _move_into_place(new: Path, final: Path) -> None:
    if not os.path.lexists(final):
        new.replace(final)
        return
    if _exchange(new, final):  # the old content is at `new` now
        _remove(new)
        return
    old = _temp_sibling(final)
    final.replace(old)
    try:
        new.replace(final)
    except BaseException:
        if not os.path.lexists(final):
            old.replace(final)
        raise
    _remove(old)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two paths in one step (Linux ``renameat2``); False where that is not possible."""
    if not sys.platform.startswith("linux"):
        return False
    try:
        renameat2 = ctypes.CDLL(None).renameat2
    except (OSError, AttributeError):  # a C library without it
        return False
    at_fdcwd, exchange = -100, 2
    result = renameat2(at_fdcwd, os.fsencode(one), at_fdcwd, os.fsencode(other), exchange)
    return bool(result == 0)
