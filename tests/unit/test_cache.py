"""The cache: where it is, writes that are whole or absent, locks between processes."""

from __future__ import annotations

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dflash_plugin import cache
from dflash_plugin.errors import CacheError, UsageError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DFLASH_CACHE", str(tmp_path / "cache"))


def entries(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


# --- where ---


def test_cache_dir_prefers_its_own_variable(monkeypatch, tmp_path):
    monkeypatch.setenv("DFLASH_CACHE", str(tmp_path / "mine"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_dir() == tmp_path / "mine"


def test_cache_dir_follows_xdg_then_home(monkeypatch, tmp_path):
    monkeypatch.delenv("DFLASH_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache.cache_dir() == tmp_path / "xdg" / "dflash-plugin"
    for ignored in ("relative/path", ""):
        monkeypatch.setenv("XDG_CACHE_HOME", ignored)
        assert cache.cache_dir() == tmp_path / ".cache" / "dflash-plugin"


def test_cache_dir_is_absolute(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DFLASH_CACHE", "here")
    assert cache.cache_dir() == tmp_path / "here"


def test_no_home_says_what_to_set(monkeypatch):
    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("DFLASH_CACHE")
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(CacheError, match="DFLASH_CACHE"):
        cache.cache_dir()


def test_cache_path_taken_by_a_file(tmp_path):
    (tmp_path / "cache").write_text("in the way")
    with pytest.raises(CacheError) as caught, cache.locked("x"):
        pass
    assert caught.value.exit_code == 16


# --- files ---


def test_atomic_write_replaces_and_leaves_nothing_else(tmp_path):
    path = tmp_path / "new" / "folder" / "file.json"
    cache.atomic_write_text(path, "one")
    cache.atomic_write_bytes(path, "zwei ü".encode())
    assert path.read_text(encoding="utf-8") == "zwei ü"
    assert entries(path.parent) == ["file.json"]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
@pytest.mark.parametrize(
    ("raised", "expected"),
    [
        (OSError(errno.ENOSPC, "No space left on device"), CacheError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_atomic_write_failing_keeps_the_old_content(
    tmp_path, monkeypatch, failing, raised, expected
):
    path = tmp_path / "file"
    path.write_text("old")

    def fail(*_args):
        raise raised

    monkeypatch.setattr(*((os, "fsync") if failing == "fsync" else (Path, "replace")), fail)
    with pytest.raises(expected):
        cache.atomic_write_text(path, "new")
    assert path.read_text() == "old"
    assert entries(tmp_path) == ["file"]


def test_atomic_write_into_a_read_only_folder_names_the_way_out(tmp_path, monkeypatch):
    def refuse(self, *_args, **_kwargs):
        raise PermissionError(errno.EACCES, "Permission denied", str(self))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(CacheError, match="DFLASH_CACHE") as caught:
        cache.atomic_write_text(tmp_path / "file", "x")
    assert "Permission denied" in caught.value.message


# --- folders ---


def test_staged_dir_appears_only_when_complete(tmp_path):
    final = tmp_path / "deep" / "final"
    with cache.staged_dir(final) as staging:
        (staging / "file").write_text("x")
        assert staging.parent == final.parent
        assert not final.exists()
    assert entries(final) == ["file"]
    assert entries(final.parent) == ["final"]


@pytest.mark.parametrize("can_exchange", [True, False])
def test_staged_dir_replaces_a_folder_whole(tmp_path, monkeypatch, can_exchange):
    if not can_exchange:
        monkeypatch.setattr(cache, "_exchange", lambda *_: False)
    final = tmp_path / "final"
    final.mkdir()
    (final / "old").write_text("x")
    with cache.staged_dir(final) as staging:
        (staging / "new").write_text("y")
        assert entries(final) == ["old"]
    assert entries(final) == ["new"]
    assert entries(tmp_path) == ["final"]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="renameat2 is Linux")
def test_exchange_swaps_in_one_step(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        (tmp_path / name / name).touch()
    if not cache._exchange(tmp_path / "a", tmp_path / "b"):
        pytest.skip("this file system cannot exchange folders")
    assert entries(tmp_path / "a") == ["b"]
    assert entries(tmp_path / "b") == ["a"]


@pytest.mark.parametrize(
    "raised", [KeyboardInterrupt(), SystemExit(3), ValueError("x"), ConnectionError("reset")]
)
def test_staged_dir_failing_leaves_the_old_folder(tmp_path, raised):
    final = tmp_path / "final"
    final.mkdir()
    (final / "old").write_text("x")
    with pytest.raises(type(raised)), cache.staged_dir(final) as staging:
        (staging / "half").write_text("y")
        raise raised
    assert entries(final) == ["old"]
    assert entries(tmp_path) == ["final"]


def test_staged_dir_rename_failing_puts_the_old_folder_back(tmp_path, monkeypatch):
    final = tmp_path / "final"
    final.mkdir()
    (final / "old").write_text("x")
    monkeypatch.setattr(cache, "_exchange", lambda *_: False)
    rename, calls = Path.replace, []

    def second_fails(self, to):
        calls.append(to)
        if len(calls) == 2:
            raise OSError(errno.EIO, "Input/output error")
        return rename(self, to)

    monkeypatch.setattr(Path, "replace", second_fails)
    with pytest.raises(CacheError), cache.staged_dir(final):
        pass
    assert entries(final) == ["old"]
    assert entries(tmp_path) == ["final"]


def test_staged_dir_disk_full_is_a_cache_error_and_leaves_nothing(tmp_path):
    with (
        pytest.raises(CacheError, match="free some space") as caught,
        cache.staged_dir(tmp_path / "final") as staging,
    ):
        (staging / "half").write_text("y")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.exit_code == 16
    assert entries(tmp_path) == []


def test_staged_dir_leaves_foreign_os_errors_alone(tmp_path):
    with pytest.raises(FileNotFoundError), cache.staged_dir(tmp_path / "final"):
        (tmp_path / "the user's missing input").read_text()


# --- locks ---

HOLD = """
import sys, time
from pathlib import Path
from dflash_plugin import cache
with cache.locked("thing"):
    Path(sys.argv[1]).mkdir()
    with cache.staged_dir(Path(sys.argv[2])) as staging:
        (staging / "half").write_text("x")
        print("held", flush=True)
        time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock ``thing`` with a staged folder half filled."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "started"), str(tmp_path / "final")],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": str(Path(cache.__file__).parents[1])},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_second_process_waits_says_so_and_sweeps_what_a_kill_left(tmp_path, holder, capsys):
    def leftovers() -> list[str]:
        return [name for name in entries(tmp_path) if name.endswith(".tmp")]

    assert len(leftovers()) == 1
    unrelated = tmp_path / ".final.other.0123abcd.tmp"
    unrelated.mkdir()
    threading.Timer(0.5, holder.send_signal, (signal.SIGKILL,)).start()
    start = time.monotonic()
    with cache.locked("thing", sweep=tmp_path / "final"):
        waited = time.monotonic() - start
        assert leftovers() == [unrelated.name]
    assert waited > 0.4
    assert capsys.readouterr().err == ("waiting for another process that is preparing thing …\n")


def test_interrupted_holder_cleans_up_by_itself(tmp_path, holder):
    holder.send_signal(signal.SIGINT)
    holder.wait(timeout=20)
    assert [name for name in entries(tmp_path) if name.endswith(".tmp")] == []
    assert not (tmp_path / "final").exists()


def test_locks_of_different_names_do_not_wait(holder, capsys):
    with cache.locked("other"):
        pass
    assert capsys.readouterr().err == ""


def test_lock_is_free_again_after_an_exception():
    for _ in range(2):
        with pytest.raises(ValueError, match="boom"), cache.locked("x"):
            raise ValueError("boom")


@pytest.mark.parametrize("name", ["", "../x", "a/b", "a b"])
def test_lock_name_cannot_leave_the_lock_folder(name):
    with pytest.raises(UsageError), cache.locked(name):
        pass


def test_file_system_without_locks_is_a_cache_error(monkeypatch):
    import fcntl

    def no_locks(*_args):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with pytest.raises(CacheError, match="local disk"), cache.locked("x"):
        pass
