"""images/engine.sh where nothing is to be done, and where nothing may be."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "images" / "engine.sh"


def run(
    folder: Path, *args: str, docker: str, uid: int = 1000, **more: str
) -> subprocess.CompletedProcess[str]:
    """The script with a `docker` and a user of the test's making."""
    tools = folder / "bin"
    tools.mkdir()
    for name, code in (("docker", docker), ("id", f"echo {uid}"),
                       ("dockerd", more.pop("dockerd", "exit 9")),
                       ("debootstrap", "exit 9")):  # fmt: skip
        if code:
            (tools / name).write_text(f"#!/bin/sh\n{code}\n")
            (tools / name).chmod(0o755)
    env = {"PATH": f"{tools}:/usr/bin:/bin", "HOME": str(folder), **more}
    return subprocess.run(
        ["sh", str(SCRIPT), *args], env=env, capture_output=True, text=True, check=False
    )


@pytest.mark.parametrize("what", ["start", "base", "stop"])
def test_what_is_there_is_used(tmp_path: Path, what: str) -> None:
    done = run(tmp_path, what, docker="exit 0")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize(
    ("docker", "given", "base"),
    [
        ('test "$1" = image', {}, "dflash-base:bookworm"),  # made before
        ("exit 1", {"DFLASH_IMAGE_BASE": "mine:1"}, "mine:1"),
    ],
)
def test_the_base_that_is_to_be_named(
    tmp_path: Path, docker: str, given: dict[str, str], base: str
) -> None:
    done = run(tmp_path, "base", docker=docker, **given)
    assert (done.returncode, done.stdout) == (0, f"{base}\n")


@pytest.mark.parametrize("what", ["start", "base"])
def test_who_is_not_root_is_told(tmp_path: Path, what: str) -> None:
    done = run(tmp_path, what, docker="exit 1")
    assert done.returncode == 1
    assert "needs root" in done.stderr


def test_nothing_is_installed_where_that_is_not_wanted(tmp_path: Path) -> None:
    done = run(tmp_path, "start", docker="exit 1", dockerd="", DFLASH_INSTALL="no", uid=0)
    assert done.returncode == 1
    assert "no dockerd (package docker.io), and nothing is installed here" in done.stderr


def test_a_daemon_that_does_not_start_is_not_waited_for(tmp_path: Path) -> None:
    done = run(tmp_path, "start", docker="exit 1", uid=0, dockerd="echo no permission; exit 1")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].endswith("dockerd does not answer: no permission")


def test_a_daemon_that_is_not_ours_is_not_stopped(tmp_path: Path) -> None:
    assert run(tmp_path, "stop", docker="exit 0", uid=0).returncode == 0


def test_usage(tmp_path: Path) -> None:
    done = run(tmp_path, docker="exit 0")
    assert done.returncode == 2
    assert "engine.sh base" in done.stdout
