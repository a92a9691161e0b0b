"""Newer releases on the package index, of what this project runs or is held against.

Yanked files, pre-releases and releases without a wheel are passed over. The index is pip's own:
``PIP_INDEX_URL``, else pip's configuration, else PyPI.
"""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from packaging.metadata import parse_email
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.version import InvalidVersion, Version

from dflash_plugin import support
from dflash_plugin.errors import DownloadError, MissingDependencyError, SourceUnreachableError
from dflash_plugin.matrix import Matrix

from . import lock, wheel_sources

if TYPE_CHECKING:
    from pypi_simple import DistributionPackage, ProjectPage, PyPISimple

PYPI = "https://pypi.org/simple/"
TIMEOUT = 30.0
"""Seconds for an answer to begin."""

_MLX = Path(__file__).parent / "data" / "mlx.txt"
_LINUX = {"platform_machine": "x86_64", "platform_system": "Linux", "sys_platform": "linux"}


@dataclass(frozen=True)
class Watched:
    """A distribution, its newest known release, and the file that says so.

    ``built``: the matrix has builds of it.
    """

    distribution: str
    known: str
    where: str
    built: bool = False


@dataclass(frozen=True)
class Found:
    """What is newer than the known release.

    ``versions``: oldest first. Of the last, where the matrix has ``built`` one before:
    ``requires_python``, and the exact ``torch`` that its wheel asks for on Linux (x86_64), without
    a local part; empty where it cannot be told.
    """

    distribution: str
    known: str
    where: str
    built: bool
    versions: tuple[str, ...]
    requires_python: str
    torch: str

    @property
    def newest(self) -> str:
        """The newest of them."""
        return self.versions[-1]


def watched(data: Matrix) -> list[Watched]:
    """Every distribution of the matrix's engines, SGLang, Transformers and MLX-LM."""
    newest: dict[str, str] = {}
    for engine in data.engines.values():
        for build in engine.builds.values():
            known = newest.get(build.distribution, engine.version)
            newest[build.distribution] = max(known, engine.version, key=Version)
    rows = [Watched(name, version, data.path.name, True) for name, version in newest.items()]
    if "sglang" not in newest:
        rows.append(Watched("sglang", support.releases("sglang")[1], "dflash_plugin/support.py"))
    pins = {
        "transformers": ("\n".join(lock.REFERENCE_REQUIREMENTS), "ci/lock.py"),
        "mlx-lm": (_MLX.read_text("utf-8"), "ci/data/mlx.txt"),
    }
    for name, (text, where) in pins.items():
        pin = re.search(rf"^{name}==(\S+)$", text, re.M)
        assert pin, f"{where} does not pin {name}"
        rows.append(Watched(name, pin[1], where))
    return rows


def look_up(
    rows: Iterable[Watched],
    unreachable: list[str],
    note: Callable[[str], None],
) -> list[Found]:
    """What is newer; what the index did not tell is added to ``unreachable``.

    Args:
        note: is called with each name before it is asked for.

    Raises:
        MissingDependencyError: no pypi-simple.
    """
    try:
        import requests
        from pypi_simple import PyPISimple
    except ModuleNotFoundError as err:
        raise MissingDependencyError(
            f"{err.name} is not installed; it reads the package index",
            hint=f"{sys.executable} -m pip install pypi-simple",
        ) from err
    settings = _pip_settings()
    url = settings.get("index-url", PYPI)
    session = requests.Session()
    if "cert" in settings:
        session.verify = settings["cert"]
    found = []
    rows = list(rows)
    with PyPISimple(url, session=session) as client:
        for number, row in enumerate(rows):
            note(row.distribution)
            try:
                newer = _newer(client, row)
                found += [newer] if newer else []
            except SourceUnreachableError as err:
                unreachable.append(err.message)
            except (requests.ConnectionError, requests.Timeout) as err:
                left = ", ".join(r.distribution for r in rows[number:])
                unreachable.append(
                    f"{urlsplit(url).hostname} was not reached ({type(err).__name__}): {left}"
                )
                break  # nor will it answer for the others, each after a time-out
    return found


def _newer(client: PyPISimple, row: Watched) -> Found | None:
    page = _page(client, row.distribution)
    wheels: dict[Version, list[DistributionPackage]] = {}
    for file in page.packages:
        try:
            version = Version(file.version or "")
        except InvalidVersion:
            continue
        if file.package_type == "wheel" and not file.is_yanked:
            wheels.setdefault(version, []).append(file)
    if not wheels:
        raise SourceUnreachableError(f"{row.distribution}: the index's answer lists no wheel")
    newer = sorted(
        v for v in wheels if v > Version(row.known) and not v.is_prerelease and v.local is None
    )
    if not newer:
        return None
    files = wheels[newer[-1]]
    chosen = next((f for f in files if "x86_64" in f.filename), files[0])
    return Found(
        row.distribution,
        row.known,
        row.where,
        row.built,
        tuple(map(str, newer)),
        _python(chosen.requires_python or "") if row.built else "",
        _torch(client, chosen) if row.built else "",
    )


def _page(client: PyPISimple, name: str) -> ProjectPage:
    import requests
    from pypi_simple import NoSuchProjectError

    try:
        return client.get_project_page(name, timeout=TIMEOUT)
    except NoSuchProjectError as err:
        raise SourceUnreachableError(f"{name}: the index has no such project") from err
    except requests.HTTPError as err:
        raise SourceUnreachableError(f"{name}: the index answered {_status(err)}") from err
    except (requests.ConnectionError, requests.Timeout):
        raise
    except Exception as err:  # whatever a body that is no index page makes its parsers raise
        raise SourceUnreachableError(
            f"{name}: the index's answer cannot be read ({type(err).__name__})"
        ) from err


def _torch(client: PyPISimple, wheel: DistributionPackage) -> str:
    """The one torch release a wheel asks for; empty where it says none, or nothing at all."""
    try:
        raw, _ = parse_email(_metadata(client, wheel))
        asked = [Requirement(line) for line in raw.get("requires_dist", [])]
    except (DownloadError, ValueError):
        return ""
    for one in asked:
        if one.name == "torch" and (one.marker is None or one.marker.evaluate(_LINUX)):
            pins = [s.version for s in one.specifier if s.operator == "=="]
            return Version(pins[0]).public if len(pins) == 1 and "*" not in pins[0] else ""
    return ""


def _metadata(client: PyPISimple, wheel: DistributionPackage) -> bytes:
    """From the index, or out of the wheel: mirrors often leave out what stands beside it."""
    import requests
    from pypi_simple import NoMetadataError

    try:
        return client.get_package_metadata_bytes(
            wheel, verify=bool(wheel.metadata_digests), timeout=TIMEOUT
        )
    except (requests.RequestException, NoMetadataError):
        folder = wheel_sources.fetch(str(wheel.project), str(wheel.version), ())
        (path,) = folder.glob("*.dist-info/METADATA")
        return path.read_bytes()


def _python(text: str) -> str:
    """Lower bound first, as the matrix has it; empty where it is no specifier."""
    try:
        return ",".join(sorted(map(str, SpecifierSet(text)), reverse=True))
    except ValueError:
        return ""


def _status(err: Exception) -> str:
    return str(getattr(getattr(err, "response", None), "status_code", "an error"))


def _pip_settings() -> dict[str, str]:
    """``index-url`` and ``cert`` as ``pip install`` would have them."""
    command = [sys.executable, "-m", "pip", "config", "list"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    listed = dict(line.split("=", 1) for line in done.stdout.splitlines() if "=" in line)
    return {
        key: str(ast.literal_eval(listed[name]))
        for section in ("global", "install", ":env:")
        for key in ("index-url", "cert")
        if (name := f"{section}.{key}") in listed
    }
