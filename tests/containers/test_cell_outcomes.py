"""How a cell in a container can end without a verdict, each with an exit code of its own."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import tempfile
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from container_runs import end, run, start

from ci import containers

CELL = "vllm-0.32.0/plugin/cpu/tiny-qwen3"
NOT_BUILT = "vllm-0.31.0/plugin/cpu/tiny-qwen3"
"""A cell whose image no test builds."""
DISK = "32m"


@pytest.fixture(name="small_daemon")
def small_daemon_fixture(client: Any) -> Iterator[str]:
    """The address of a daemon of its own that has next to no disk."""
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin"])
    dockerd = shutil.which("dockerd", path=path)
    if dockerd is None or os.getuid() != 0:
        pytest.skip("not run: a daemon of its own needs dockerd, and root")
    folder = Path(tempfile.mkdtemp(prefix="dflash-disk-"))  # a socket's path has to be short
    disk = folder / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(disk)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        shutil.rmtree(folder)
        pytest.skip(f"not run: no tmpfs can be mounted here: {done.stderr.strip()}")
    address = f"unix://{folder}/docker.sock"
    options = {
        "data-root": disk, "exec-root": folder / "run", "pidfile": folder / "pid",
        "host": address, "bridge": "none", "iptables": "false",
    }  # fmt: skip
    log = (folder / "log").open("wb")
    # In a network of its own: a daemon without a bridge removes the bridge of the others.
    process = subprocess.Popen(
        ["unshare", "--net", dockerd, *(f"--{key}={value}" for key, value in options.items())],
        stdout=log,
        stderr=subprocess.STDOUT,
    )
    try:
        ask = ["docker", "--host", address, "info"]
        for _ in range(60):
            if subprocess.run(ask, capture_output=True, check=False).returncode == 0:
                break
            assert process.poll() is None, (folder / "log").read_text()[-2000:]
            time.sleep(1)
        yield address
    finally:
        process.terminate()
        process.wait(30)
        log.close()
        subprocess.run(["umount", "--recursive", str(disk)], check=True)
        shutil.rmtree(folder)


def test_no_daemon(tmp_path: Path) -> None:
    code, _, result = run(tmp_path, CELL, DOCKER_HOST=f"unix://{tmp_path}/none.sock")
    assert code == 60
    assert result["status"] == "aborted"
    assert "no Docker daemon answers" in result["reason"]


def test_no_image(tmp_path: Path) -> None:
    code, _, result = run(tmp_path, CELL, "--registry", "localhost:9/")
    assert code == 61
    assert result["status"] == "aborted"
    assert "not on this machine, and its registry does not give it" in result["reason"]


def test_a_build_that_fails(tmp_path: Path) -> None:
    code, output, result = run(tmp_path, NOT_BUILT, DFLASH_IMAGE_BASE="localhost:9/none:1")
    assert code == 17
    assert result["status"] == "aborted"
    assert "ended with exit code 1 while building vllm-openai:0.31.0" in result["reason"]
    assert "localhost:9/none:1" in result["reason"]
    assert "image-vllm-0-31-0-stock-cpu.log" in output


def test_no_disk(tmp_path: Path, small_daemon: str) -> None:
    """What the daemon is given first is a folder of wheels, here with more than its disk holds."""
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    with zipfile.ZipFile(wheels / "torch-2.13.0-py3-none-any.whl", "w") as file:
        info = "torch-2.13.0.dist-info"
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
        file.writestr("torch/weights", os.urandom(64 << 20))
    code, _, result = run(
        tmp_path / "out", CELL, DOCKER_HOST=small_daemon,
        DFLASH_TORCH_INDEX="none", PIP_NO_INDEX="1", PIP_FIND_LINKS=str(wheels),
    )  # fmt: skip
    assert code == 16
    assert result["status"] == "aborted"
    assert "No space left on device" in result["reason"]


def test_the_port_is_taken(client: Any, tmp_path: Path) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        code, _, result = run(tmp_path, CELL, "--port", str(port))
    assert code == 18
    assert result["status"] == "aborted"
    assert f"port {port} on 127.0.0.1 cannot be had" in result["reason"]


def test_too_little_memory(client: Any, tmp_path: Path) -> None:
    code, _, result = run(tmp_path, CELL, "--memory", "0.25")
    assert code == 62
    assert result["status"] == "aborted"
    assert "out of memory: the container was given 0.2 GiB" in result["reason"]


def test_killed_while_it_serves(client: Any, tmp_path: Path) -> None:
    """Its health check, as the image has it, first fails and then sees the server."""
    process = start(tmp_path, CELL)
    codes: list[int] = []
    while process.poll() is None and codes[-1:] != [0]:
        time.sleep(0.5)
        wanted = {"label": f"{containers.CELL}={CELL}", "status": "running"}
        for container in client.containers.list(filters=wanted)[:1]:
            test = container.attrs["Config"]["Healthcheck"]["Test"]
            assert test[0] == "CMD"
            codes.append(container.exec_run(test[1:]).exit_code)
            if codes[-1] == 0:
                container.kill("SIGKILL")
    code, output, result = end(tmp_path, process)
    assert code == 63, output
    assert codes[0] == 1
    assert result["status"] == "aborted"
    assert "killed by signal 9 from outside" in result["reason"]
