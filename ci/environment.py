"""The ``venv:`` environments that cells run in: found, or built once and kept in the cache.

Those of kind ``image:`` are made by :mod:`ci.containers`.

    torch-<version>                one per torch release, below everything else
    └── reference-<key>            transformers and friends: the reference's replay, the tests
    └── torchvision-<key>          for the engines that do not start without it
    └── <engine>-<platform>-<key>  the engine as its lock has it
        └── …-patched-<key>        its files linked, and a patch set applied
        └── …-plugin-<key>         this checkout's wheel beside it, as users install it

A key changes with the lock, torch, Python and the machine, so an environment never changes
under its name. Use ``python -m <module>``, not a console script: scripts start the
interpreter of the layer they lie in, which does not see the layers above.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from packaging.specifiers import SpecifierSet
from packaging.version import Version

from dflash_plugin import cache
from dflash_plugin.errors import (
    EnvironmentBuildError,
    PatchVersionError,
    UnknownCellError,
    UsageError,
    near_names,
)
from dflash_plugin.matrix import Build, Engine

from . import layers, lock, patched_engine, wheel
from .installer import Pip
from .layers import Built, Interpreter, Layer
from .torch_index import install_torch, install_torchvision

KEEP_PLUGIN_LAYERS = 2
"""Per engine build: this edit of the checkout and the one before."""

_PLUGIN = "dflash-plugin"
_PYTHONS = ("3.12", "3.11", "3.13", "3.14", "3.10")
"""In the order in which an error message suggests them."""


@dataclass(frozen=True)
class Wanted:
    """How engines are run in containers.

    ``registry``: where images are pulled from, such as ``ghcr.io/someone/``; empty: they are
    built here. ``memory``: bytes, ``cpus``: cores, of each container.
    """

    registry: str
    memory: int
    cpus: float


@dataclass(frozen=True)
class Container:
    """An image, and what each container of it is given.

    ``id``: of the image. ``memory``: bytes, swap included. ``cpus``: cores.
    """

    image: str
    id: str
    memory: int
    cpus: float
    gpu: bool


@dataclass(frozen=True)
class Environment:
    """Somewhere an engine can be started: the rest of the pipeline needs no more than this.

    ``container`` None: a child process of ``python``; else ``path`` is the image's id.
    """

    kind: str
    python: Path
    engine_id: str
    plugin: bool
    packages: dict[str, str]
    path: Path
    container: Container | None = None


def env_root() -> Path:
    """Where environments are kept: ``envs`` in the cache."""
    return cache.cache_dir() / "envs"


def ensure_engine(
    engine: Engine,
    platform: str,
    *,
    plugin: bool,
    patches: str | None = None,
    root: Path | None = None,
    python: Path | None = None,
) -> Environment:
    """The environment of an engine release, built first if it is not there.

    Args:
        platform: a build of the engine, e.g. ``cpu``.
        plugin: with this checkout's wheel installed beside it.
        patches: with the patch set of this variant; the wheel is installed then too.
        root: where environments are kept; None for the cache.
        python: the interpreter to make them from; None for the running one.

    Raises:
        EnvironmentBuildError: wrong Python for the engine, no lock, or pip failed.
        MissingDependencyError: no pip, or no hatchling for the plugin.
        CacheError: disk full, no permission.
    """
    root = root or env_root()
    base = layers.inspect(python)
    chain = _engine_layers(engine, _build(engine, platform), base)
    if patches is not None:
        chain.append(patched_engine.layer(root, chain[-1], engine, platform, patches))
    if plugin or patches is not None:
        chain.append(_plugin_layer(chain[-1].name, engine, platform))
    built = layers.ensure(root, chain, base)
    if plugin or patches is not None:
        _prune_plugins(built)
    return Environment("venv", built.python, engine.id, plugin, built.packages, built.path)


def built_engine(engine: Engine, platform: str, root: Path | None = None) -> Built | None:
    """The engine's layer as published, if it is in the cache; builds nothing."""
    try:
        chain = _engine_layers(engine, _build(engine, platform), layers.inspect(None))
    except EnvironmentBuildError:  # not for this Python, or a platform that is not built here
        return None
    return layers.complete(root or env_root(), [layer.name for layer in chain])


def ensure_reference(*, root: Path | None = None, python: Path | None = None) -> Environment:
    """The environment of ``python -m dflash_plugin.reference``: torch and transformers.

    Arguments and errors as :func:`ensure_engine`.
    """
    root = root or env_root()
    base = layers.inspect(python)
    built = layers.ensure(root, _reference_layers(base), base)
    return Environment("venv", built.python, lock.REFERENCE, False, built.packages, built.path)


def adopt(python: Path, engine: Engine, plugin: bool, *, root: Path | None = None) -> Environment:
    """Use an interpreter that has the engine already (``--env-python ENGINE_ID=PATH``).

    With ``plugin``, its own dflash-plugin is used if it has one; otherwise this checkout's
    wheel is laid over it in a layer of the cache. The interpreter itself is not changed.

    Raises:
        EnvironmentBuildError: it does not run, has not this release of the engine, or has
            the plugin where the engine is wanted without.
    """
    distributions = sorted({b.distribution for b in engine.builds.values()} | {engine.name})
    found = layers.inspect(python.absolute(), (*distributions, "torch", "transformers", _PLUGIN))
    versions = {name: found.packages[name] for name in distributions if name in found.packages}
    # A local part (+cu129, +cpu) names a build, not another release.
    if not any(Version(v).public == Version(engine.version).public for v in versions.values()):
        has = ", ".join(f"{name} {version}" for name, version in versions.items())
        has = has or f"no {' or '.join(distributions)}"
        raise EnvironmentBuildError(
            f"{python}: expected {engine.name} {engine.version} for {engine.id}, found {has}",
            hint="name an interpreter with that release, or leave --env-python out "
            "and let the environment be built",
        )
    own = found.packages.get(_PLUGIN)
    if own and not plugin:
        raise EnvironmentBuildError(
            f"{python}: has {_PLUGIN} {own}, but this cell needs {engine.id} without it",
            hint=f"{python} -m pip uninstall {_PLUGIN} (a plugin cell lays it over the engine), "
            "or name another interpreter",
        )
    if not plugin or own:
        return Environment(
            "venv", found.python, engine.id, plugin, found.packages, found.python.parents[1]
        )
    root = root or env_root()
    adopted = f"{engine.id}-adopted-{_key(str(found.python), found.version)}"
    layer = _plugin_layer(adopted, engine, None, below=found.sites)
    built = layers.ensure(root, [layer], found)
    _prune_plugins(built)
    return Environment("venv", built.python, engine.id, True, built.packages, built.path)


def link(prefix: Path, environment: Environment) -> Path:
    """Let the venv at ``prefix`` see the packages of ``environment``, after its own.

    Returns the ``.pth`` file written.

    Raises:
        UsageError: ``prefix`` is not a virtual environment.
        EnvironmentBuildError: it is one of another Python release.
    """
    built = layers.read(environment.path)
    if built is None:
        raise UsageError(
            f"{environment.path} is not a layer of the cache", hint="python -m ci env --list"
        )
    found = sorted(prefix.glob("lib/python3.*/site-packages"))
    if not (prefix / "pyvenv.cfg").exists() or not found:
        raise UsageError(f"{prefix} is not a virtual environment", hint=f"python -m venv {prefix}")
    site = prefix / "lib" / built.site.parent.name / "site-packages"
    if site not in found:
        raise EnvironmentBuildError(
            f"{prefix} is of {found[0].parent.name}, {environment.path.name} of "
            f"{site.parent.name}: compiled packages do not fit both",
            hint=f"run `{prefix}/bin/python -m ci env …`, which builds one for that Python",
        )
    layers.write_link(site, [built.site])
    return site / layers.LINK


def current_names(
    engines: Iterable[Engine], base: Interpreter, patches: Iterable[str] = ()
) -> set[str]:
    """The layers that today's locks and sources ask for, under one interpreter.

    ``patches``: the variants of patch sets that cells are run with.
    """
    names: set[str] = set()
    with contextlib.suppress(EnvironmentBuildError):  # not for this Python, or no lock yet
        names.update(layer.name for layer in _reference_layers(base))
    for engine in engines:
        for build in engine.builds.values():
            with contextlib.suppress(EnvironmentBuildError):
                below = _engine_layers(engine, build, base)
                top = _plugin_layer(below[-1].name, engine, build.platform)
                names.update(layer.name for layer in (*below, top))
                for variant in patches:
                    with contextlib.suppress(PatchVersionError):  # not for this release
                        patched = patched_engine.layer(
                            env_root(), below[-1], engine, build.platform, variant
                        )
                        top = _plugin_layer(patched.name, engine, build.platform)
                        names.update((patched.name, top.name))
    return names


def _build(engine: Engine, platform: str) -> Build:
    if platform not in engine.builds:
        raise UnknownCellError(
            f"{engine.id} has no build for {platform!r}", hint=near_names(platform, engine.builds)
        )
    return engine.builds[platform]


def _engine_layers(engine: Engine, build: Build, base: Interpreter) -> list[Layer]:
    _check_python(engine.id, build.requires_python, base)
    torch = _torch_layer(build.torch, base)
    reports = ("torch", "transformers", build.distribution)
    name = f"{engine.id}-{build.platform}"
    if build.lock is None:
        raise EnvironmentBuildError(
            f"{engine.id} for {build.platform} is not built here: {build.distribution} "
            f"{engine.version} wants a machine with that platform",
            hint=f"--env-python {engine.id}=PATH names an interpreter that has it",
        )
    below = [torch]
    if build.torchvision is not None:
        below.append(_torchvision_layer(build.torchvision, torch))
    return [*below, _lock_layer(name, lock.LOCKS / build.lock, below[-1], reports)]


def _reference_layers(base: Interpreter) -> list[Layer]:
    _check_python(lock.REFERENCE, f">={lock.PYTHON}", base)
    torch = _torch_layer(lock.REFERENCE_TORCH, base)
    path = lock.LOCKS / "reference.txt"
    return [torch, _lock_layer(lock.REFERENCE, path, torch, ("torch", "transformers"))]


def _torch_layer(version: str, base: Interpreter) -> Layer:
    key = _key(version, base.minor, base.machine)
    return Layer(f"torch-{version}-{key}", partial(install_torch, version), ("torch",))


def _torchvision_layer(version: str, torch: Layer) -> Layer:
    install = partial(install_torchvision, version)
    return Layer(f"torchvision-{version}-{_key(torch.name)}", install, ("torchvision",))


def _lock_layer(name: str, path: Path, below: Layer, reports: tuple[str, ...]) -> Layer:
    try:
        content = path.read_text(encoding="utf-8")
    except OSError as err:
        raise EnvironmentBuildError(
            f"{path} cannot be read: {err.strerror}", hint="python -m ci lock --all"
        ) from err

    def install(pip: Pip) -> None:
        pip.install("--no-deps", "--require-hashes", "-r", str(path))

    return Layer(f"{name}-{_key(content, below.name)}", install, reports)


def _plugin_layer(
    over: str, engine: Engine, platform: str | None, *, below: tuple[str, ...] = ()
) -> Layer:
    builds = [b for b in engine.builds.values() if platform in (None, b.platform)]
    reports = ("torch", "transformers", *(b.distribution for b in builds), _PLUGIN)
    sources = wheel.source_hash(wheel.CHECKOUT)
    name = f"{over}-plugin-{_key(sources)}"
    install = partial(wheel.install_wheel, wheel.CHECKOUT, sources)
    return Layer(name, install, reports, needs=("packaging",), below=below)


def _prune_plugins(used: Built) -> None:
    """Keep ``used`` and the newest others over the same engine layer; the order is of last use."""
    root, stem = used.path.parent, re.sub(r"[0-9a-f]+$", "", used.path.name)
    with contextlib.suppress(OSError):  # another process prunes too, or the cache is read-only
        os.utime(used.path / layers.MARKER)
        paths = [path.parent for path in root.glob(f"{stem}*/{layers.MARKER}")]
        paths.sort(key=lambda path: (path / layers.MARKER).stat().st_mtime, reverse=True)
        for path in paths[KEEP_PLUGIN_LAYERS:]:
            layers.remove(root, path.name)


def _check_python(name: str, requires: str, base: Interpreter) -> None:
    allowed = SpecifierSet(requires)
    if allowed.contains(base.version, prereleases=True):
        return
    fitting = next((python for python in _PYTHONS if f"{python}.0" in allowed), "3.12")
    raise EnvironmentBuildError(
        f"{name} needs Python {requires}, {base.python} is Python {base.version}",
        hint=f"PYTHON=python{fitting} make demo",
    )


def _key(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:10]
