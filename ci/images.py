"""``python -m ci images``: the container images there are, and the files made from that list.

Engine releases come from ``compat_matrix.toml``, variants from the patch sets. The bake file,
``pins.toml`` and the table of docs/images.md are written from them, so they cannot disagree.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packaging.version import Version

from dflash_plugin import matrix, patchset
from dflash_plugin.cache import atomic_write_text
from dflash_plugin.errors import DFlashError, UsageError, VerdictFailedError
from dflash_plugin.matrix import Build, Engine, Matrix
from dflash_plugin.toml_table import Table, read_toml

from .records import FAILED, CellResult, load_json

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
FOLDER = Path("images")
BAKE, PINS, PAGE = FOLDER / "docker-bake.hcl", FOLDER / "pins.toml", Path("docs/images.md")
RESULTS = Path("docs/results")
DOCKERFILE = FOLDER / "vllm.Dockerfile"
BEGIN, END = "<!-- images:begin (python -m ci images --write) -->", "<!-- images:end -->"
WRITTEN = "# Written by `python -m ci images --write`; not edited.\n"

STOCK = "stock"
VARIANTS = {
    "cuda": (STOCK, "gemma4", "swa", "all"),
    "cpu": (STOCK, "cpu", "gemma4", "swa", "all"),
}
"""By platform. ``stock``: the plugin beside the engine as published; the others are patch sets."""
ACCELERATORS = {"cuda": "cu130", "cpu": "cpu"}
"""Platform of a build in the matrix: what the tag calls it."""
CPU_BASE = "docker.io/library/python:3.11-slim-bookworm"
"""The Python that the recorded runs installed the locks with."""
DIGEST = re.compile(r"sha256:[0-9a-f]{64}")
RESOLVED, NOT_RESOLVED = "resolved", "not resolved"
RESOLVE_SECONDS = 60


@dataclass(frozen=True)
class Image:
    """One image: what it is built from, and its names.

    ``series_sha256``: of its patch set; empty for ``stock``. ``lock``: of a CPU image.
    """

    engine: str
    version: str
    platform: str
    variant: str
    base: str
    series_sha256: str
    torch: str
    lock: str

    @property
    def accelerator(self) -> str:
        """As the tag has it."""
        return ACCELERATORS[self.platform]

    @property
    def tag(self) -> str:
        """Name and tag, without a registry."""
        return f"{self.engine}-openai:{self.version}-dflash-{self.variant}-{self.accelerator}"

    @property
    def target(self) -> str:
        """Its target in the bake file, where a name has no dots."""
        version = self.version.replace(".", "-")
        return f"{self.engine}-{version}-{self.variant}-{self.accelerator}"

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
            if engine.name != "vllm" or build is None or (platform == "cpu" and not build.lock):
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
        lock=build.lock or "" if cpu else "",
    )


def _cuda_base(engine: Engine) -> str:
    """vLLM's own image for CUDA 13: the plain tag from 0.20.0 on, `-cu130` before."""
    suffix = "" if Version(engine.version) >= Version("0.20.0") else "-cu130"
    return f"docker.io/vllm/vllm-openai:v{engine.version}{suffix}"


def bases(images: Sequence[Image]) -> list[str]:
    """The base images, once each, in the order in which they are used first."""
    return list(dict.fromkeys(image.base for image in images))


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


def pins_text(names: Sequence[str], pins: Mapping[str, str]) -> str:
    """``pins.toml``: one row per base image."""
    rows = [WRITTEN + "# Digests are asked for by `python -m ci images --resolve`.\n"]
    for name in names:
        digest = pins.get(name, "")
        status = RESOLVED if digest else NOT_RESOLVED
        line = f'digest = "{digest}"\n' if digest else ""
        rows.append(f'[[base]]\nname = "{name}"\n{line}status = "{status}"\n')
    return "\n".join(rows)


def resolve(name: str) -> str:
    """The digest that a registry has for ``name`` now.

    Raises:
        UsageError: no docker buildx, or the registry did not answer with a digest.
    """
    command = ["docker", "buildx", "imagetools", "inspect", "--format", "{{.Manifest.Digest}}"]
    try:
        done = subprocess.run(
            [*command, name], capture_output=True, text=True, check=True, timeout=RESOLVE_SECONDS
        )
    except (OSError, subprocess.SubprocessError) as err:
        said = (getattr(err, "stderr", None) or str(err)).strip().splitlines()[-1:]
        raise UsageError(f"{name}: {NOT_RESOLVED}: {' '.join(said)}") from err
    digest = done.stdout.strip()
    if not DIGEST.fullmatch(digest):
        raise UsageError(f"{name}: {NOT_RESOLVED}: docker answered {digest[:80]!r}")
    return digest


def bake_text(images: Sequence[Image], pins: Mapping[str, str], plugin_version: str) -> str:
    """The bake file: a group per accelerator, a target per image."""
    groups = {name: [i for i in images if i.accelerator == name] for name in ACCELERATORS.values()}
    blocks = [
        WRITTEN
        + "# From the repository's root: docker buildx bake -f images/docker-bake.hcl cpu\n",
        '# Such as "ghcr.io/someone/".\nvariable "REGISTRY" {\n  default = ""\n}\n',
        '# Commit and address of the sources, for the labels.\nvariable "REVISION" {\n'
        '  default = ""\n}\n',
        'variable "SOURCE" {\n  default = ""\n}\n',
        _block("group", "default", {"targets": ["cpu"]}),
        *(_block("group", k, {"targets": [i.target for i in v]}) for k, v in groups.items()),
        'target "_common" {\n  context    = "."\n'
        f'  dockerfile = "{DOCKERFILE.as_posix()}"\n  args = {{\n'
        f'    PLUGIN_VERSION = "{plugin_version}"\n    REVISION       = REVISION\n'
        "    SOURCE         = SOURCE\n  }\n}\n",
    ]
    for image in images:
        args = image.args(pins)
        width = max(map(len, args))
        lines = "\n".join(f'    {name:<{width}} = "{value}"' for name, value in args.items())
        blocks.append(
            f'target "{image.target}" {{\n  inherits = ["_common"]\n'
            f'  target   = "{image.platform}"\n'
            f'  tags     = ["${{REGISTRY}}{image.tag}"]\n  args = {{\n{lines}\n  }}\n}}\n'
        )
    return "\n".join(blocks)


def _block(kind: str, name: str, values: Mapping[str, Sequence[str]]) -> str:
    lines = []
    for key, items in values.items():
        inner = "".join(f'    "{item}",\n' for item in items)
        lines.append(f"  {key} = [\n{inner}  ]\n")
    return f'{kind} "{name}" {{\n{"".join(lines)}}}\n'


def recorded(root: Path) -> dict[str, list[str]]:
    """What came out of the recorded runs in containers, by the image's tag."""
    found: dict[str, list[str]] = {}
    data = matrix.load()
    for path in sorted((root / RESULTS).glob("*/*.image.json")):
        result = CellResult.from_json(load_json(path), str(path))
        image = result.environment.get("container")
        if image is None:  # it was not started
            continue
        name = image["image"].rpartition("/")[2]
        known = result.status == FAILED and data.known_failures(result.id)
        words = result.status.replace("_", " ") + (" (known)" if known else "")
        found.setdefault(name, []).append(f"`{result.id}` {words}")
    return found


def table(
    images: Sequence[Image], pins: Mapping[str, str], runs: Mapping[str, Sequence[str]]
) -> list[str]:
    """The Markdown table of images: what each is made from, and the runs that are recorded."""
    lines = ["| image | patches | base | pinned | built and run |", "|---|---|---|---|---|"]
    for image in images:
        patches = f"`{image.series_sha256[:12]}`" if image.series_sha256 else "–"
        digest = pins.get(image.base, "")
        pinned = f"`{digest[:19]}`" if digest else NOT_RESOLVED
        run = "<br>".join(runs.get(image.tag, ["not run"]))
        lines.append(f"| `{image.tag}` | {patches} | `{image.base}` | {pinned} | {run} |")
    return lines


def command(image: Image, pins: Mapping[str, str], plugin_version: str) -> list[str]:
    """The `docker build` that does what the bake target does, where there is no buildx."""
    args = {**image.args(pins), "PLUGIN_VERSION": plugin_version}
    given = [part for key, value in args.items() for part in ("--build-arg", f"{key}={value}")]
    where = ["--file", DOCKERFILE.as_posix(), "--target", image.platform, "--tag", image.tag]
    return ["docker", "build", *where, *given, "."]


def texts(images: Sequence[Image], pins: Mapping[str, str], root: Path) -> dict[Path, str]:
    """What the written files have to be, by path below ``root``.

    Raises:
        UsageError: docs/images.md has not the two lines between which its table goes.
    """
    page = (root / PAGE).read_text(encoding="utf-8")
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise UsageError(f"{PAGE}: no {BEGIN} … {END} block", hint="put the two lines back")
    head, tail = page.split(BEGIN)[0], page.split(END)[1]
    block = "\n".join(table(images, pins, recorded(root)))
    return {
        BAKE: bake_text(images, pins, plugin_version(root)),
        PINS: pins_text(bases(images), pins),
        PAGE: f"{head}{BEGIN}\n\n{block}\n\n{END}{tail}",
    }


def plugin_version(root: Path) -> str:
    """The one version number."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project["version"])


def stale(root: Path) -> Iterator[str]:
    """Written files that are not what they would be written as now, one line each."""
    images = expand(matrix.load(), root / "patches")
    for path, text in texts(images, read_pins(root / PINS), root).items():
        file = root / path
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            yield f"{path.as_posix()}: stale: python -m ci images --write"


def problems(root: Path) -> list[str]:
    """What is wrong in the repository at ``root``, for lint: also why it cannot be known."""
    try:
        return list(stale(root))
    except DFlashError as err:
        return [str(err)]
    except OSError as err:
        return [f"{err.filename}: {err.strerror}"]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of ``python -m ci images``."""
    parser.add_argument(
        "--accelerator", choices=list(ACCELERATORS.values()), help="only the images for this one"
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--build", metavar="IMAGE", help="build this one here, with `docker build`")
    what.add_argument("--json", action="store_true", help="every image with its build arguments")
    what.add_argument("--check", action="store_true", help="whether the written files are fresh")
    what.add_argument("--write", action="store_true", help="write bake file, pins and table")
    what.add_argument(
        "--resolve", action="store_true", help="ask the registries for digests, then --write"
    )
    parser.add_argument(
        "--pinned", action="store_true", help="with --check: every base has to have its digest"
    )


def run(args: argparse.Namespace) -> int:
    """Do what was asked; the exit code."""
    if args.build:
        from . import image_build  # which builds on this module

        image_build.build(image_build.by_tag(args.build))
        return 0
    images = expand(matrix.load(), ROOT / "patches")
    path = ROOT / PINS
    pins = read_pins(path) if path.exists() else {}
    if args.write or args.resolve:
        return _write(images, pins, asking=args.resolve)
    chosen = [i for i in images if args.accelerator in (None, i.accelerator)]
    if args.check:
        problems = [*stale(ROOT), *(_unpinned(chosen, pins) if args.pinned else ())]
        print(*problems, sep="\n", end="\n" if problems else "")
        if problems:
            raise VerdictFailedError(f"{len(problems)} problem(s)", hint="see the lines above")
        return 0
    if args.json:
        print(json.dumps([_as_json(image, pins) for image in chosen], indent=1))
    else:
        print(*(image.tag for image in chosen), sep="\n")
    return 0


def _write(images: Sequence[Image], pins: Mapping[str, str], *, asking: bool) -> int:
    found, failed = dict(pins), []
    for name in bases(images) if asking else ():
        try:
            found[name] = resolve(name)
        except UsageError as err:
            failed.append(err.message)
    for file, text in texts(images, found, ROOT).items():
        atomic_write_text(ROOT / file, text)
        print(f"wrote {file.as_posix()}")
    print(*failed, sep="\n", end="\n" if failed else "", file=sys.stderr)
    if failed:
        raise VerdictFailedError(
            f"{len(failed)} of {len(bases(images))} base images were not resolved",
            hint="run it where docker buildx reaches their registry; known digests are kept",
        )
    return 0


def _unpinned(images: Sequence[Image], pins: Mapping[str, str]) -> Iterator[str]:
    for name in bases(images):
        if not pins.get(name):
            yield f"{PINS.as_posix()}: {name}: {NOT_RESOLVED}: python -m ci images --resolve"


def cell_for(image: Image, data: Matrix) -> str:
    """A cell of a tiny pair that tests ``image``; empty if the matrix has none."""
    for cell in data.cells:
        variant = cell.variant.patches or (STOCK if cell.variant.plugin else None)
        key = (cell.engine.name, cell.engine.version, cell.platform, variant)
        fits = key == (image.engine, image.version, image.platform, image.variant)
        if fits and cell.pair.replica and not cell.not_run:
            return cell.id
    return ""


def _as_json(image: Image, pins: Mapping[str, str]) -> dict[str, Any]:
    return {
        **asdict(image),
        "cell": cell_for(image, matrix.load()),
        "tag": image.tag,
        "target": image.target,
        "accelerator": image.accelerator,
        "base_status": RESOLVED if pins.get(image.base) else NOT_RESOLVED,
        "command": command(image, pins, plugin_version(ROOT)),
    }
