"""One class per way of failing: an exit code, a message, and the next step.

A message names the file, cell or field, what was expected and what was found;
``hint`` says what to do next. Command lines print both and exit with
``exit_code``. Codes are part of the interface: never reuse one.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterable
from difflib import get_close_matches


class DFlashError(Exception):
    """Base of every error this project raises on purpose."""

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  next step: {self.hint}" if self.hint else self.message


class VerdictFailedError(DFlashError):
    """The run itself worked; a lossless, faithful or faster verdict did not."""

    exit_code = 1


class UsageError(DFlashError):
    """A command line or function argument is wrong (2, as argparse uses)."""

    exit_code = 2


class MatrixError(DFlashError):
    """``compat_matrix.toml`` is missing, unreadable or breaks its schema."""

    exit_code = 10


class UnknownCellError(DFlashError):
    """A cell, pair, engine or profile that the matrix does not have."""

    exit_code = 11


class ModelNotFoundError(DFlashError):
    """A model folder, or a file in it that every model has, is missing."""

    exit_code = 12


class PairMismatchError(DFlashError):
    """Target and draft do not belong together, or a config field is impossible."""

    exit_code = 13


class CheckpointError(DFlashError):
    """Weights are corrupted, truncated, missing, extra or misshapen."""

    exit_code = 14


class DownloadError(DFlashError):
    """A file could not be fetched, or is not the file that was promised."""

    exit_code = 15


class CacheError(DFlashError):
    """The cache cannot be written: disk full, read-only, permissions."""

    exit_code = 16


class EnvironmentBuildError(DFlashError):
    """An engine environment could not be built."""

    exit_code = 17


class PortInUseError(DFlashError):
    """The requested port belongs to another process."""

    exit_code = 18


class EngineExitedError(DFlashError):
    """The engine ended before it was ready, or while it was in use.

    ``cause``: the first error its log tells of; empty where it tells of none.
    ``drafting``: it was the server with the draft.
    """

    exit_code = 19

    def __init__(
        self, message: str, *, hint: str = "", cause: str = "", drafting: bool = False
    ) -> None:
        super().__init__(message, hint=hint)
        self.cause, self.drafting = cause, drafting


class EngineTimeoutError(DFlashError):
    """The engine is running but did not become ready in time."""

    exit_code = 20


class EngineNotFoundError(DFlashError):
    """No engine of the requested kind is installed."""

    exit_code = 21


class UnsupportedEngineError(DFlashError):
    """The engine is there, but ``support`` refuses to run DFlash on it."""

    exit_code = 22


class RequestError(DFlashError):
    """A running server answered with an error or something unreadable."""

    exit_code = 23


class MissingDependencyError(DFlashError):
    """An optional Python package is needed for this command."""

    exit_code = 24


class ReplayError(DFlashError):
    """The reference replay ended without a result."""

    exit_code = 25


class TrainingError(DFlashError):
    """A draft cannot be trained: data without labels, or a loss that is not a number."""

    exit_code = 26


class PatchError(DFlashError):
    """A series or patch file is missing, truncated or not in the form that is accepted."""

    exit_code = 40


class PatchConflictError(PatchError):
    """A patch does not apply: the text is not the one it was written for.

    ``path``: the file; ``hunk``: which of the file's hunks, from 1, and ``line``: the first line
    that differs; 0 where it is the file as a whole.
    """

    exit_code = 41

    def __init__(
        self, message: str, *, hint: str = "", path: str = "", hunk: int = 0, line: int = 0
    ) -> None:
        super().__init__(message, hint=hint)
        self.path, self.hunk, self.line = path, hunk, line


class PatchVersionError(DFlashError):
    """There is no such patch set for this release of the engine."""

    exit_code = 42


class PatchTargetError(DFlashError):
    """An engine's files may not be touched: permission, owner, or a path that leads elsewhere."""

    exit_code = 43


class PatchStateError(DFlashError):
    """The engine is not in the state the command needs: patched, not patched, or edited."""

    exit_code = 44


class PatchBusyError(DFlashError):
    """Another command is changing the same engine."""

    exit_code = 45


class NewsFoundError(DFlashError):
    """The release watch found what the matrix does not have yet; no failure of its own."""

    exit_code = 50


class SourceUnreachableError(DFlashError):
    """A package index or the hub did not answer, or not in a way that can be read."""

    exit_code = 51


class DockerUnavailableError(DFlashError):
    """No Docker daemon answers, or it cannot do what was asked of it."""

    exit_code = 60


class ImageMissingError(DFlashError):
    """A container image is neither on this machine nor to be had from its registry."""

    exit_code = 61


class ContainerMemoryError(DFlashError):
    """A container needed more memory than it was given, and was ended for it."""

    exit_code = 62


class ContainerKilledError(DFlashError):
    """A container was killed or removed from outside while it was in use."""

    exit_code = 63


INTERRUPTED = 130
"""Exit code after Ctrl-C, as shells use it."""


def near_names(name: str, known: Iterable[str]) -> str:
    """A hint listing the known names, the ones nearest to ``name`` first."""
    names = sorted(known)
    near = get_close_matches(name, names, n=3, cutoff=0.5)
    if near:
        return "did you mean " + " or ".join(near) + "?"
    return "available: " + ", ".join(names) if names else "none is defined"


def from_os_error(err: OSError, what: str) -> CacheError:
    """Turn an ``OSError`` met while writing ``what`` into a ``CacheError``."""
    if err.errno in (errno.ENOSPC, errno.EDQUOT):
        hint = "free some space, or set DFLASH_CACHE to a folder on another disk"
    elif err.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        hint = "make it writable, or set DFLASH_CACHE to a folder you own"
    else:
        hint = "set DFLASH_CACHE to another folder"
    reason = os.strerror(err.errno) if err.errno else str(err)
    return CacheError(f"cannot write {what}: {reason}", hint=hint)


def run_cli(main: Callable[[], int]) -> int:
    """Call ``main``; print errors the one way every command line here does.

    A polite kill leaves by the same door as Ctrl-C: servers stopped, nothing half-written.
    """
    with contextlib.suppress(ValueError):  # not the main thread, which gets no signals
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        code = main()
        sys.stdout.flush()  # here, where a reader that is gone can still be handled
        return code
    except DFlashError as err:
        print(f"error: {err}", file=sys.stderr)
        return err.exit_code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:
        # The reader (`| head`) is gone; the interpreter's own flush at exit
        # must not fail a second time.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
