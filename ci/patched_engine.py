"""A layer that has an engine's files once more, patched: the layer below is not touched.

Files are hard links but for those that the patches touch and the metadata, which are copies.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Collection
from functools import partial
from importlib.metadata import Distribution
from pathlib import Path

from dflash_plugin import patchset
from dflash_plugin.errors import EnvironmentBuildError
from dflash_plugin.matrix import Engine
from dflash_plugin.patchset import PatchSet

from .installer import Pip
from .layers import Layer, read


def layer(root: Path, below: Layer, engine: Engine, platform: str, variant: str) -> Layer:
    """The patched engine on the layer that has it as published.

    Args:
        root: the folder of layers.
        variant: of the patch set, e.g. ``cpu``.

    Raises:
        PatchVersionError: there is no such set for this release.
        PatchError: it is malformed.
    """
    patches = patchset.load(patchset.patches_dir(), engine.name, engine.version, variant)
    distribution = engine.builds[platform].distribution
    key = hashlib.sha256(f"{below.name}\n{patches.sha256}".encode()).hexdigest()[:10]
    name = f"{engine.id}-{platform}-patched-{variant}-{key}"
    install = partial(_install, root / below.name, distribution, patches)
    return Layer(name, install, below.reports)


def _install(below: Path, distribution: str, patches: PatchSet, pip: Pip) -> None:
    built = read(below)
    assert built is not None, "layers are built from below"
    own = pip.python.parents[1] / built.site.relative_to(below)
    copy_engine(built.site, own, patches.engine, distribution, patches.paths)
    patchset.apply(patchset.site_tree(own, patches.engine), patches)


def copy_engine(
    source: Path, target: Path, package: str, distribution: str, touched: Collection[str]
) -> None:
    """An engine's top-level package and metadata in another site-packages, on the same disk.

    Args:
        touched: paths below ``source`` that are copied; the rest is linked.
    """
    info = next(
        (Path(str(d._path)) for d in Distribution.discover(path=[str(source)])  # type: ignore[attr-defined]
         if d.metadata["Name"] == distribution),
        None,
    )  # fmt: skip
    if info is None or not (source / package).is_dir():
        raise EnvironmentBuildError(
            f"{source}: no {distribution} with a package {package}",
            hint="python -m ci env --list, and remove the layer",
        )
    copies = {source / path for path in touched}

    def place(old: str, new: str) -> str:
        if Path(old) in copies:
            return str(shutil.copy2(old, new))
        try:
            os.link(old, new)
        except OSError:  # another disk, or one without links
            shutil.copy2(old, new)
        return new

    shutil.copytree(source / package, target / package, copy_function=place, symlinks=True)
    shutil.copytree(info, target / info.name)
