"""How a server in a real container can end, each told apart. The engine is a stand-in."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from ci import containers
from ci.environment import Container, Environment
from ci.serve import ServerSpec, serve_all
from dflash_plugin import matrix
from dflash_plugin.errors import (
    ContainerKilledError,
    ContainerMemoryError,
    EngineExitedError,
    ImageMissingError,
    PortInUseError,
)
from tests.fake_engine import fake_model
from tests.unit.ci_fake import make_pair

MEMORY = 256 << 20


@pytest.fixture(name="spec")
def spec_fixture(client: Any, fake_image: str, tmp_path: Path) -> Any:
    """Makes the spec of a server in a container."""
    make_pair(tmp_path)
    cell = matrix.load().cell("vllm-0.32.0/plugin/cpu/tiny-qwen3")

    def make(
        draft: bool = True, image: str | None = None, faults: Any = (), **changes: Any
    ) -> ServerSpec:
        (tmp_path / "target" / fake_model.FAULTS).write_text(json.dumps(faults))
        found = client.images.get(fake_image)
        given = Container(fake_image, image or found.id, MEMORY, 1.0, gpu=False)
        environment = Environment(
            "image", Path("python3"), "vllm-0.32.0", True, {}, Path(found.id), given
        )
        values: dict[str, Any] = {
            "cell": cell,
            "environment": environment,
            "target": tmp_path / "target",
            "draft": tmp_path / "draft" if draft else None,
            "num_speculative_tokens": 4,
            "dtype": "float32",
            "log": tmp_path / f"server-{draft}.log",
            "record": tmp_path / "blocks.jsonl" if draft else None,
            **changes,
        }
        return ServerSpec(**values)

    return make


def ours(client: Any) -> list[Any]:
    return client.containers.list(filters={"label": containers.OWNER})


def test_it_serves_as_a_process_does(client: Any, spec: Any, tmp_path: Path) -> None:
    with serve_all([spec(draft=False), spec()], timeout=60) as (base, dflash):
        prompt = base.chat_prompt("hello")
        assert base.complete(prompt, 8).token_ids == dflash.complete(prompt, 8).token_ids
        assert dflash.acceptance(4).drafts > 0
        assert len((tmp_path / "blocks.jsonl").read_text().splitlines()) > 0
        for container in ours(client):
            given = container.attrs["HostConfig"]
            assert given["Memory"] == given["MemorySwap"] == MEMORY
            assert given["NanoCpus"] == 10**9
            assert given["NetworkMode"] in ("default", "bridge")
            assert container.attrs["Config"]["User"] == f"{os.getuid()}:0"
            mounts = {m["Destination"]: m for m in container.attrs["Mounts"]}
            for place in (containers.TARGET, containers.DRAFT, containers.IN_RECORDER):
                assert place not in mounts or mounts[place]["RW"] is False
            assert container.name.startswith("dflash-vllm-0.32.0.plugin.cpu.tiny-qwen3-")
    assert ours(client) == []
    assert "fake engine: serving" in (tmp_path / "server-True.log").read_text()


def test_killed(client: Any, spec: Any) -> None:
    with (
        pytest.raises(ContainerKilledError, match="killed by signal 9 from outside"),
        serve_all([spec()], timeout=60),
    ):
        ours(client)[0].kill("SIGKILL")


def test_killed_in_a_request(client: Any, spec: Any) -> None:
    slow = spec(faults=[{"fault": "slow", "seconds": 5}])
    with (
        pytest.raises(ContainerKilledError, match="killed by signal 9 from outside"),
        serve_all([slow], timeout=60) as (server,),
    ):
        threading.Timer(1, lambda: ours(client)[0].kill("SIGKILL")).start()
        server.complete([1, 2, 3], 8)


def test_removed(client: Any, spec: Any) -> None:
    with (
        pytest.raises(ContainerKilledError, match="removed from outside"),
        serve_all([spec()], timeout=60),
    ):
        ours(client)[0].remove(force=True, v=True)


def test_out_of_memory(client: Any, spec: Any) -> None:
    greedy = spec(faults=[{"fault": "greedy"}])
    with (
        pytest.raises(ContainerMemoryError, match="out of memory: the container was given 0"),
        serve_all([greedy], timeout=60),
    ):
        pytest.fail("ready")


def test_an_engine_that_ends_is_told_as_ever(spec: Any) -> None:
    broken = spec(faults=[{"fault": "exit", "lines": 3, "code": 7}])
    with (
        pytest.raises(EngineExitedError, match="exited with code 7") as caught,
        serve_all([broken], timeout=60),
    ):
        pytest.fail("ready")
    assert caught.value.drafting
    assert "| fake engine: line 2" in caught.value.message


def test_port_clash(spec: Any) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        # Past the harness's own look at the port: it may be taken a moment later.
        server = containers.ContainerServer(
            spec(), other.getsockname()[1], spec().environment.container
        )
        try:
            with pytest.raises(PortInUseError, match="address already in use"):
                server.start()
        finally:
            server.end()


def test_image_missing(spec: Any) -> None:
    missing = spec(image="sha256:" + "0" * 64)
    with pytest.raises(ImageMissingError, match="No such image"), serve_all([missing]):
        pytest.fail("ready")


def test_what_a_killed_harness_left_is_removed_by_the_next(
    client: Any, spec: Any, fake_image: str
) -> None:
    gone = subprocess.run(
        [sys.executable, "-c", "import os; print(os.getpid())"],
        capture_output=True,
        text=True,
        check=True,
    )
    for pid in (int(gone.stdout), os.getpid()):
        client.containers.create(fake_image, labels={containers.OWNER: containers.owner(pid)})
    containers.remove_orphans(client)
    left = client.containers.list(all=True, filters={"label": containers.OWNER})
    assert [c.labels[containers.OWNER] for c in left] == [containers.owner(os.getpid())]
    left[0].remove(v=True)


def test_interrupted(client: Any, spec: Any) -> None:
    with pytest.raises(KeyboardInterrupt), serve_all([spec()], timeout=60):
        assert len(ours(client)) == 1
        raise KeyboardInterrupt
    assert ours(client) == []
    time.sleep(0.1)  # its log's follower ends by itself
