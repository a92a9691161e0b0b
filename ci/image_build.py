"""An image of ``images/``, built with plain `docker build` on this machine, or pulled.

What a build needs from the machine comes from environment variables, so that every command that
may build an image finds it:

    DFLASH_IMAGE_BASE    another base for CPU images, e.g. one imported where no registry is reached
    DFLASH_CA_BUNDLE     certificates of a network with its own, a build secret; else those that
                         this machine's pip or requests is told of
    DFLASH_PIP_CONF      pip's configuration, for an index of one's own; a build secret
    DFLASH_TORCH_INDEX   where torch comes from: an address, or `none`

Without an index of CPU builds of torch, this machine's pip is asked for its wheel, as for the
other environments, and the build gets it as an image that is a folder of wheels.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dflash_plugin import cache, matrix
from dflash_plugin.errors import (
    CacheError,
    ImageMissingError,
    MissingDependencyError,
    UnknownCellError,
    UsageError,
    near_names,
)
from dflash_plugin.matrix import Cell

from . import containers, images, wheel
from .environment import Container, Environment, Wanted
from .images import ROOT, Image
from .installer import Pip, Progress
from .torch_index import torch_index

RECIPE = "dflash.recipe"
"""Label of an image built here: a hash of all that it was built from."""
INSTALL = images.FOLDER / "install.sh"
_CERTIFICATES = ("DFLASH_CA_BUNDLE", "PIP_CERT", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")
_BUILDKIT_INSIDE = 23
"""The first Docker client that has no BuildKit of its own, but asks its buildx plugin."""


def ensure(cell: Cell, wanted: Wanted) -> Environment:
    """The environment of ``cell`` in its image, which is pulled or built if it is not there.

    An image that was built here is built again when a file that goes into it has changed.

    Raises:
        UsageError: the cell has no image.
        ImageMissingError: the registry does not have it.
        EnvironmentBuildError, DockerUnavailableError, CacheError: it cannot be built.
    """
    image = of_cell(cell)
    client = containers.connect()
    try:
        if wanted.registry:
            found = _pulled(client, wanted.registry + image.tag)
        else:
            found = _built(client, image)
        names = ("torch", "transformers", cell.build.distribution, "dflash-plugin")
        versions = containers.packages(client, found.id, names)
    finally:
        client.close()
    name = wanted.registry + image.tag
    given = Container(name, found.id, wanted.memory, wanted.cpus, gpu=image.platform == "cuda")
    plugin = cell.variant.plugin
    return Environment(
        "image", Path("python3"), cell.engine.id, plugin, versions, Path(found.id), given
    )


def of_cell(cell: Cell) -> Image:
    """The image that a cell runs in: that of its patch set, else ``stock``.

    ``stock`` has the plugin, which a cell without it leaves unloaded.
    """
    variant = cell.variant.patches or images.STOCK
    for image in images.expand(matrix.load(), ROOT / "patches"):
        key = (image.engine, image.version, image.platform, image.variant)
        if key == (cell.engine.name, cell.engine.version, cell.platform, variant):
            return image
    raise UsageError(
        f"{cell.id}: there is no image of {cell.engine.id} on {cell.platform} with {variant}",
        hint="python -m ci images lists them; without --env image the cell runs as it did",
    )


def by_tag(tag: str) -> Image:
    """The image of that name, or of that target in the bake file.

    Raises:
        UnknownCellError: there is none.
    """
    found = images.expand(matrix.load(), ROOT / "patches")
    for image in found:
        if tag in (image.tag, image.target):
            return image
    raise UnknownCellError(f"no image {tag!r}", hint=near_names(tag, [i.tag for i in found]))


def _pulled(client: Any, name: str) -> Any:
    docker_errors = containers.sdk().errors
    with containers.errors(name):
        try:
            return client.images.get(name)
        except docker_errors.ImageNotFound:
            pass
        try:
            with Progress(f"pulling {name}"):
                return client.images.pull(name)
        except docker_errors.APIError as err:
            found = containers.refused(name, err)
            if isinstance(found, CacheError):
                raise found from err
            raise ImageMissingError(
                f"{name}: not on this machine, and its registry does not give it: "
                f"{containers.said(err)}",
                hint="check --registry, or leave it out and the image is built here",
            ) from err


def _built(client: Any, image: Image) -> Any:
    docker_errors = containers.sdk().errors
    with containers.errors(image.tag):
        try:
            found = client.images.get(image.tag)
            if found.labels.get(RECIPE) == recipe(image):
                return found
        except docker_errors.ImageNotFound:
            pass
    build(image)
    with containers.errors(image.tag):
        return client.images.get(image.tag)


def build(image: Image) -> None:
    """Build ``image`` from this checkout; its log is in the cache.

    Raises:
        MissingDependencyError: no Docker client that builds with BuildKit.
        UsageError: an environment variable names a file that is not there.
        EnvironmentBuildError: the build failed; with its last lines and the log's path.
        CacheError: disk full.
    """
    docker = builder()
    name = image.target
    log = cache.make_dir(cache.cache_dir() / "logs") / f"image-{name}.log"
    with (
        cache.locked(f"image-{name}"),
        tempfile.TemporaryDirectory(prefix="dflash-image-") as folder,
        (cache.cache_dir() / "locks" / f"image-{name}.pip.lock").open("a+b") as lock,
        Progress(f"building {image.tag}") as progress,
    ):
        context, scratch = Path(folder, "context"), cache.make_dir(Path(folder, "scratch"))
        log.write_bytes(b"")
        run = Pip(Path(folder, "none", "python"), log, lock, scratch, progress)
        sources = wheel.source_hash(wheel.CHECKOUT)
        wheel.build_wheel(wheel.CHECKOUT, sources, run, context / "dist")
        for file in _sources(image):
            (context / file).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / file, context / file)
        command = [docker, *build_command(image)[1:]]
        if image.platform == "cpu":
            index = torch_index()
            command += ["--build-arg", f"TORCH_INDEX={index or ''}"]
            if index is None:
                command += ["--build-arg", f"WHEELS={_wheels(image, run, docker)}"]
        run.call([*command, str(context)], DOCKER_BUILDKIT="1", BUILDKIT_PROGRESS="plain")


def build_command(image: Image) -> list[str]:
    """`docker build` with all but the context and where torch comes from.

    Raises:
        UsageError: an environment variable names a file that is not there.
    """
    pins = images.read_pins(ROOT / images.PINS)
    command = images.command(image, pins, images.plugin_version(ROOT))[:-1]
    command[command.index("--file") + 1] = str(ROOT / image.dockerfile)
    command += ["--label", f"{RECIPE}={recipe(image)}"]
    base = os.environ.get("DFLASH_IMAGE_BASE")
    if base and image.platform == "cpu":
        command += ["--build-arg", f"BASE={base}"]
    for name, variables in (("ca", _CERTIFICATES), ("pip", ("DFLASH_PIP_CONF",))):
        variable = next((v for v in variables if os.environ.get(v)), None)
        if variable is None:
            continue
        path = os.environ[variable]
        if not Path(path).is_file():
            raise UsageError(f"{variable}={path}: no such file", hint="name one, or unset it")
        command += ["--secret", f"id={name},src={path}"]
    return command


def _wheels(image: Image, run: Pip, docker: str) -> str:
    """An image that is a folder with the wheels of torch that this machine's pip finds."""
    wanted = {"torch": image.torch, "torchvision": image.torchvision}
    wanted = {name: version for name, version in wanted.items() if version}
    name = "dflash-wheels:" + "-".join(f"{key}-{version}" for key, version in wanted.items())
    if not _said(docker, "image", "inspect", name):
        folder = run.scratch / "wheels"
        pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder)]
        run.call([*pip, *(f"{key}=={version}" for key, version in wanted.items())])
        archive = run.scratch / "wheels.tar"
        with tarfile.open(archive, "w") as tar:
            tar.add(folder, arcname=".")
        run.call([docker, "import", str(archive), name])
    return name


def _sources(image: Image) -> Iterator[Path]:
    """The files of this checkout that a build reads, beside the wheel."""
    yield INSTALL
    if image.lock:
        yield Path("ci", "locks", image.lock)


def recipe(image: Image) -> str:
    """A hash of the image's definition and of every file that goes into it; milliseconds."""
    pins = images.read_pins(ROOT / images.PINS)
    texts = [(ROOT / file).read_text("utf-8") for file in (image.dockerfile, *_sources(image))]
    facts = [image.args(pins), texts, wheel.source_hash(wheel.CHECKOUT)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def builder() -> str:
    """A Docker client that builds with BuildKit: by its buildx plugin, or by itself (before 23).

    Raises:
        MissingDependencyError: no client on the path does.
    """
    seen = []
    for folder in os.get_exec_path():
        client = shutil.which("docker", path=folder)
        if client is None:
            continue
        if _said(client, "buildx", "version"):
            return client
        version = _said(client, "--version")
        seen.append(f"{client} ({version})")
        digits = version.removeprefix("Docker version ").partition(".")[0]
        if digits.isdigit() and int(digits) < _BUILDKIT_INSIDE:
            return client
    raise MissingDependencyError(
        f"no Docker client that builds with BuildKit; found {', '.join(seen) or 'none'}",
        hint="install the plugin docker-buildx, or as root: images/engine.sh start",
    )


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""
