"""A fault at every file operation: the tree is old or new, and the next command settles it."""

from __future__ import annotations

import errno
import functools
import itertools
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from patch_trees import ENGINE, PATCHED, snapshot, unpack, write_set

from dflash_plugin import patchset
from dflash_plugin.engines import PATCH_STAGING as STAGING
from dflash_plugin.errors import DFlashError
from dflash_plugin.patchset import Files

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Power cuts cannot be tested here: what is on the disk is what was written."""
    monkeypatch.setattr(os, "fsync", lambda fd: None)


class Killed(BaseException):
    """The process is gone: nothing runs after it, no clean-up either."""


class Faulty(Files):
    """Counts operations; at ``fault`` it fails, or dies and stays dead.

    A write that dies leaves half a file. ``twice``: the next one fails too, as undoing begins.
    ``full``: from there on, writing fails, as on a full disk.
    """

    def __init__(self, fault: int, kind: str) -> None:
        self.fault, self.kind, self.count = fault, kind, 0

    def _step(self, name: str, partial: Callable[[], None] = lambda: None) -> None:
        self.count += 1
        if self.kind == "kill" and self.count >= self.fault:
            if self.count == self.fault:
                partial()
            raise Killed
        last = self.fault + (self.kind == "twice")
        if self.kind in ("fail", "twice") and self.fault <= self.count <= last:
            partial()
            raise OSError(errno.EIO, "Input/output error")
        if self.kind == "full" and self.count >= self.fault and name in ("mkdir", "write", "link"):
            partial()
            raise OSError(errno.ENOSPC, "No space left on device")

    def mkdir(self, path: Path) -> None:
        self._step("mkdir")
        super().mkdir(path)

    def write(self, path: Path, data: bytes, mode: int) -> None:
        self._step("write", lambda: path.write_bytes(data[: len(data) // 2]) and None)
        super().write(path, data, mode)

    def link(self, source: Path, target: Path) -> None:
        self._step("link")
        super().link(source, target)

    def rename(self, source: Path, target: Path) -> None:
        self._step("rename")
        super().rename(source, target)

    def unlink(self, path: Path) -> None:
        self._step("unlink")
        super().unlink(path)

    def rmdir(self, path: Path) -> None:
        self._step("rmdir")
        super().rmdir(path)

    def sync(self, folder: Path) -> None:
        self._step("sync")
        super().sync(folder)


Act = Callable[[patchset.Tree, Files], object]


@contextmanager
def engine(steps: list[dict[str, str]]) -> Iterator[tuple[patchset.Tree, patchset.PatchSet]]:
    with tempfile.TemporaryDirectory() as folder:
        write_set(Path(folder) / "patches", steps)
        found = patchset.load(Path(folder) / "patches", "vllm", "0.24.0", "swa")
        yield patchset.site_tree(unpack(Path(folder) / "site", steps[0]), "vllm"), found


def run(tree: patchset.Tree, act: Act, files: Faulty) -> str:
    try:
        act(tree, files)
    except Killed:
        return "killed"
    except DFlashError as err:
        return f"error: {err}"
    return "done"


def apply(patches: patchset.PatchSet, tree: patchset.Tree, files: Files) -> None:
    patchset.apply(tree, patches, files)


def settled(tree: patchset.Tree) -> dict[str, bytes]:
    patchset.status(tree, tree.root)
    assert not (tree.root / STAGING).exists()
    return snapshot(tree.root)


@pytest.mark.parametrize("what", ["apply", "revert"])
@pytest.mark.parametrize("kind", ["kill", "fail", "twice", "full"])
def test_old_or_new_after_a_fault_at_each_operation(kind, what):
    fault, seen = 1, set()
    while True:
        with engine([ENGINE, PATCHED]) as (tree, patches):
            act: Act = patchset.revert
            stock = snapshot(tree.root)
            patchset.apply(tree, patches)
            before, after = snapshot(tree.root), stock
            if what == "apply":
                act = functools.partial(apply, patches)
                patchset.revert(tree)
                before, after = after, before
            assert snapshot(tree.root) == before
            files = Faulty(fault, kind)
            said = run(tree, act, files)
            if kind in ("fail", "full") and said != "done":
                assert "nothing was changed" in said
            now = settled(tree)
            assert now in (before, after), (fault, said)
            assert said != "done" or now == after
            assert "nothing was changed" not in said or now == before
            seen.add(now == after)
            if files.count < fault:
                break
            fault += 1
    assert fault > 30
    assert seen == {True, False}


@pytest.mark.parametrize("second", ["kill", "fail"])
def test_recovery_itself_can_be_stopped_anywhere(second):
    stops = range(1, 80, 13)
    for first in stops:
        fault = 1
        while True:
            with engine([ENGINE, PATCHED]) as (tree, patches):
                old = snapshot(tree.root)
                patchset.apply(tree, patches)
                new = snapshot(tree.root)
                patchset.revert(tree)
                run(tree, functools.partial(apply, patches), Faulty(first, "kill"))
                files = Faulty(fault, second)
                run(tree, lambda t, f: patchset.status(t, t.root, f), files)
                assert settled(tree) in (old, new)
                if files.count < fault:
                    break
                fault += 3


texts = st.lists(st.sampled_from(["a\n", "b\n", "c\n", "é\n", "\n", "\x0c\n", " x\n"]), max_size=25)
trees = st.dictionaries(
    st.sampled_from([f"vllm/{name}.py" for name in ("a", "b", "sub/c", "sub/deep/d", "e[1]")]),
    st.tuples(texts, st.sampled_from(["", "no newline"])).map(lambda t: "".join(t[0]) + t[1]),
    max_size=5,
)


@settings(max_examples=40, suppress_health_check=list(HealthCheck))
@given(
    st.lists(trees, min_size=2, max_size=4).filter(
        lambda steps: all(a != b for a, b in itertools.pairwise(steps))
    ),
    st.sampled_from(["kill", "fail", "twice", "full"]),
    st.integers(1, 90),
    st.integers(1, 90),
)
def test_random_trees_and_patches_are_never_left_half_patched(steps, kind, fault, undone):
    with engine(steps) as (tree, patches):
        old = snapshot(tree.root)
        said = run(tree, functools.partial(apply, patches), Faulty(fault, kind))
        now = settled(tree)
        if now == old:
            assert said != "done"
            patchset.apply(tree, patches)
        new = snapshot(tree.root)
        assert {p: d.decode() for p, d in new.items() if p.endswith(".py")} == dict(steps[-1])
        assert now in (old, new)
        assert patchset.status(tree, tree.root).edited == ()
        run(tree, patchset.revert, Faulty(undone, kind))
        assert settled(tree) in (old, new)
        if snapshot(tree.root) == new:
            patchset.revert(tree)
        assert snapshot(tree.root) == old


@pytest.mark.parametrize("step", [3, 12, 20, 25])
def test_a_process_that_is_really_killed(step):
    program = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom dflash_plugin import patchset\n"
        "class Dies(patchset.Files):\n    left = int(sys.argv[3])\n"
        "    def __getattribute__(self, name):\n"
        "        if name in ('mkdir', 'write', 'link', 'rename', 'unlink', 'rmdir', 'sync'):\n"
        "            Dies.left -= 1\n"
        "            if not Dies.left:\n                os.kill(os.getpid(), signal.SIGKILL)\n"
        "        return object.__getattribute__(self, name)\n"
        "tree = patchset.site_tree(Path(sys.argv[1]), 'vllm')\n"
        "patchset.apply(tree, patchset.load(Path(sys.argv[2]), 'vllm', '0.24.0', 'swa'), Dies())"
    )
    with engine([ENGINE, PATCHED]) as (tree, patches):
        old = snapshot(tree.root)
        command = [sys.executable, "-c", program, tree.root, tree.root.parent / "patches", step]
        done = subprocess.run([*map(str, command)], cwd=ROOT, check=False)
        assert done.returncode == -signal.SIGKILL
        now = settled(tree)
        if now != old:
            assert patchset.revert(tree).variant == "swa"
        assert snapshot(tree.root) == old
        patchset.apply(tree, patches)


def test_what_must_be_on_the_disk_first():
    """After a power cut the disk has what was synced, and perhaps what came after."""
    trace: list[tuple[str, str]] = []

    class Traced(Files):
        def write(self, path: Path, data: bytes, mode: int) -> None:
            trace.append(("write", path.name))
            super().write(path, data, mode)

        def rename(self, source: Path, target: Path) -> None:
            trace.append(("rename", str(target)))
            super().rename(source, target)

        def unlink(self, path: Path) -> None:
            trace.append(("unlink", path.name))
            super().unlink(path)

        def sync(self, folder: Path) -> None:
            trace.append(("sync", str(folder)))
            super().sync(folder)

    with engine([ENGINE, PATCHED]) as (tree, patches):
        patchset.apply(tree, patches, Traced())
        staging = tree.root / STAGING
        journal = staging / "journal.json"
        begins, ends = trace.index(("rename", str(journal))), trace.index(("unlink", journal.name))
        # The new files, then the journal, then the changes, then the journal goes.
        last = max(i for i, (what, _) in enumerate(trace) if what == "write")
        assert ("sync", str(staging)) in trace[last:begins]
        moved = [
            i for i, (what, _) in enumerate(trace[begins + 1 :], begins + 1) if what == "rename"
        ]
        assert ("sync", str(staging)) in trace[begins : moved[0]]
        assert ("sync", str(tree.root)) in trace[begins : moved[0]]
        folders = {str(Path(trace[i][1]).parent) for i in moved}
        synced = {where for what, where in trace[moved[-1] : ends] if what == "sync"}
        assert folders - {str(staging)} <= synced
