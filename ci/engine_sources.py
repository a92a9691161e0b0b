"""Where the Python files of engine releases are to be had: built layers, unpacked wheels.

``DFLASH_WHEEL_SOURCES`` names a folder of unpacked wheels, ``<distribution>-<version>/vllm/…``;
their Python files are enough. It is how releases get here that this machine has no build of.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

from packaging.version import Version

from dflash_plugin import matrix

from . import environment

VARIABLE = "DFLASH_WHEEL_SOURCES"
_FOLDER = re.compile(r"(vllm(?:-cpu)?)-(\d+(?:\.\d+)+)")


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
    unpacked = os.environ.get(VARIABLE)
    for path in sorted(Path(unpacked).glob("*/vllm")) if unpacked else ():
        match = _FOLDER.fullmatch(path.parent.name)
        if match:
            tree = Tree(match[2], match[1], path.parent, None)
            found.setdefault(tree.id, tree)
    chosen = [tree for tree in found.values() if version in (None, tree.version)]
    return sorted(chosen, key=lambda tree: (Version(tree.version), tree.distribution))
