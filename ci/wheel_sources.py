"""Some files of a published wheel, without the gigabytes beside them: by range requests.

For releases that this machine cannot install (CUDA wheels), or has not yet (a new release).
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Collection
from pathlib import Path
from urllib.parse import urlsplit

from dflash_plugin import cache
from dflash_plugin.errors import DownloadError, MissingDependencyError

_PYTHON = "3.12"
"""Every release looked at has a wheel for it."""


def folder() -> Path:
    """Where they are kept: ``sources`` in the cache, a folder ``<distribution>-<version>`` each."""
    return cache.cache_dir() / "sources"


def fetch(distribution: str, version: str, names: Collection[str]) -> Path:
    """The files ``names`` of a wheel, those of them that it has, and its METADATA.

    Returns the folder they lie in, as the wheel has them. What is there already is not asked for.

    Raises:
        DownloadError: there is no such release, or no server that sends parts of a file.
        MissingDependencyError: no remotezip.
    """
    target = folder() / f"{distribution}-{version}"
    asked = target / "asked.json"
    if asked.exists() and set(json.loads(asked.read_text("utf-8"))) >= set(names):
        return target
    try:
        from remotezip import RemoteZip, RemoteZipError
    except ModuleNotFoundError as err:
        raise MissingDependencyError(
            "remotezip is not installed; it reads parts of a wheel",
            hint=f"{sys.executable} -m pip install remotezip",
        ) from err
    url = _url(distribution, version)
    shown = urlsplit(url).path.rpartition("/")[2]
    cache.make_dir(folder())
    with tempfile.TemporaryDirectory(dir=folder(), prefix=".part-") as scratch:
        part = Path(scratch) / "wheel"
        try:
            with RemoteZip(url) as archive:
                found = [
                    name
                    for name in archive.namelist()
                    if name in names or name.endswith(".dist-info/METADATA")
                ]
                print(f"fetching {len(found)} files of {shown}", file=sys.stderr, flush=True)
                archive.extractall(part, found)
        except (RemoteZipError, zipfile.BadZipFile, OSError) as err:
            raise DownloadError(
                f"{shown}: {err}", hint="try again, or unpack the wheel by hand"
            ) from err
        (part / asked.name).write_text(json.dumps(sorted(names)), "utf-8")
        shutil.rmtree(target, ignore_errors=True)
        part.rename(target)
    return target


def _url(distribution: str, version: str) -> str:
    """Where pip would get the wheel from."""
    command = [
        *(sys.executable, "-m", "pip", "install", "--dry-run", "--no-deps", "--quiet"),
        *("--ignore-installed", "--only-binary", ":all:", "--python-version", _PYTHON),
        *("--target", "nowhere", "--report", "-", f"{distribution}=={version}"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        report = json.loads(done.stdout[done.stdout.index("{") :])
        return str(report["install"][0]["download_info"]["url"])
    except (ValueError, LookupError) as err:
        last = " ".join(done.stderr.strip().splitlines()[-1:])
        raise DownloadError(
            f"{distribution} {version}: pip finds no wheel ({last})",
            hint="check the version, and pip's index (pip config list)",
        ) from err
