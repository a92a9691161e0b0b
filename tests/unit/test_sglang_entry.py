"""SGLang's entry points: what they do with an engine, without one, and when all goes wrong."""

from __future__ import annotations

import logging
import sys
from types import SimpleNamespace

import pytest
from installations import install, site_fixture  # noqa: F401  # fixture

from dflash_plugin import engines, sglang_entry, shims, support, support_sglang

RELEASE = support_sglang.newest()
DONE = f"DFlash on sglang {RELEASE}"
CPU_PLATFORM = "dflash_plugin.shims.sglang_platform:CpuPlatform"
KINDS = ("cuda", "xpu", "npu", "hpu", "musa", "mps", "accelerator")


@pytest.fixture(autouse=True)
def fresh(monkeypatch, caplog):
    """As in a new process: nothing registered or announced."""
    monkeypatch.setattr(sglang_entry, "_registered", False)
    for name in (sglang_entry._ANNOUNCED, "SGLANG_PLATFORM", "SGLANG_USE_CPU_ENGINE"):
        monkeypatch.setenv(name, "")  # so that it is restored, whatever a test sets
        monkeypatch.delenv(name)
    caplog.set_level(logging.INFO)


@pytest.fixture(autouse=True)
def devices(monkeypatch):
    """``devices("cuda")``: torch finds those, and at first none."""

    def found(*kinds: str) -> None:
        fake = {k: SimpleNamespace(is_available=lambda k=k: k in kinds) for k in KINDS}
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(**fake))

    found()
    return found


@pytest.fixture
def installed(monkeypatch):
    """Names of the shims that were asked for."""
    names: list[str] = []
    monkeypatch.setattr(shims, "install", lambda asked, log: names.extend(asked))
    return names


@pytest.fixture
def sglang(site):
    install(site, "sglang", RELEASE)


@pytest.mark.usefixtures("sglang")
def test_without_an_accelerator_the_platform_and_all_repairs_are_there(installed, caplog):
    sglang_entry.register()
    assert sglang_entry.activate() == CPU_PLATFORM
    assert installed == list(support.decide("sglang", RELEASE, "cpu").shims)
    assert "sglang-cpu-verify" in installed
    assert f"{DONE} on cpu: shim" in caplog.text


@pytest.mark.usefixtures("sglang")
@pytest.mark.parametrize("kind", KINDS)
def test_with_an_accelerator_there_is_no_platform_and_no_hook_but_the_repairs(
    installed, devices, monkeypatch, kind
):
    devices(kind)
    monkeypatch.setattr(engines, "_platform", lambda *_: "cuda")
    sglang_entry.register()
    assert sglang_entry.activate() is None
    assert installed == list(support.decide("sglang", RELEASE, "cuda").shims)
    assert not [name for name in installed if "cpu" in name]


@pytest.mark.usefixtures("sglang")
def test_the_platform_can_be_asked_for_beside_an_accelerator(installed, devices, monkeypatch):
    devices("cuda")
    monkeypatch.setenv("SGLANG_PLATFORM", "dflash_cpu")
    sglang_entry.register()
    assert sglang_entry.activate() == CPU_PLATFORM
    assert "sglang-cpu-guard" in installed


@pytest.mark.usefixtures("sglang")
@pytest.mark.parametrize(
    ("name", "value"), [("SGLANG_PLATFORM", "other"), ("SGLANG_USE_CPU_ENGINE", "1")]
)
def test_who_asks_for_another_platform_gets_it(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    assert sglang_entry.activate() is None


@pytest.mark.parametrize("version", ["0.5.10.post1", "0.5.99", "0.5.24rc1", "0.5.23+edited", "x"])
def test_a_release_that_is_not_known_is_left_alone(site, installed, caplog, version):
    install(site, "sglang", version)
    sglang_entry.register()
    assert sglang_entry.activate() is None
    assert installed == []
    assert "refused" in caplog.text


@pytest.mark.usefixtures("sglang", "installed")
def test_one_line_a_server_not_one_a_process(monkeypatch, caplog):
    sglang_entry.register()
    sglang_entry.register()
    monkeypatch.setattr(sglang_entry, "_registered", False)  # a child
    sglang_entry.register()
    assert caplog.text.count(DONE) == 1


def test_sglang_that_is_not_there_is_not_mentioned(site, caplog):
    sglang_entry.register()
    assert sglang_entry.activate() is None
    assert caplog.text == ""


@pytest.mark.usefixtures("sglang")
@pytest.mark.parametrize("where", [(engines, "find"), (support, "decide"), (shims, "install")])
def test_whatever_goes_wrong_the_engine_starts(monkeypatch, caplog, where):
    def broken(*_args, **_options):
        raise RuntimeError("broken here")

    monkeypatch.setattr(*where, broken)
    sglang_entry.register()
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert "SGLang runs as published" in record.message


@pytest.mark.usefixtures("sglang")
def test_a_platform_that_cannot_be_decided_is_none(monkeypatch, caplog):
    monkeypatch.setattr(support, "decide", None)
    assert sglang_entry.activate() is None
    assert "SGLang runs as published" in caplog.text
