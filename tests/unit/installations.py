"""Fake installed packages: dist-info folders, and environments that have only those."""

from __future__ import annotations

from importlib import metadata
from pathlib import Path

import pytest

from dflash_plugin import doctor, engines

DFLASH_ENTRY = "[vllm.general_plugins]\ndflash = dflash_plugin.vllm_entry:register\n"


def install(
    folder: Path, name: str, version: str | None, *, entry_points: str = "", files: str = ""
) -> Path:
    """A dist-info of ``name``; without a version: what a broken uninstall leaves."""
    info = folder / f"{name.replace('-', '_')}-{version or '0'}.dist-info"
    info.mkdir(parents=True)
    if version is not None:
        text = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n"
        (info / "METADATA").write_text(text, encoding="utf-8")
    if entry_points:
        (info / "entry_points.txt").write_text(entry_points, encoding="utf-8")
    if files:
        (info / "RECORD").write_text(f"{files},,\n", encoding="utf-8")
    return info


class Site:
    """Stands for ``importlib.metadata``, of one folder alone."""

    PackageNotFoundError = metadata.PackageNotFoundError

    def __init__(self, folder: Path) -> None:
        self.path = [str(folder)]

    def distribution(self, name: str) -> metadata.Distribution:
        for found in metadata.distributions(name=name, path=self.path):
            return found
        raise metadata.PackageNotFoundError(name)

    def files(self, name: str) -> object:
        return self.distribution(name).files

    def entry_points(self, *, group: str) -> list[metadata.EntryPoint]:
        found = [ep for dist in metadata.distributions(path=self.path) for ep in dist.entry_points]
        return [ep for ep in found if ep.group == group]


@pytest.fixture(name="site")
def site_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder that all package metadata come from during a test; empty at first."""
    folder = tmp_path / "site"
    folder.mkdir()
    for module in (engines, doctor):
        monkeypatch.setattr(module, "metadata", Site(folder))
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    return folder
