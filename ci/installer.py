"""Run pip on another environment: echoed to a log, interruptible, errors with their end."""

from __future__ import annotations

import contextlib
import errno
import importlib.metadata
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO

from dflash_plugin.errors import EnvironmentBuildError, MissingDependencyError, from_os_error

_TAIL = 15
"""Lines of pip's output in an error message."""

_GRACE = 3.0
"""Seconds between asking a pip to stop and the next, harder, way of asking."""


class Progress:
    """One line on standard error per step: what, and how many seconds it took."""

    def __init__(self, what: str) -> None:
        self.what = what
        self.live = sys.stderr.isatty()
        self.began = time.monotonic()

    def __enter__(self) -> Progress:
        self.began = time.monotonic()
        self._write(f"{self.what} … ")
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.tick("stopped, " if kind else "", end="\n")

    def tick(self, word: str = "", *, end: str = "") -> None:
        """On a terminal, show the seconds so far; elsewhere only the last word is written."""
        seconds = time.monotonic() - self.began
        if self.live:
            self._write(f"\r{self.what} … {word}{seconds:.0f} s{end}")
        elif end:
            self._write(f"{word}{seconds:.0f} s{end}")

    def note(self, text: str) -> None:
        """A line of its own in between."""
        self._write(f"\n  {text}\n{self.what} … ")

    @staticmethod
    def _write(text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()


def command(python: Path) -> list[str]:
    """The running interpreter's pip, working on the environment of ``python``.

    Raises:
        MissingDependencyError: this interpreter has no pip (made by uv, or cut down by a
            Linux distribution), or one too old to work on another environment.
    """
    try:
        version = importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        raise MissingDependencyError(
            f"{sys.executable} has no pip, which builds the environments",
            hint=f"{sys.executable} -m ensurepip, or `uv pip install pip`, "
            "or your system's python3-pip package",
        ) from None
    if tuple(int(part) for part in version.split(".")[:2]) < (22, 3):
        raise MissingDependencyError(
            f"{sys.executable} has pip {version}; 22.3 or newer is needed (its --python option)",
            hint=f"{sys.executable} -m pip install --upgrade pip",
        )
    return [sys.executable, "-m", "pip", "--python", str(python)]


@dataclass(frozen=True)
class Pip:
    """pip for one layer under construction.

    ``lock`` is the standard input of every process started: the lock it holds lives as long
    as any of them, so that nobody rebuilds the layer under a pip whose starter was killed.
    ``scratch`` is their folder for temporary files.
    """

    python: Path
    log: Path
    lock: IO[bytes]
    scratch: Path
    progress: Progress

    def install(self, *args: str) -> None:
        """``pip install`` into the layer.

        Raises:
            EnvironmentBuildError: it failed; with its last lines and the log's path.
            CacheError: it failed for want of space.
        """
        self.call([*command(self.python), "install", *args])

    def call(self, argv: Sequence[str], **env: str) -> None:
        """Run any command as :meth:`install` does; ``env`` is added to its environment."""
        with self.log.open("ab") as out:
            start = out.tell()
            out.write(f"$ {shlex.join([*(f'{k}={v}' for k, v in env.items()), *argv])}\n".encode())
            out.flush()
            process = subprocess.Popen(
                argv,
                stdin=self.lock,
                stdout=out,
                stderr=subprocess.STDOUT,
                env={**_environ(), "TMPDIR": str(self.scratch), **env},
                # A group of its own: pip starts a second pip, and both must end with us.
                start_new_session=True,
            )
            try:
                while process.poll() is None:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(0.5)
                    self.progress.tick()
            except BaseException:
                _end_group(process)
                raise
        if process.returncode:
            raise self._failure(argv, process.returncode, start)

    def _failure(self, argv: Sequence[str], code: int, start: int) -> Exception:
        text = self.log.read_bytes()[start:].decode(errors="replace")
        if os.strerror(errno.ENOSPC).lower() in text.lower():
            return from_os_error(OSError(errno.ENOSPC, ""), str(self.python.parents[1]))
        tail = "\n".join(f"    {line}" for line in text.strip().splitlines()[1:][-_TAIL:])
        what = " ".join(argv[argv.index("-m") + 1 :][:1]) if "-m" in argv else argv[0]
        return EnvironmentBuildError(
            f"{what} ended with exit code {code} while {self.progress.what}:\n{tail}",
            hint=f"the whole output, and the command to paste, are in {self.log}",
        )


def _environ() -> dict[str, str]:
    """Ours, without what would lead pip or Python astray in another environment."""
    leave = {"PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_PYTHON"}
    kept = {k: v for k, v in os.environ.items() if k not in leave}
    return kept | {
        "PIP_USER": "0",
        "PIP_NO_INPUT": "1",
        "PIP_PROGRESS_BAR": "off",
        "PIP_DISABLE_PIP_VERSION_CHECK": "1",
        "PIP_ROOT_USER_ACTION": "ignore",
    }


def _end_group(process: subprocess.Popen[bytes]) -> None:
    """End a process and all that it started, politely first: pip then tidies up."""
    for sign in (signal.SIGINT, signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(_GRACE)
            break
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
