"""The CUDA stages as far as they go without their bases of 10 GB: on the wheels' Python files.

A stand-in has the files of the CUDA wheel that the patches look at, its metadata, and an entry
point. So the wheel, the patch set, the labels and the size are real; the engine never starts.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from test_cells import ADDED

from ci import containers, engine_sources, image_build, images, wheel_sources
from ci.images import Image
from dflash_plugin.errors import DownloadError

ROOT = Path(__file__).parents[2]
TAGS = ["vllm-openai:0.33.0-dflash-all-cu130", "sglang:0.5.23-dflash-stock-cu130"]
SITE = "/engine/lib/python3.11/site-packages/"
STAND_IN = f"""\
FROM {{base}}
RUN python3 -m venv /engine
COPY wheel packages {SITE}
ENV PATH=/engine/bin:$PATH
ENTRYPOINT ["of", "the", "base"]
"""


def docker(*args: str) -> None:
    done = subprocess.run(
        [image_build.builder(), *args],
        env={"DOCKER_BUILDKIT": "1", "BUILDKIT_PROGRESS": "plain", "HOME": str(Path.home())},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module", params=TAGS)
def built(
    request: pytest.FixtureRequest, client: Any, base: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[tuple[Image, str]]:
    """(what it should be, the name of what was built on the stand-in)."""
    image = image_build.by_tag(request.param)
    context = tmp_path_factory.mktemp("context")
    record = f"{image.engine}-{image.version}.dist-info/RECORD"
    wanted = engine_sources.files(image.engine) | {record}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(wheel_sources, "folder", lambda: context)
        try:
            wheel_sources.fetch(image.engine, image.version, wanted).rename(context / "wheel")
        except DownloadError as err:
            pytest.skip(f"not run: {err}")
    spec = find_spec("packaging")
    assert spec and spec.origin
    # What the engine brings, and the plugin's wheel needs.
    shutil.copytree(Path(spec.origin).parent, context / "packages" / "packaging")
    (context / "Dockerfile").write_text(STAND_IN.format(base=base))
    stand_in, name = "dflash-stand-in:test", f"dflash-test-{image.tag}"
    docker("build", "--tag", stand_in, str(context))

    pip = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--quiet"]
    subprocess.run([*pip, "--wheel-dir", str(context / "dist"), str(ROOT)], check=True)
    (context / "images").mkdir()
    shutil.copy(ROOT / image_build.INSTALL, context / image_build.INSTALL)
    command = image_build.build_command(image)[1:]
    command[command.index("--tag") + 1] = name
    docker(*command, "--build-arg", f"BASE={stand_in}", str(context))
    yield image, name
    for tag in (name, stand_in):
        client.images.remove(tag, force=True)


def test_it_is_labelled_and_keeps_the_entry_point(client: Any, built: tuple[Image, str]) -> None:
    image, name = built
    found = client.images.get(name)
    assert found.labels["dflash.engine.version"] == image.version
    assert found.labels["dflash.patches.sha256"] == image.series_sha256
    assert found.labels["dflash.plugin.version"] == images.plugin_version(ROOT)
    assert found.labels["org.opencontainers.image.base.name"] == image.base
    config = found.attrs["Config"]
    assert config["User"] == "2000:0"
    assert config["Healthcheck"]["Test"]
    own = ["python3", "-m", "sglang.launch_server", "--host", "0.0.0.0", "--port", "8000"]
    assert config["Entrypoint"] == (["of", "the", "base"] if image.engine == "vllm" else own)


def test_the_patch_set_is_in_the_wheels_files(client: Any, built: tuple[Image, str]) -> None:
    image, name = built
    status = containers.output(client, name, "-m", "dflash_plugin.cli", "patch", "status")
    assert ("not patched" in status) == (image.variant == images.STOCK), status
    if image.variant != images.STOCK:
        containers.output(client, name, "-m", "dflash_plugin.cli", "patch", "check")


def test_little_is_added(client: Any, built: tuple[Image, str]) -> None:
    layers = client.images.get(built[1]).history()
    (size,) = [layer["Size"] for layer in layers if "/install.sh" in layer["CreatedBy"]]
    assert 0 < size <= ADDED
