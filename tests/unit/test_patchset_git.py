"""A patch set as commits of a checkout, and back: the same bytes."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
from patch_trees import ENGINE, FIELDS, PATCHED, snapshot, write_set

from dflash_plugin import patchset
from dflash_plugin.errors import (
    EngineNotFoundError,
    PatchConflictError,
    PatchError,
    PatchStateError,
    UsageError,
)

SECOND = {**PATCHED, "vllm/draft.py": PATCHED["vllm/draft.py"].replace("line 25", "Line 25")}
SET = "vllm/0.24.0/swa"


def git(folder: Path, *args: str, **env: str) -> str:
    done = subprocess.run(
        ["git", "-C", str(folder), *args],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, **env},
    )
    return done.stdout


def checkout(folder: Path, prefix: str = "") -> Path:
    """A repository with the engine in its only commit."""
    for path, text in ENGINE.items():
        target = folder / prefix / path.replace("vllm", "sglang" if prefix else "vllm", 1)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(text.encode())
    git(folder, "init", "-q")
    for name, value in (("user.name", "Some Body"), ("user.email", "some@body.org")):
        git(folder, "config", name, value)
    git(folder, "add", ".")
    git(folder, "commit", "-qm", "Release 0.24.0")
    return folder


def commit(repo: Path, files: dict[str, str], message: str) -> None:
    for path in set(snapshot(repo)) - set(files):
        (repo / path).unlink()
    for path, text in files.items():
        (repo / path).parent.mkdir(parents=True, exist_ok=True)
        (repo / path).write_bytes(text.encode())
    git(repo, "add", "-A")
    git(repo, "commit", "-qm", message)


@pytest.fixture
def repo(tmp_path):
    return checkout(tmp_path / "repo")


@pytest.fixture
def exported(tmp_path, repo) -> Path:
    """The root of a patch set as `export` writes it; the checkout is at its release again."""
    base = git(repo, "rev-parse", "HEAD").strip()
    commit(repo, PATCHED, f"Use the right layers\n\nThey were wrong.\n\n{FIELDS}\n")
    commit(repo, SECOND, f"Say it loud\n\n{FIELDS}\n")
    root = tmp_path / "patches"
    names = patchset.export_set(patchset.git_tree(repo, "vllm"), root / SET, base)
    assert names == ["use-the-right-layers.patch", "say-it-loud.patch"]
    git(repo, "reset", "-q", "--hard", base)
    return root


def load(root: Path) -> patchset.PatchSet:
    return patchset.load(root, *SET.split("/"))


def test_what_is_exported_is_a_patch_set_that_git_and_this_tool_apply(exported, repo):
    found = load(exported)
    assert [patch.subject for patch in found.patches] == ["Use the right layers", "Say it loud"]
    tree = patchset.git_tree(repo, "vllm")
    patchset.apply(tree, found)
    assert {p: d.decode() for p, d in snapshot(repo).items()} == SECOND
    patchset.revert(tree)
    assert git(repo, "status", "--porcelain") == ""
    for patch in found.patches:
        git(repo, "am", "-q", str(exported / SET / patch.name))
    assert {p: d.decode() for p, d in snapshot(repo).items()} == SECOND


def test_export_of_import_is_the_same_bytes(exported, repo, tmp_path):
    series = exported / SET / "series"
    series.write_text("# both runners\n# read it\nuse-the-right-layers.patch\nsay-it-loud.patch\n")
    head = git(repo, "rev-parse", "HEAD").strip()
    tree = patchset.git_tree(repo, "vllm")
    done = patchset.import_set(tree, load(exported))
    assert done.rewritten == ()
    assert git(repo, "branch", "--show-current").strip() == "dflash/vllm-0.24.0-swa" == done.branch
    assert git(repo, "rev-list", "--count", f"{head}..HEAD").strip() == "2"
    assert git(repo, "status", "--porcelain") == ""
    assert {p: d.decode() for p, d in snapshot(repo).items()} == SECOND
    patchset.export_set(tree, tmp_path / "again")
    assert snapshot(tmp_path / "again") == snapshot(exported / SET)
    # The same commits from the same files, whenever and whoever.
    git(repo, "checkout", "-q", head)
    git(repo, "branch", "-qD", done.branch)
    assert patchset.import_set(tree, load(exported)).commits == done.commits


def test_the_users_settings_change_nothing(exported, repo, tmp_path, monkeypatch):
    settings = tmp_path / "gitconfig"
    settings.write_text(
        "[diff]\nnoprefix = true\nalgorithm = patience\ncontext = 9\nmnemonicPrefix = true\n"
        "suppressBlankEmpty = true\nstatGraphWidth = 4\n[color]\nui = always\n"
        "[core]\nautocrlf = input\nabbrev = 5\nquotePath = false\n"
        "[log]\nshowSignature = true\n[commit]\ngpgSign = true\n"
    )
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", str(settings))
    (repo / ".gitattributes").write_text("*.py diff=python -text\n")
    git(repo, "config", "diff.python.xfuncname", "^(line.*)$")
    tree = patchset.git_tree(repo, "vllm")
    assert patchset.import_set(tree, load(exported)).rewritten == ()
    patchset.export_set(tree, tmp_path / "again")
    assert snapshot(tmp_path / "again") == snapshot(exported / SET)


def test_sglang_is_below_python_in_its_repository(tmp_path):
    repo = checkout(tmp_path / "repo", "python")
    old = {path.replace("vllm", "sglang", 1): text for path, text in ENGINE.items()}
    new = {path.replace("vllm", "sglang", 1): text for path, text in PATCHED.items()}
    root = tmp_path / "patches"
    write_set(root, [old, new], engine="sglang", version="0.5.12")
    tree = patchset.git_tree(repo, "sglang")
    found = patchset.load(root, "sglang", "0.5.12", "swa")
    patchset.apply(tree, found)
    assert (repo / "python/sglang/draft.py").read_text() == new["sglang/draft.py"]
    patchset.revert(tree)
    patchset.import_set(tree, found)
    patchset.export_set(tree, tmp_path / "again" / "sglang" / "0.5.12" / "swa")
    again = patchset.load(tmp_path / "again", "sglang", "0.5.12", "swa")
    assert again.patches[0].files == found.patches[0].files


def test_hand_written_patches_are_told(tmp_path, repo):
    """One without the summary of changes applies, and is not what export writes."""
    write_set(tmp_path / "patches", [ENGINE, PATCHED])
    tree = patchset.git_tree(repo, "vllm")
    done = patchset.import_set(tree, load(tmp_path / "patches"))
    assert done.rewritten == ("fix-it-0.patch",)
    patchset.export_set(tree, tmp_path / "again" / SET)
    git(repo, "checkout", "-q", "HEAD~1")
    git(repo, "branch", "-qD", done.branch)
    assert patchset.import_set(tree, load(tmp_path / "again")).rewritten == ()


def unchanged(repo: Path) -> tuple[str, str, dict[str, bytes]]:
    return git(repo, "rev-parse", "HEAD"), git(repo, "for-each-ref"), snapshot(repo)


@pytest.mark.parametrize("what", ["dirty", "branch", "other release", "elsewhere", "patched"])
def test_import_refuses_and_changes_nothing(what, exported, repo):
    tree, found = patchset.git_tree(repo, "vllm"), load(exported)
    error: type[Exception] = PatchStateError
    words = "draft.py"
    if what == "dirty":
        (repo / "vllm/draft.py").write_text("mine\n")
    elif what == "branch":
        git(repo, "branch", "dflash/vllm-0.24.0-swa")
        words = "there is a branch"
    elif what == "patched":
        patchset.apply(tree, found)
        words = "patched already"
    else:
        line = "line 3\n" if what == "other release" else "line 11\n"
        text = ENGINE["vllm/draft.py"].replace(line, "someone's\n")
        commit(repo, {**ENGINE, "vllm/draft.py": text}, "Another release")
        error = PatchConflictError
        words = "hunk 1" if what == "other release" else "its hunks apply"
    before = unchanged(repo)
    with pytest.raises(error, match=words):
        patchset.import_set(tree, found)
    assert unchanged(repo) == before


def test_export_refuses_what_is_no_patch(repo, tmp_path):
    tree, folder = patchset.git_tree(repo, "vllm"), tmp_path / "out"
    base = git(repo, "rev-parse", "HEAD").strip()
    with pytest.raises(UsageError, match="was not made by"):
        patchset.export_set(tree, folder)
    with pytest.raises(UsageError, match="no commit since"):
        patchset.export_set(tree, folder, base)
    commit(repo, PATCHED, "No fields")
    with pytest.raises(PatchError, match=r"no-fields\.patch"):
        patchset.export_set(tree, folder, base)
    git(repo, "commit", "-q", "--amend", "-m", f"Fine\n\n{FIELDS}")
    folder.mkdir()
    (folder / "notes.md").write_text("mine")
    with pytest.raises(UsageError, match=r"notes\.md"):
        patchset.export_set(tree, folder, base)
    assert snapshot(folder) == {"notes.md": b"mine"}


def test_no_checkout(tmp_path):
    with pytest.raises(EngineNotFoundError, match="not a git repository"):
        patchset.git_tree(tmp_path, "vllm")
    with pytest.raises(EngineNotFoundError):
        patchset.git_tree(tmp_path / "nowhere", "vllm")
    git(tmp_path, "init", "-q")
    with pytest.raises(EngineNotFoundError, match="no folder vllm"):
        patchset.git_tree(tmp_path, "vllm")
