"""Where the Python files of engine releases are to be had: built layers, parts of wheels.

:func:`fetch` gets what the patches need of wheels that this machine has no build of.
``DFLASH_WHEEL_SOURCES`` names a folder of wheels unpacked by hand,
``<distribution>-<version>/vllm/…``; their Python files are enough.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from dflash_plugin import matrix, shims

from . import environment, wheel_sources

VARIABLE = "DFLASH_WHEEL_SOURCES"
_FOLDER = re.compile(r"(vllm(?:-cpu)?)-(\d+(?:\.\d+)+(?:\.post\d+)?)")


@dataclass(frozen=True)
class Tree:
    """One release's files. ``python``: an interpreter that runs it, if there is one."""

    version: str
    distribution: str
    site: Path
    python: Path | None

    @property
    def id(self) -> str:
        """``<distribution>-<version>``."""
        return f"{self.distribution}-{self.version}"


def trees(version: str | None = None) -> list[Tree]:
    """Every tree of vLLM at hand, oldest release first, built layers before unpacked wheels.

    Args:
        version: of this release only.
    """
    found: dict[str, Tree] = {}
    for engine in matrix.load().engines.values():
        for build in engine.builds.values() if engine.name == "vllm" else ():
            built = environment.built_engine(engine, build.platform)
            if built is not None:
                tree = Tree(engine.version, build.distribution, built.site, built.python)
                found.setdefault(tree.id, tree)
    by_hand = os.environ.get(VARIABLE)
    folders = [Path(by_hand)] if by_hand else []
    for path in (p for f in [*folders, wheel_sources.folder()] for p in sorted(f.glob("*/vllm"))):
        match = _FOLDER.fullmatch(path.parent.name)
        if match:
            tree = Tree(match[2], match[1], path.parent, None)
            found.setdefault(tree.id, tree)
    chosen = [tree for tree in found.values() if version in (None, tree.version)]
    return sorted(chosen, key=lambda tree: (Version(tree.version), tree.distribution))


def fetch(version: str | None = None, distribution: str = "vllm") -> list[Path]:
    """Get the sources that the shims look at, of every build that is not made here.

    Args:
        version: of this release of ``distribution`` instead.

    Raises:
        DownloadError: not to be had.
    """
    wanted = [(distribution, version)] if version else [
        (build.distribution, engine.version)
        for engine in matrix.load().engines.values()
        for build in engine.builds.values()
        if engine.name == "vllm" and build.lock is None
    ]  # fmt: skip
    return [wheel_sources.fetch(name, release, _files()) for name, release in wanted]


def _files() -> set[str]:
    """Every file that some shim changes or knows a source in."""
    modules = set()
    for shim in map(shims.load, shims.NAMES):
        modules |= {shim.module, *(s.rpartition(":")[0] for s in shim.fingerprints if ":" in s)}
    stems = [module.replace(".", "/") for module in modules]
    return {f"{stem}{end}" for stem in stems for end in (".py", "/__init__.py")}
