"""Every patch set on the real files of its release, with the tool that users have; one cell."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from cell_runs import harness

from ci import engine_sources, patch_files, patches
from ci.engine_sources import Tree
from ci.records import FAILED, PASSED
from dflash_plugin import patchset
from dflash_plugin.patchset.distinfo import record_hash

SETS = [
    pytest.param(tree, variant, id=f"{tree.id}-{variant}")
    for name in patch_files.ENGINES
    for tree in engine_sources.trees(name)
    for engine, version, variant in patchset.available(patch_files.ROOT)
    if (engine, version) == (name, tree.version)
]
BUILT = [param for param in SETS if param.values[0].python is not None]


@pytest.mark.parametrize(
    ("engine", "versions"),
    [
        ("vllm", {"0.18.1", "0.19.1", "0.20.2", "0.24.0", "0.30.0", "0.32.0"}),
        ("sglang", {"0.5.18", "0.5.19", "0.5.20", "0.5.21", "0.5.22", "0.5.23"}),
    ],
)
def test_no_release_is_left_out(engine: str, versions: set[str]) -> None:
    missing = versions - {tree.version for tree in engine_sources.trees(engine)}
    if missing:
        how = f"python -m ci env {engine}-VERSION, or python -m ci patches --fetch"
        pytest.skip(f"not at hand: {', '.join(sorted(missing))} ({how})")


def part_of(tree: Tree, variant: str, folder: Path) -> Path:
    """The files that a set touches, and the metadata: what the tool needs of an installation."""
    one = patchset.load(patch_files.ROOT, tree.engine, tree.version, variant)
    for path in one.paths:
        (folder / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(tree.site / path, folder / path)
    (info,) = tree.site.glob(f"{tree.distribution.replace('-', '_')}-*.dist-info")
    shutil.copytree(info, folder / info.name)
    record = folder / info.name / "RECORD"
    if not record.exists():  # a part of a wheel
        rows = [(path, (folder / path).read_bytes()) for path in one.paths]
        rows.append((f"{info.name}/METADATA", (info / "METADATA").read_bytes()))
        lines = [f"{path},{record_hash(data)},{len(data)}" for path, data in rows]
        record.write_text("\n".join([*lines, f"{info.name}/RECORD,,\n"]))
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


@pytest.mark.parametrize(("tree", "variant"), SETS)
def test_applied_reverted_and_applied_again(tree: Tree, variant: str, tmp_path: Path) -> None:
    if (tree.distribution, variant) == ("vllm", "cpu"):
        pytest.skip("not for CUDA wheels")
    engine = patchset.site_tree(part_of(tree, variant, tmp_path / "site"), tree.engine)
    one = patchset.load(patch_files.ROOT, tree.engine, tree.version, variant)
    published = contents(engine.root)
    patchset.apply(engine, one)
    patched = contents(engine.root)
    assert {path for path in one.paths if patched[path] == published[path]} == set()
    status = patchset.status(engine, patch_files.ROOT)
    assert (status.variant, status.current, status.edited) == (variant, True, ())
    assert status.version == f"{tree.version}+dflash.{variant}"
    assert status.replaces_shims == one.replaces_shims
    patchset.revert(engine)
    assert contents(engine.root) == published
    patchset.apply(engine, one)
    assert contents(engine.root) == patched


@pytest.mark.parametrize(
    ("tree", "variant"), [param for param in SETS if param.values[1] == patch_files.ALL]
)
def test_commits_of_a_set_are_exported_as_it_is(tree: Tree, variant: str, tmp_path: Path) -> None:
    """In a checkout laid out as the engine's own: SGLang's package is below ``python/``."""
    one = patchset.load(patch_files.ROOT, tree.engine, tree.version, variant)
    repo = tmp_path / "repo"
    package = repo / ("python" if tree.engine == "sglang" else "")
    for path in one.paths:
        (package / path).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(tree.site / path, package / path)
    git = ["git", "-C", str(repo), "-c", "user.name=A", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "The release"]):
        subprocess.run([*git, *command], check=True)
    checkout = patchset.git_tree(repo, tree.engine)
    assert patchset.import_set(checkout, one).rewritten == ()
    patchset.export_set(checkout, tmp_path / "out")
    written = patch_files.ROOT / tree.engine / tree.version / variant
    assert contents(tmp_path / "out") == contents(written)


@pytest.mark.parametrize(("tree", "variant"), SETS)
def test_the_files_are_what_git_writes_for_these_sources(tree: Tree, variant: str) -> None:
    row = patches.check(tree, variant, imports=False)
    assert FAILED not in row.checks.values(), row.notes


@pytest.mark.parametrize(
    ("tree", "variant"), [param for param in BUILT if param.values[1] == patch_files.ALL]
)
def test_patched_modules_are_imported_with_every_repair(tree: Tree, variant: str) -> None:
    row = patches.check(tree, variant, imports=True)
    assert row.checks["imports"] == PASSED, row.notes


def test_a_patched_cell_is_lossless_and_faithful_without_the_plugin(tmp_path: Path) -> None:
    cell = "vllm-0.32.0/patched-all/cpu/tiny-qwen3-mixed"
    run = harness(tmp_path, "check", cell, "--profile", "tiny")
    assert run.exit_code == 0, run.output[-3000:]
    assert run.result["lossless"]["status"] == "passed"
    assert run.result["faithful"]["status"] == "passed"
