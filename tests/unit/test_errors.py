"""Errors: one exit code a class, hints, and what a command line does with them."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from dflash_plugin import errors
from dflash_plugin.errors import DFlashError, VerdictFailedError

ROOT = Path(__file__).resolve().parents[2]
CLASSES = [
    value
    for value in vars(errors).values()
    if isinstance(value, type) and issubclass(value, DFlashError) and value is not DFlashError
]


def ends_with(code: str) -> subprocess.CompletedProcess[str]:
    """Run ``run_cli(main)`` of a ``main`` with that body, in a process of its own."""
    program = (
        "import sys\nfrom dflash_plugin import errors\ndef main():\n"
        + "".join(f"    {line}\n" for line in code.splitlines())
        + "sys.exit(errors.run_cli(main))"
    )
    return subprocess.run(
        [sys.executable, "-c", program],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_every_class_has_an_exit_code_of_its_own():
    codes = {cls: cls.exit_code for cls in CLASSES if cls is not VerdictFailedError}
    assert len(set(codes.values())) == len(codes)
    assert all("exit_code" in vars(cls) for cls in CLASSES)
    assert 0 not in codes.values()
    assert not set(codes.values()) & {VerdictFailedError.exit_code, errors.INTERRUPTED}


def test_codes_are_ones_a_shell_does_not_use():
    # 126 and up mean something to a shell; timeout(1) uses 124.
    assert all(0 < cls.exit_code < 124 for cls in CLASSES)


@pytest.mark.parametrize("cls", CLASSES)
def test_every_class_says_what_it_is_for(cls):
    assert cls.__doc__


def test_published_codes_have_not_changed():
    by_code = {cls.exit_code: cls.__name__ for cls in CLASSES}
    assert by_code[2] == "UsageError"
    assert [by_code[code] for code in range(10, 26)] == [
        "MatrixError",
        "UnknownCellError",
        "ModelNotFoundError",
        "PairMismatchError",
        "CheckpointError",
        "DownloadError",
        "CacheError",
        "EnvironmentBuildError",
        "PortInUseError",
        "EngineExitedError",
        "EngineTimeoutError",
        "EngineNotFoundError",
        "UnsupportedEngineError",
        "RequestError",
        "MissingDependencyError",
        "ReplayError",
    ]


def test_text_has_the_next_step_only_where_there_is_one():
    assert str(DFlashError("broken")) == "broken"
    assert str(DFlashError("broken", hint="mend it")) == "broken\n  next step: mend it"


# --- near names ---


def test_near_names_come_nearest_first():
    assert errors.near_names("qwen3-4", ["smollm2", "qwen3-8b", "qwen3-4b"]) == (
        "did you mean qwen3-4b or qwen3-8b?"
    )


def test_without_a_near_name_all_are_listed_in_order():
    assert errors.near_names("zzz", ["b", "a"]) == "available: a, b"


def test_without_any_name_it_says_so():
    assert errors.near_names("x", []) == "none is defined"


# --- writing fails ---


@pytest.mark.parametrize(
    ("number", "hint"),
    [
        (errno.ENOSPC, "free some space"),
        (errno.EDQUOT, "free some space"),
        (errno.EACCES, "make it writable"),
        (errno.EPERM, "make it writable"),
        (errno.EROFS, "make it writable"),
        (errno.EIO, "another folder"),
    ],
)
def test_an_os_error_becomes_a_cache_error_with_its_remedy(number, hint):
    found = errors.from_os_error(OSError(number, "as the system says"), "the cache")
    assert isinstance(found, errors.CacheError)
    assert "the cache" in found.message
    assert hint in found.hint
    assert "DFLASH_CACHE" in found.hint


def test_an_os_error_without_a_number_keeps_its_text():
    assert "odd" in errors.from_os_error(OSError("odd"), "x").message


# --- run_cli ---


def test_run_cli_passes_the_code_on():
    assert errors.run_cli(lambda: 7) == 7


@pytest.mark.parametrize("cls", CLASSES)
def test_run_cli_prints_an_error_and_returns_its_code(cls, capsys):
    def main() -> int:
        raise cls("broken", hint="mend it")

    assert errors.run_cli(main) == cls.exit_code
    out, err = capsys.readouterr()
    assert (out, err) == ("", "error: broken\n  next step: mend it\n")


def test_run_cli_returns_130_after_ctrl_c(capsys):
    def main() -> int:
        raise KeyboardInterrupt

    assert errors.run_cli(main) == 130
    assert capsys.readouterr().err == "interrupted\n"


def test_run_cli_lets_a_bug_through_as_a_traceback():
    def main() -> int:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        errors.run_cli(main)


@pytest.mark.parametrize("lines", [1, 100_000])  # within the buffer, and beyond it
def test_a_reader_that_is_gone_is_no_error(lines):
    main = (
        "import os\nread, write = os.pipe()\nos.dup2(write, 1)\nos.close(write)\nos.close(read)\n"
        f"for _ in range({lines}):\n    print('text')\nreturn 0"
    )
    done = ends_with(main)
    assert (done.returncode, done.stderr) == (0, "")
