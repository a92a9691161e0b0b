"""The wheel of this checkout, built the way users get it, and a hash of what goes into it."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from dflash_plugin.errors import EnvironmentBuildError, MissingDependencyError

from .installer import Pip

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

CHECKOUT = Path(__file__).parents[1]
_LARGE = 1 << 20
"""Bytes from which a file counts by size and time of change: weights take seconds to read."""
_EPOCH = "1577836800"
"""The date of every file in the wheel (2020-01-01): equal sources give equal bytes."""


def sources(checkout: Path) -> Iterator[Path]:
    """The files a wheel is made from, as ``pyproject.toml`` names them, sorted."""
    pyproject = checkout / "pyproject.toml"
    config = tomllib.loads(pyproject.read_text(encoding="utf-8"))
    project = config["project"]
    wheel = config.get("tool", {}).get("hatch", {}).get("build", {}).get("targets", {})
    wheel = wheel.get("wheel", {})
    named = [*wheel.get("packages", ()), *wheel.get("force-include", {})]
    named += [*project.get("license-files", ())]
    readme = project.get("readme")
    named += [readme["file"] if isinstance(readme, dict) else readme] if readme else []
    found = {pyproject}
    for name in named:
        path = checkout / name
        found.update(p for p in (path.rglob("*") if path.is_dir() else (path,)) if p.is_file())
    return (path for path in sorted(found) if "__pycache__" not in path.parts)


def source_hash(checkout: Path) -> str:
    """Changes when anything changes that goes into the wheel; milliseconds."""
    digest = hashlib.sha256()
    for path in sources(checkout):
        state = path.stat()
        if state.st_size >= _LARGE:
            content = f"{state.st_size} {state.st_mtime_ns}"
        else:
            content = hashlib.sha256(path.read_bytes()).hexdigest()
        digest.update(f"{path.relative_to(checkout)} {content}\n".encode())
    return digest.hexdigest()


def install_wheel(checkout: Path, sources_hash: str, pip: Pip) -> None:
    """Build the wheel of ``checkout`` and install it, without its dependencies.

    Raises:
        DFlashError: as :func:`build_wheel`.
    """
    pip.install("--no-deps", str(build_wheel(checkout, sources_hash, pip, pip.scratch / "wheel")))


def build_wheel(checkout: Path, sources_hash: str, pip: Pip, folder: Path) -> Path:
    """Build the wheel of ``checkout`` in ``folder``, which has no other; returns its path.

    Raises:
        MissingDependencyError: no hatchling.
        EnvironmentBuildError: pip or hatchling failed, or the sources are not (or no longer)
            those of ``sources_hash``.
    """
    if importlib.util.find_spec("hatchling") is None:
        raise MissingDependencyError(
            f"{sys.executable} has no hatchling, which builds dflash-plugin's wheel",
            hint=f"{sys.executable} -m pip install hatchling",
        )
    argv = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    epoch = os.environ.get("SOURCE_DATE_EPOCH", _EPOCH)
    pip.call([*argv, "--wheel-dir", str(folder), str(checkout)], SOURCE_DATE_EPOCH=epoch)
    wheels = list(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise EnvironmentBuildError(
            f"building the wheel of {checkout} gave {len(wheels)} files, expected one",
            hint=f"the whole output is in {pip.log}",
        )
    if source_hash(checkout) != sources_hash:
        raise EnvironmentBuildError(
            f"files in {checkout} changed while its wheel was built", hint="run it again"
        )
    return wheels[0]
