"""The container images there are: what each is built from, and its names.

Engine releases come from ``compat_matrix.toml``, variants from the patch sets. The files made
from the list are written by :mod:`ci.images_cli`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from dflash_plugin import patchset
from dflash_plugin.matrix import Build, Engine, Matrix
from dflash_plugin.toml_table import Table, read_toml

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
FOLDER = Path("images")
PINS = FOLDER / "pins.toml"

STOCK = "stock"
VARIANTS = {
    "cuda": (STOCK, "gemma4", "swa", "all"),
    "cpu": (STOCK, "cpu", "gemma4", "swa", "all"),
}
"""By platform. ``stock``: the plugin beside the engine as published; the others are patch sets."""
ACCELERATORS = {"cuda": "cu130", "cpu": "cpu"}
"""Platform of a build in the matrix: what the tag calls it."""
NAMES = {"vllm": "vllm-openai", "sglang": "sglang"}
"""Engine: what its own images are called, and so ours."""
CPU_BASE = "docker.io/library/python:3.11-slim-bookworm"
"""The Python that the recorded runs installed the locks with."""
_CUDA_BASES = {"vllm": ("vllm/vllm-openai", "0.20.0"), "sglang": ("lmsysorg/sglang", "0.5.20")}
"""Engine: where its own images are, and the first release whose plain tag is for CUDA 13."""
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
RESOLVED, NOT_RESOLVED = "resolved", "not resolved"


@dataclass(frozen=True)
class Image:
    """One image: what it is built from, and its names.

    ``series_sha256``: of its patch set; empty for ``stock``. ``lock``: of a CPU image, as are
    ``torch`` and ``torchvision``, which is empty where the engine does without.
    """

    engine: str
    version: str
    platform: str
    variant: str
    base: str
    series_sha256: str
    torch: str
    torchvision: str
    lock: str

    @property
    def accelerator(self) -> str:
        """As the tag has it."""
        return ACCELERATORS[self.platform]

    @property
    def tag(self) -> str:
        """Name and tag, without a registry."""
        name = NAMES[self.engine]
        return f"{name}:{self.version}-dflash-{self.variant}-{self.accelerator}"

    @property
    def target(self) -> str:
        """Its target in the bake file, where a name has no dots."""
        version = self.version.replace(".", "-")
        return f"{self.engine}-{version}-{self.variant}-{self.accelerator}"

    @property
    def dockerfile(self) -> Path:
        """Its Dockerfile, which has a stage by the name of each platform."""
        return FOLDER / f"{self.engine}.Dockerfile"

    def args(self, pins: Mapping[str, str]) -> dict[str, str]:
        """Build arguments of the Dockerfile; the base with its digest where that is known."""
        digest = pins.get(self.base, "")
        return {
            "BASE": f"{self.base}@{digest}" if digest else self.base,
            "BASE_NAME": self.base,
            "BASE_DIGEST": digest,
            "ENGINE_VERSION": self.version,
            "VARIANT": self.variant,
            "SERIES_SHA256": self.series_sha256,
            **({"TORCH": self.torch, "LOCK": self.lock} if self.lock else {}),
            **({"TORCHVISION": self.torchvision} if self.lock and self.torchvision else {}),
        }


def expand(data: Matrix, patches: Path) -> list[Image]:
    """Every image: engine releases in the matrix's order, each with the variants it has.

    A release whose CPU build has no lock has no CPU image.
    """
    sets = set(patchset.available(patches))
    found = []
    for engine in sorted(data.engines.values(), key=lambda e: (e.name, Version(e.version))):
        for platform in ACCELERATORS:
            build = engine.builds.get(platform)
            if build is None or (platform == "cpu" and not build.lock):
                continue
            for variant in VARIANTS[platform]:
                if variant == STOCK or (engine.name, engine.version, variant) in sets:
                    found.append(_image(engine, build, variant, patches))
    return found


def _image(engine: Engine, build: Build, variant: str, patches: Path) -> Image:
    series = ""
    if variant != STOCK:
        series = patchset.load(patches, engine.name, engine.version, variant).sha256
    cpu = build.platform == "cpu"
    return Image(
        engine=engine.name,
        version=engine.version,
        platform=build.platform,
        variant=variant,
        base=CPU_BASE if cpu else _cuda_base(engine),
        series_sha256=series,
        torch=build.torch,
        torchvision=build.torchvision or "",
        lock=build.lock or "" if cpu else "",
    )


def _cuda_base(engine: Engine) -> str:
    """The engine's own image for CUDA 13: the plain tag since CUDA 12 is gone, `-cu130` before."""
    repository, first = _CUDA_BASES[engine.name]
    suffix = "" if Version(engine.version) >= Version(first) else "-cu130"
    return f"docker.io/{repository}:v{engine.version}{suffix}"


def bases(built: Sequence[Image]) -> list[str]:
    """The base images, once each, in the order in which they are used first."""
    return list(dict.fromkeys(image.base for image in built))


def read_pins(path: Path) -> dict[str, str]:
    """Digest by base image; empty: not resolved.

    Raises:
        MatrixError: a key, digest or status that is not as this program writes it.
    """
    top = Table(path, "top level", read_toml(path))
    pins: dict[str, str] = {}
    for table in top.tables("base"):
        name, status = table.take("name", str), table.take("status", str)
        digest = table.take("digest", str, default="")
        table.finish()
        if name in pins:
            raise table.error(f"{name} is pinned twice", hint="python -m ci images --write")
        if digest and not DIGEST.fullmatch(digest):
            raise table.error(f"digest is {digest!r}, expected sha256: and 64 digits")
        wanted = RESOLVED if digest else NOT_RESOLVED
        if status != wanted:
            raise table.error(f"status is {status!r}, expected {wanted!r}")
        pins[name] = digest
    top.finish()
    return pins


def command(image: Image, pins: Mapping[str, str], plugin_version: str) -> list[str]:
    """The `docker build` that does what the bake target does, where there is no buildx."""
    args = {**image.args(pins), "PLUGIN_VERSION": plugin_version}
    given = [part for key, value in args.items() for part in ("--build-arg", f"{key}={value}")]
    where = ["--file", image.dockerfile.as_posix(), "--target", image.platform, "--tag", image.tag]
    return ["docker", "build", *where, *given, "."]


def plugin_version(root: Path) -> str:
    """The one version number."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project["version"])


def cell_for(image: Image, data: Matrix) -> str:
    """A cell of a tiny pair that tests ``image``; empty if the matrix has none."""
    for cell in data.cells:
        variant = cell.variant.patches or (STOCK if cell.variant.plugin else None)
        key = (cell.engine.name, cell.engine.version, cell.platform, variant)
        fits = key == (image.engine, image.version, image.platform, image.variant)
        if fits and cell.pair.replica and not cell.not_run:
            return cell.id
    return ""
