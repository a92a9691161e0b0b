"""Patched engines that ask for a shim: it is applied, or the engine does not start."""

from __future__ import annotations

import importlib
import logging
import sys

import pytest
from test_shims import NORM, SOURCE, engine, shim  # noqa: F401  # fixtures

from dflash_plugin import engines, shims, support
from dflash_plugin.engines import Installed
from dflash_plugin.errors import UnsupportedEngineError
from dflash_plugin.support import Difference

CALL = '\nfrom dflash_plugin.shims import patched\n\npatched("one")\nAFTER = Draft().norm()\n'
log = logging.getLogger("test-shims")


@pytest.fixture(name="installed", autouse=True)
def installed_fixture(monkeypatch):
    """``installed(platform)``: the engine's; None: no metadata."""

    def install(platform):
        found = Installed("vllm", "vllm", "0.24.0", platform, None) if platform else None
        monkeypatch.setattr(engines, "find", lambda _: found)
        shims._platform.cache_clear()

    rows = (Difference("one", "0.24.0", "0.24.0", "cpu", "it is wrong"),)
    monkeypatch.setattr(support, "differences", lambda _: rows)
    install("cpu")
    yield install
    shims._platform.cache_clear()


@pytest.fixture(name="patched")
def patched_fixture(engine):  # noqa: F811
    """The fake engine's module, patched."""
    (engine / "model.py").write_text(SOURCE + CALL)

    def load():
        return importlib.import_module("fake_engine.model")

    return load


def test_the_repair_is_there_when_the_patch_is_passed(patched, shim):  # noqa: F811
    shim()
    assert patched().AFTER == "repaired"


def test_the_plugin_does_not_repair_again(patched, shim):  # noqa: F811
    shim()
    shims.install(["one"], log)
    assert patched().Draft().norm() == "repaired"
    shims.install(["one"], log)
    assert len(shim.calls) == 1


@pytest.mark.parametrize(("platform", "norm"), [("cpu", "repaired"), ("cuda", "published")])
def test_platforms_without_the_difference_are_left_alone(
    patched, shim, installed, platform, norm  # noqa: F811
):  # fmt: skip
    shim()
    installed(platform)
    assert norm == patched().AFTER


@pytest.mark.parametrize(
    ("symbol", "known", "message"),
    [
        ("Draft.norm", "0" * 16, "Draft.norm in fake_engine.model is not the source"),
        ("Draft.gone", NORM, "has no attribute 'gone'"),
        ("no.such.module:norm", NORM, "No module named 'no'"),
    ],
)
def test_another_source_stops_the_engine(patched, shim, symbol, known, message):  # noqa: F811
    shim(fingerprints={symbol: frozenset({known})})
    with pytest.raises(UnsupportedEngineError, match=message) as caught:
        patched()
    assert "patch revert" in str(caught.value)
    assert "fake_engine.model" not in sys.modules


def test_a_repair_that_fails_stops_the_engine(patched, shim):  # noqa: F811
    def apply(module):
        raise RuntimeError("wrong here")

    shim(apply=apply)
    with pytest.raises(RuntimeError, match="wrong here"):
        patched()


def test_an_engine_without_metadata_is_not_guessed_at(patched, shim, installed):  # noqa: F811
    shim()
    installed(None)
    with pytest.raises(UnsupportedEngineError, match="metadata are not installed"):
        patched()
