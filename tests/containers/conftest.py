"""A real Docker daemon, or "not run". Everything that is started is looked for afterwards."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from ci import containers, image_build, images
from dflash_plugin.errors import DockerUnavailableError

ROOT = Path(__file__).parents[2]
FAKE = "dflash-fake-engine:test"
"""The stand-in of tests/fake_engine in an image."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.container)
            item.add_marker(pytest.mark.timeout(2700))


@pytest.fixture(scope="session")
def client() -> Iterator[Any]:
    try:
        found = containers.connect()
    except DockerUnavailableError:
        pytest.skip("not run: no Docker daemon (`make test-containers` starts one)")
    yield found
    found.close()


@pytest.fixture(autouse=True)
def nothing_left(client: Any) -> Iterator[None]:
    """No container, network or volume more than before."""

    def there() -> tuple[set[str], set[str], set[str]]:
        return (
            {c.id for c in client.containers.list(all=True)},
            {n.id for n in client.networks.list()},
            {v.id for v in client.volumes.list()},
        )

    before = there()
    yield
    assert there() == before, "left behind"


@pytest.fixture(scope="session")
def base() -> str:
    """The base of CPU images."""
    return os.environ.get("DFLASH_IMAGE_BASE") or images.CPU_BASE


@pytest.fixture(scope="session")
def fake_image(client: Any, base: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """An image whose engine is the stand-in; it takes seconds to build."""
    context = tmp_path_factory.mktemp("context")
    shutil.copytree(ROOT / "tests" / "fake_engine", context / "fake_engine")
    (context / "Dockerfile").write_text(
        f"FROM {base}\n"
        "COPY fake_engine /fake_engine\n"
        "WORKDIR /fake_engine\n"
        "VOLUME /var/cache/engine\n"
        "USER 2000:0\n"
        'ENTRYPOINT ["python3", "-m", "vllm.entrypoints.openai.api_server"]\n'
    )
    subprocess.run(
        [image_build.builder(), "build", "--quiet", "--tag", FAKE, str(context)],
        check=True,
        capture_output=True,
    )
    yield FAKE
    client.images.remove(FAKE, force=True)
