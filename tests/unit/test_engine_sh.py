"""images/engine.sh where nothing is to be done, and where nothing may be."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "images" / "engine.sh"


def run(folder: Path, *args: str, docker: str, uid: int = 1000) -> subprocess.CompletedProcess[str]:
    """The script with a `docker` and a user of the test's making."""
    tools = folder / "bin"
    tools.mkdir()
    for name, code in (("docker", docker), ("id", f"echo {uid}"), ("dockerd", "exit 9"),
                       ("debootstrap", "exit 9")):  # fmt: skip
        (tools / name).write_text(f"#!/bin/sh\n{code}\n")
        (tools / name).chmod(0o755)
    env = {"PATH": f"{tools}:/usr/bin:/bin", "HOME": str(folder)}
    return subprocess.run(
        ["sh", str(SCRIPT), *args], env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("args", [["start"], ["base", "mine:1"], ["stop"]])
def test_what_is_there_is_used(tmp_path: Path, args: list[str]) -> None:
    done = run(tmp_path, *args, docker="exit 0")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("args", [["start"], ["base", "mine:1"]])
def test_who_is_not_root_is_told(tmp_path: Path, args: list[str]) -> None:
    done = run(tmp_path, *args, docker="exit 1")
    assert done.returncode == 1
    assert "needs root" in done.stderr


def test_a_daemon_that_is_not_ours_is_not_stopped(tmp_path: Path) -> None:
    assert run(tmp_path, "stop", docker="exit 0", uid=0).returncode == 0


def test_usage(tmp_path: Path) -> None:
    done = run(tmp_path, docker="exit 0")
    assert done.returncode == 2
    assert "engine.sh base NAME" in done.stdout
