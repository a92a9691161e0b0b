"""A patched SGLang: how it is found, what is left to the plugin, and who looks after the rest."""

from __future__ import annotations

import json
import logging
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from installations import install, site_fixture  # noqa: F401 (a fixture)
from patch_trees import FIELDS, unpack, write_set

from dflash_plugin import cli, doctor, engines, launch, sglang_entry, shims, support
from dflash_plugin.errors import UnsupportedEngineError
from dflash_plugin.shims import sglang_cpu_guard, sglang_device

RELEASE = "0.5.23"
ON_CPU = support.decide("sglang", RELEASE, "cpu").shims
ON_CUDA = support.decide("sglang", RELEASE, "cuda").shims
ENGINE = {"sglang/__init__.py": "", "sglang/draft.py": "".join(f"{n}\n" for n in range(9))}
PATCHED = {**ENGINE, "sglang/draft.py": ENGINE["sglang/draft.py"] + "call()\n"}
ENTRY_POINTS = (
    "[sglang.srt.plugins]\ndflash = dflash_plugin.sglang_entry:register\n"
    "[sglang.srt.platforms]\ndflash_cpu = dflash_plugin.sglang_entry:activate\n"
)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, caplog):
    """As in a new process, on a machine whose torch finds no device."""
    monkeypatch.setattr(sglang_entry, "_registered", False)
    settings = ("SGLANG_PLATFORM", "SGLANG_PLUGINS", "SGLANG_USE_CPU_ENGINE")
    for name in (sglang_entry._ANNOUNCED, *settings):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr(sglang_device, "_accelerator", lambda: False)
    monkeypatch.setattr(engines, "_platform", lambda *_: "cpu")
    caplog.set_level(logging.INFO)


@pytest.fixture
def patched(site, tmp_path):
    """``patched("all")``: the release in this environment with such a set, and the plugin."""
    stands_for = {"all": ON_CPU, "swa": ("sglang-draft-attention",)}

    def make(variant: str) -> Path:
        root = tmp_path / "patches"
        fields = f"{FIELDS}\nReplaces-Shim: {', '.join(stands_for[variant])}"
        where = {"engine": "sglang", "version": RELEASE, "variant": variant}
        write_set(root, [ENGINE, PATCHED], fields=fields, **where)
        unpack(site, ENGINE, "sglang", RELEASE)
        install(site, "dflash-plugin", "1.0", entry_points=ENTRY_POINTS)
        target = ("--site-packages", str(site), "--patches", str(root))
        assert cli.main(["patch", "apply", variant, *target]) == 0
        return site

    return make


def test_what_is_left_to_the_plugin(patched, monkeypatch, caplog):
    installed: list[str] = []
    monkeypatch.setattr(shims, "install", lambda names, log: installed.extend(names))
    (patched("swa") / engines.PATCH_STAGING).mkdir()
    sglang_entry.register()
    assert installed == [name for name in ON_CPU if name != "sglang-draft-attention"]
    assert "patched (swa): windows and causality" in caplog.text
    assert "a patch command was stopped half-way" in caplog.text


def test_with_all_of_them_nothing_is_left_but_the_platform(patched, monkeypatch, caplog):
    monkeypatch.setattr(shims, "install", None)
    patched("all")
    sglang_entry.register()
    assert sglang_entry.activate() == "dflash_plugin.shims.sglang_platform:CpuPlatform"
    assert f"DFlash on sglang {RELEASE}+dflash.all on cpu: patch (" in caplog.text
    assert "repaired" not in caplog.text


@pytest.mark.parametrize(
    ("version", "variant", "usable"),
    [
        (f"{RELEASE}+dflash.all", "all", True),
        (f"{RELEASE}+dflash.swa", "all", False),
        (f"{RELEASE}+local.dflash.all", "all", False),
        (f"{RELEASE}+dflash.all", None, False),
        ("0.5.12.post1+dflash.all", "all", False),
    ],
)
def test_a_version_that_nobody_has_made_is_not_known(version, variant, usable):
    found = support.decide("sglang", version, "cpu", variant=variant, replaced=ON_CPU)
    assert found.usable is usable
    assert found.shims == ()
    assert (found.level is support.Level.PATCH) is usable


def test_a_set_for_one_platform_leaves_the_rest_of_another():
    on_gpu = support.decide(
        "sglang", f"{RELEASE}+dflash.cpu", "cuda", variant="cpu", replaced=("sglang-cpu-guard",)
    )
    assert (on_gpu.level, on_gpu.shims) == (support.Level.PATCH, ON_CUDA)


def test_doctor_and_status_know_it(patched, capsys):
    site = patched("all")
    capsys.readouterr()
    assert cli.main(["patch", "status", "--json", "--site-packages", str(site)]) == 0
    status = json.loads(capsys.readouterr().out)
    assert (status["engine"], status["release"], status["variant"]) == ("sglang", RELEASE, "all")
    checks = {check.name: check for check in doctor.examine(engine="sglang")}
    assert checks["sglang support"].detail.startswith("patch: ")
    assert checks["sglang patches"].status == "ok"
    assert "sglang shim" not in checks
    (site / "sglang/draft.py").write_text("mine\n")
    checks = {check.name: check for check in doctor.examine(engine="sglang")}
    assert checks["sglang patches"].exit_code == 44


@pytest.mark.parametrize(
    ("variant", "allowed", "code"),
    [("all", "dflash_cpu", 0), ("swa", "dflash_cpu", 21), ("swa", "", 0), ("swa", "a, dflash", 0)],
)
def test_doctor_looks_at_what_sglang_is_allowed_to_load(
    patched, monkeypatch, variant, allowed, code
):
    patched(variant)
    monkeypatch.setenv("SGLANG_PLUGINS", allowed)
    checks = {check.name: check for check in doctor.examine(engine="sglang")}
    assert checks["sglang plugin"].exit_code == code
    assert ("leaves `dflash` out" in checks["sglang plugin"].detail) is (allowed == "dflash_cpu")


def test_it_is_served_as_ever(patched):
    patched("all")
    engine, decision = launch.require_engine("sglang")
    assert (engine.version, decision.level) == (f"{RELEASE}+dflash.all", support.Level.PATCH)
    pair = launch.matrix_row("qwen3-8b")
    command, _ = launch.known_plan(engine, pair, [])
    stock, _ = launch.known_plan(replace(engine, version=RELEASE, variant=None), pair, [])
    assert command == stock


# --- the guard ---


@pytest.fixture
def worker(patched, monkeypatch):
    """A draft worker behind the guard, in an engine that has every repair from its patches."""
    patched("all")

    class DFlashWorkerV2:
        pass

    sglang_cpu_guard.apply(SimpleNamespace(DFlashWorkerV2=DFlashWorkerV2))
    for shim in map(shims.load, ON_CPU):
        module = sys.modules.get(shim.module) or ModuleType(shim.module)
        monkeypatch.setitem(sys.modules, shim.module, module)
        setattr(module, shims._marker(shim), True)
    return DFlashWorkerV2


def test_the_guard_takes_what_patches_made_for_what_the_plugin_makes(worker):
    assert worker()


@pytest.mark.parametrize("name", ["sglang-cpu-verify", "sglang-draft-tensors"])
def test_the_guard_asks_for_every_repair_of_a_patched_engine_too(worker, monkeypatch, name):
    shim = shims.load(name)
    monkeypatch.setattr(sys.modules[shim.module], shims._marker(shim), False)
    with pytest.raises(UnsupportedEngineError, match=name) as raised:
        worker()
    assert "SGLANG_PLUGINS" in raised.value.hint


# --- the call in the engine's own files ---


@pytest.mark.parametrize(
    ("name", "platform", "expected"),
    [
        ("sglang-cpu-streams", "cpu", True),
        ("sglang-cpu-streams", "cuda", False),
        ("sglang-minimax-taps", "cpu", True),
        ("sglang-minimax-taps", "cuda", True),
    ],
)
def test_a_patch_repairs_where_the_difference_is(patched, monkeypatch, name, platform, expected):
    patched("all")
    monkeypatch.setattr(sglang_device, "_accelerator", lambda: platform != "cpu")
    monkeypatch.setattr(engines, "_platform", lambda *_: platform)
    shims._platform.cache_clear()
    done: list[str] = []
    shim = replace(shims.load(name), fingerprints={}, apply=lambda module: done.append(name))
    monkeypatch.setattr(shims, "load", lambda _: shim)
    monkeypatch.setitem(sys.modules, shim.module, ModuleType(shim.module))
    shims.patched(name)
    shims.patched(name)
    assert done == [name] * expected
    shims._platform.cache_clear()
