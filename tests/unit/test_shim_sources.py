"""Fingerprints from text are those that the running engine's functions have."""

from __future__ import annotations

import dataclasses
import importlib
import sys

import pytest

from dflash_plugin import shims
from dflash_plugin.shims import sources

SOURCE = '''\
"""A module of an engine."""
import functools

try:
    import nothing_of_that_name
except ImportError:
    def fallback(x):
        return x

if True:
    def chosen():
        # a comment
        return """
  text at another depth
"""


class Outer:
    limit = 3

    @functools.lru_cache
    @staticmethod
    def cached(
        a,
        b=(1,
           2),
    ):

        return a


    class Inner:
        @property
        def value(self): return 1

        async def later(self):
            return 2

    def last(self):
        return lambda: 0
        # after it


def twice():
    return 1


def twice():
    return 2
# the end'''
SYMBOLS = (
    "fallback",
    "chosen",
    "Outer",
    "Outer.cached",
    "Outer.Inner",
    "Outer.Inner.later",
    "Outer.last",
    "twice",
)


@pytest.fixture
def site(tmp_path, monkeypatch):
    folder = tmp_path / "source_engine"
    folder.mkdir()
    (folder / "__init__.py").write_text("def top():\n    return 0\n")
    (folder / "part.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    for name in [name for name in sys.modules if name.partition(".")[0] == "source_engine"]:
        del sys.modules[name]


@pytest.mark.parametrize("symbol", SYMBOLS)
def test_text_and_running_function_have_one_fingerprint(site, symbol):
    module = importlib.import_module("source_engine.part")
    found = shims.resolve(module, symbol)
    assert sources.fingerprint_in(SOURCE, symbol) == shims.fingerprint(found)


@pytest.mark.parametrize("symbol", ["gone", "Outer.gone", "gone.Inner", "Outer.limit"])
def test_what_is_not_there(symbol):
    assert sources.fingerprint_in(SOURCE, symbol) is None


def shim(**fingerprints):
    real = shims.load("context-k-norm")
    return dataclasses.replace(real, module="source_engine.part", fingerprints=fingerprints)


def test_differences(site):
    read = sources.installed(site)
    good = sources.fingerprint_in(SOURCE, "Outer.last")
    assert sources.differences(shim(**{"Outer.last": {good, "0" * 16}}), read) == []
    wrong = {
        "Outer.last": {"0" * 16},
        "gone": {good},
        "source_engine:top": {good},
        "source_engine.none:top": {good},
    }
    lines = sources.differences(shim(**wrong), read)
    assert lines[0] == f"source_engine.part.Outer.last is another source ({good})"
    assert lines[1] == "source_engine.part.gone is gone"
    assert lines[2].startswith("source_engine.top is another source (")
    assert lines[3] == "source_engine.none.top is gone"
    assert "source_engine" not in sys.modules
