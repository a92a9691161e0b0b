"""Virtual environments as thin layers: each sees the packages of the layer below it.

A layer is a plain venv whose ``dflash-ci-layer.pth`` names the site-packages of its parent,
so one torch on disk serves every environment. A venv names its own path in its files and
cannot be moved, so it is built in place, under a lock; its marker is written last, and a
folder without one is a leftover and is built anew.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from dflash_plugin import cache
from dflash_plugin.errors import EnvironmentBuildError, from_os_error

from .installer import Pip, Progress

MARKER = "dflash-layer.json"
LINK = "dflash-ci-layer.pth"
_VERSIONS = """
import importlib.metadata as m, json, platform, site, sys
found = {}
for name in sys.argv[1:]:
    try:
        found[name] = m.version(name)
    except m.PackageNotFoundError:
        pass
sites = site.getsitepackages()
if site.ENABLE_USER_SITE:
    sites.append(site.getusersitepackages())
print(json.dumps({"python": platform.python_version(), "machine": platform.machine(),
                  "packages": found, "sites": sites}))
"""


@dataclass(frozen=True)
class Interpreter:
    """A Python that venvs are made from, or one that has an engine already."""

    python: Path
    version: str
    machine: str
    packages: dict[str, str]
    sites: tuple[str, ...] = ()

    @property
    def minor(self) -> str:
        """``3.11`` of ``3.11.7``."""
        return ".".join(self.version.split(".")[:2])


@dataclass(frozen=True)
class Layer:
    """What a layer is made of.

    ``install`` fills it, seeing only itself: what a lock names lies in the layer, whatever
    the one below has. ``needs`` is added if nothing below has it. ``reports`` are the
    distributions whose versions the marker keeps. ``below`` are site-packages folders to
    see instead of a parent layer's.
    """

    name: str
    install: Callable[[Pip], None]
    reports: tuple[str, ...]
    needs: tuple[str, ...] = ()
    below: tuple[str, ...] = ()


@dataclass(frozen=True)
class Built:
    """A complete layer, as its marker tells."""

    path: Path
    version: str
    machine: str
    parent: str | None
    packages: dict[str, str]
    seconds: float

    @property
    def python(self) -> Path:
        """The layer's interpreter."""
        return self.path / "bin" / "python"

    @property
    def site(self) -> Path:
        """The layer's site-packages."""
        minor = ".".join(self.version.split(".")[:2])
        return self.path / "lib" / f"python{minor}" / "site-packages"


def inspect(python: Path | None, names: Sequence[str] = ()) -> Interpreter:
    """What an interpreter is, and the versions of ``names`` in it (absent: left out).

    Args:
        python: None for the running one (asked for ``names`` in a subprocess all the same).

    Raises:
        EnvironmentBuildError: it does not run.
    """
    if python is None and not names:
        return Interpreter(Path(sys.executable), platform.python_version(), platform.machine(), {})
    python = python or Path(sys.executable)
    try:
        # -E and a neutral folder: PYTHONPATH and the checkout are not the environment's.
        done = subprocess.run(
            [str(python), "-E", "-c", _VERSIONS, *names],
            cwd="/",
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        answer = json.loads(done.stdout.splitlines()[-1])
    except (OSError, subprocess.SubprocessError, ValueError, IndexError) as err:
        detail = (getattr(err, "stderr", None) or str(err)).strip().splitlines()[-1:]
        raise EnvironmentBuildError(
            f"{python} does not run as a Python interpreter: {' '.join(detail)}",
            hint="name a working interpreter, e.g. one that prints its version with --version",
        ) from err
    return Interpreter(
        python, answer["python"], answer["machine"], answer["packages"], tuple(answer["sites"])
    )


def read(path: Path) -> Built | None:
    """The complete layer at ``path``; None if it is not one (any more)."""
    try:
        raw = json.loads((path / MARKER).read_text(encoding="utf-8"))
        built = Built(
            path, raw["python"], raw["machine"], raw["parent"], raw["packages"], raw["seconds"]
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    # The interpreter is a link: gone when the Python it was made from is uninstalled.
    return built if built.python.exists() else None


def complete(root: Path, names: Sequence[str]) -> Built | None:
    """The last of ``names`` if it and all below it are there; reads markers and no more."""
    found = [read(root / name) for name in names]
    return found[-1] if all(found) else None


def ensure(root: Path, layers: Sequence[Layer], base: Interpreter) -> Built:
    """Build what is missing of ``layers``, lowest first, and return the last.

    Raises:
        EnvironmentBuildError: pip failed; the log is named.
        CacheError: disk full, no permission.
    """
    names = [layer.name for layer in layers]
    ready = complete(root, names)
    if ready:
        return ready
    missing = [name for name in names if not read(root / name)]
    parent: Built | None = None
    for layer in layers:
        built = read(root / layer.name)
        if built is None:
            step = missing.index(layer.name) + 1 if layer.name in missing else 1
            title = f"building {layer.name} ({step} of {max(step, len(missing))})"
            built = _build(root, layer, parent, base, title)
        parent = built
    assert parent is not None
    return parent


def remove(root: Path, name: str, *, leftover: bool = False) -> bool:
    """Remove a layer; waits for one that is being built. True if it was removed.

    Args:
        leftover: keep it if it is complete by then.
    """
    with cache.locked(f"env-{name}"), _no_pip_left(name):
        if leftover and read(root / name):
            return False
        _wipe(root / name)
        return True


def write_link(site: Path, below: Sequence[str | Path]) -> None:
    """Let the environment whose site-packages is ``site`` see the packages in ``below``."""
    # addsitedir, not a bare path line: it reads the .pth files down there too, so the layer
    # below starts as it would on its own. An import line must be one line.
    calls = "; ".join(f"site.addsitedir({str(folder)!r})" for folder in below)
    cache.atomic_write_text(site / LINK, f"import site; {calls}\n")


def _build(root: Path, layer: Layer, parent: Built | None, base: Interpreter, title: str) -> Built:
    path = root / layer.name
    with cache.locked(f"env-{layer.name}"), _no_pip_left(layer.name) as lock:
        ready = read(path)
        if ready:  # built by the process that this one waited for
            return ready
        try:
            _wipe(path)
            with Progress(title) as progress:
                # Downloads are unpacked on the disk that has the room, and go with the layer.
                scratch = cache.make_dir(path / "tmp")
                log = cache.make_dir(cache.cache_dir() / "logs") / f"{layer.name}.log"
                log.write_bytes(b"")
                pip = Pip(path / "bin" / "python", log, lock, scratch, progress)
                return _fill(path, layer, parent, base, pip)
        except OSError as err:
            _wipe(path)
            raise from_os_error(err, str(path)) from err
        except BaseException:
            _wipe(path)
            raise


def _fill(path: Path, layer: Layer, parent: Built | None, base: Interpreter, pip: Pip) -> Built:
    began = time.monotonic()
    new = Built(path, base.version, base.machine, parent.path.name if parent else None, {}, 0)
    pip.call([str(base.python), "-m", "venv", "--without-pip", str(path)])
    layer.install(pip)
    below = layer.below or ((str(parent.site),) if parent else ())
    if below:
        write_link(new.site, below)
    wanted = (*layer.reports, *layer.needs)
    missing = set(layer.needs) - set(inspect(new.python, wanted).packages)
    if missing:
        pip.install(*sorted(missing))
    packages = inspect(new.python, wanted).packages
    shutil.rmtree(pip.scratch)
    marker = {
        "name": layer.name,
        "python": base.version,
        "machine": base.machine,
        "parent": new.parent,
        "packages": packages,
        "seconds": round(time.monotonic() - began, 1),
    }
    cache.atomic_write_text(path / MARKER, json.dumps(marker, indent=1) + "\n")
    built = read(path)
    assert built is not None
    return built


@contextmanager
def _no_pip_left(name: str) -> Iterator[IO[bytes]]:
    """Wait until no pip of an earlier, killed builder still writes into the layer.

    The open file is every pip's standard input, so its lock lives as long as they do.
    """
    path = cache.make_dir(cache.cache_dir() / "locks") / f"env-{name}.pip.lock"
    with path.open("a+b") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for a pip that a killed build of {name} left …", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield file


def _wipe(path: Path) -> None:
    """Remove a layer, its marker first: half removed must not look complete."""
    if path.is_symlink():  # a person's: a layer on another disk
        path.unlink()
        return
    (path / MARKER).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
    if os.path.lexists(path):  # a file written meanwhile, or no permission (then it raises)
        shutil.rmtree(path)
