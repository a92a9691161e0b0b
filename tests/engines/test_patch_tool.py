"""The patch command on a real release's files: its own, and how long it takes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from ci.environment import Environment
from dflash_plugin import matrix, patchset

ROUNDS = 5
LIMITS = {"apply": 2.0, "status": 0.5}
"""Seconds, interpreter start included: what is aimed at; the best of the rounds is held to it."""


def patch(*args: object) -> str:
    command = [sys.executable, "-m", "dflash_plugin.cli", "patch", *map(str, args)]
    root = Path(__file__).parents[2]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


@pytest.fixture
def copy(stock_env: Environment, engine: matrix.Engine, tmp_path: Path) -> Path:
    """What the command reads of the release: its metadata, and the files that are patched."""
    found = json.loads(patch("status", "--json", "--python", stock_env.python))
    assert (found["release"], found["variant"], found["edited"]) == (engine.version, None, [])
    site = Path(found["root"])
    (info,) = site.glob("vllm*.dist-info")
    shutil.copytree(info, tmp_path / info.name)
    root = patchset.patches_dir()
    sets = [patchset.load(root, "vllm", engine.version, name) for name in found["variants"]]
    for path in {path for each in sets for path in each.paths if (site / path).exists()}:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(site / path, tmp_path / path)
    return tmp_path


def test_a_release_is_patched_and_back_in_no_time(copy: Path) -> None:
    before = contents(copy)
    seconds: dict[str, list[float]] = {name: [] for name in (*LIMITS, "revert")}
    patched = None
    for _ in range(ROUNDS):
        for name, more in (("apply", ["all"]), ("status", []), ("revert", [])):
            start = time.perf_counter()
            patch(name, *more, "--site-packages", copy)
            seconds[name].append(time.perf_counter() - start)
            if name == "apply":
                patched = patched or contents(copy)
                assert contents(copy) == patched != before
        assert contents(copy) == before
    print(json.dumps({name: [round(s, 2) for s in taken] for name, taken in seconds.items()}))
    slow = {n: min(seconds[n]) for n, limit in LIMITS.items() if min(seconds[n]) > limit}
    assert not slow, f"{slow}, expected at most {LIMITS}"


def test_every_set_of_the_release_there_and_back(copy: Path, tmp_path_factory) -> None:
    """On its files, and as commits: export(import(x)) = x."""
    root, before = patchset.patches_dir(), contents(copy)
    tree = patchset.site_tree(copy, "vllm")
    release = tree.version()
    sets = [found for found in patchset.available(root) if found[:2] == ("vllm", release)]
    assert sets
    repo = shutil.copytree(copy, tmp_path_factory.mktemp("git") / "vllm")
    git = ["git", "-C", str(repo), "-c", "user.name=A", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "vllm"], ["commit", "-qm", "Release"]):
        subprocess.run([*git, *command], check=True)
    for found in sets:
        patches = patchset.load(root, *found)
        patchset.apply(tree, patches)
        assert patchset.status(tree, root).edited == ()
        patchset.revert(tree)
        assert contents(copy) == before
        checkout = patchset.git_tree(repo, "vllm")
        assert patchset.import_set(checkout, patches).rewritten == ()
        out = tmp_path_factory.mktemp("out") / found[2]
        patchset.export_set(checkout, out)
        assert contents(out) == contents(root.joinpath(*found))
        subprocess.run([*git, "checkout", "-q", f"HEAD~{len(patches.patches)}"], check=True)
