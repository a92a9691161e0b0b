"""``python -m ci images``: the list, and the files made from it.

The bake file, ``pins.toml`` and the table of docs/images.md are written from one list
(:mod:`ci.images`), so they cannot disagree.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from dflash_plugin import matrix
from dflash_plugin.cache import atomic_write_text
from dflash_plugin.errors import DFlashError, UsageError, VerdictFailedError

from . import image_build, images
from .images import ACCELERATORS, DIGEST, NOT_RESOLVED, PINS, RESOLVED, Image
from .records import FAILED, CellResult, load_json

BAKE, PAGE = images.FOLDER / "docker-bake.hcl", Path("docs/images.md")
RESULTS = Path("docs/results")
BEGIN, END = "<!-- images:begin (python -m ci images --write) -->", "<!-- images:end -->"
WRITTEN = "# Written by `python -m ci images --write`; not edited.\n"
RESOLVE_SECONDS = 60


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


def bake_text(built: Sequence[Image], pins: Mapping[str, str], plugin_version: str) -> str:
    """The bake file: a group per accelerator, a target per image."""
    groups = {name: [i for i in built if i.accelerator == name] for name in ACCELERATORS.values()}
    blocks = [
        WRITTEN
        + "# From the repository's root: docker buildx bake -f images/docker-bake.hcl cpu\n",
        '# Such as "ghcr.io/someone/".\nvariable "REGISTRY" {\n  default = ""\n}\n',
        '# Commit and address of the sources, for the labels.\nvariable "REVISION" {\n'
        '  default = ""\n}\n',
        'variable "SOURCE" {\n  default = ""\n}\n',
        _block("group", "default", {"targets": ["cpu"]}),
        *(_block("group", k, {"targets": [i.target for i in v]}) for k, v in groups.items()),
        'target "_common" {\n  context = "."\n  args = {\n'
        f'    PLUGIN_VERSION = "{plugin_version}"\n    REVISION       = REVISION\n'
        "    SOURCE         = SOURCE\n  }\n}\n",
    ]
    for image in built:
        args = image.args(pins)
        width = max(map(len, args))
        lines = "\n".join(f'    {name:<{width}} = "{value}"' for name, value in args.items())
        blocks.append(
            f'target "{image.target}" {{\n  inherits   = ["_common"]\n'
            f'  dockerfile = "{image.dockerfile.as_posix()}"\n'
            f'  target     = "{image.platform}"\n'
            f'  tags       = ["${{REGISTRY}}{image.tag}"]\n  args = {{\n{lines}\n  }}\n}}\n'
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
    built: Sequence[Image], pins: Mapping[str, str], runs: Mapping[str, Sequence[str]]
) -> list[str]:
    """The Markdown table of images: what each is made from, and the runs that are recorded."""
    lines = ["| image | patches | base | pinned | built and run |", "|---|---|---|---|---|"]
    for image in built:
        patches = f"`{image.series_sha256[:12]}`" if image.series_sha256 else "–"
        digest = pins.get(image.base, "")
        pinned = f"`{digest[:19]}`" if digest else NOT_RESOLVED
        run = "<br>".join(runs.get(image.tag, ["not run"]))
        lines.append(f"| `{image.tag}` | {patches} | `{image.base}` | {pinned} | {run} |")
    return lines


def texts(built: Sequence[Image], pins: Mapping[str, str], root: Path) -> dict[Path, str]:
    """What the written files have to be, by path below ``root``.

    Raises:
        UsageError: docs/images.md has not the two lines between which its table goes.
    """
    page = (root / PAGE).read_text(encoding="utf-8")
    if page.count(BEGIN) != 1 or page.count(END) != 1 or page.index(BEGIN) > page.index(END):
        raise UsageError(f"{PAGE}: no {BEGIN} … {END} block", hint="put the two lines back")
    head, tail = page.split(BEGIN)[0], page.split(END)[1]
    block = "\n".join(table(built, pins, recorded(root)))
    return {
        BAKE: bake_text(built, pins, images.plugin_version(root)),
        PINS: pins_text(images.bases(built), pins),
        PAGE: f"{head}{BEGIN}\n\n{block}\n\n{END}{tail}",
    }


def stale(root: Path) -> Iterator[str]:
    """Written files that are not what they would be written as now, one line each."""
    built = images.expand(matrix.load(), root / "patches")
    for path, text in texts(built, images.read_pins(root / PINS), root).items():
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
        image_build.build(image_build.by_tag(args.build))
        return 0
    built = images.expand(matrix.load(), images.ROOT / "patches")
    path = images.ROOT / PINS
    pins = images.read_pins(path) if path.exists() else {}
    if args.write or args.resolve:
        return _write(built, pins, asking=args.resolve)
    chosen = [i for i in built if args.accelerator in (None, i.accelerator)]
    if args.check:
        problems = [*stale(images.ROOT), *(_unpinned(chosen, pins) if args.pinned else ())]
        print(*problems, sep="\n", end="\n" if problems else "")
        if problems:
            raise VerdictFailedError(f"{len(problems)} problem(s)", hint="see the lines above")
        return 0
    if args.json:
        print(json.dumps([_as_json(image, pins) for image in chosen], indent=1))
    else:
        print(*(image.tag for image in chosen), sep="\n")
    return 0


def _write(built: Sequence[Image], pins: Mapping[str, str], *, asking: bool) -> int:
    found, failed = dict(pins), []
    for name in images.bases(built) if asking else ():
        try:
            found[name] = resolve(name)
        except UsageError as err:
            failed.append(err.message)
    for file, text in texts(built, found, images.ROOT).items():
        atomic_write_text(images.ROOT / file, text)
        print(f"wrote {file.as_posix()}")
    print(*failed, sep="\n", end="\n" if failed else "", file=sys.stderr)
    if failed:
        raise VerdictFailedError(
            f"{len(failed)} of {len(images.bases(built))} base images were not resolved",
            hint="run it where docker buildx reaches their registry; known digests are kept",
        )
    return 0


def _unpinned(built: Sequence[Image], pins: Mapping[str, str]) -> Iterator[str]:
    for name in images.bases(built):
        if not pins.get(name):
            yield f"{PINS.as_posix()}: {name}: {NOT_RESOLVED}: python -m ci images --resolve"


def _as_json(image: Image, pins: Mapping[str, str]) -> dict[str, Any]:
    return {
        **asdict(image),
        "cell": images.cell_for(image, matrix.load()),
        "tag": image.tag,
        "target": image.target,
        "accelerator": image.accelerator,
        "base_status": RESOLVED if pins.get(image.base) else NOT_RESOLVED,
        "command": images.command(image, pins, images.plugin_version(images.ROOT)),
    }
