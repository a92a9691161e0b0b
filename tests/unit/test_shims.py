"""Shims: applied once, right after the import, to known sources only; never in the way."""

from __future__ import annotations

import dataclasses
import importlib
import importlib.util
import inspect
import logging
import sys
import threading
import traceback

import pytest

from dflash_plugin import shims
from dflash_plugin.shims import Shim

SOURCE = '''\
"""A model of an engine."""

LOADED = []
LOADED.append(1)


class Draft:
    def norm(self):
        return "published"

    def fail(self):
        raise ValueError("from the engine")
'''
NORM, FAIL = "b64d0af1798e4385", "5022184eb7a53184"  # fingerprints of the two methods
log = logging.getLogger("test-shims")


@pytest.fixture
def engine(tmp_path, monkeypatch):
    """The folder of a package ``fake_engine`` with a module ``model``; import state is restored."""
    folder = tmp_path / "fake_engine"
    folder.mkdir()
    (folder / "__init__.py").touch()
    (folder / "model.py").write_text(SOURCE)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    importlib.invalidate_caches()
    yield folder
    for name in [name for name in sys.modules if name.partition(".")[0] == "fake_engine"]:
        del sys.modules[name]


@pytest.fixture
def shim(monkeypatch):
    """Registers shims of that module by name; each notes its calls in ``calls``."""
    registered: dict[str, Shim] = {}
    monkeypatch.setattr(shims, "load", registered.__getitem__)
    monkeypatch.setattr(shims, "NAMES", {})

    def make(name="one", **changes):
        def apply(module):
            make.calls.append((name, module))
            module.Draft.norm = lambda self: "repaired"
            return "repaired"

        fields = {
            "name": name,
            "symptom": "s",
            "mechanism": "m",
            "removal": "r",
            "module": "fake_engine.model",
            "fingerprints": {"Draft.norm": frozenset({NORM})},
            "apply": apply,
        }
        registered[name] = Shim(**{**fields, **changes})
        shims.NAMES[name] = f"fake_{name}"
        return registered[name]

    make.calls = []
    return make


def model():
    return importlib.import_module("fake_engine.model")


def finders() -> list[object]:
    return [finder for finder in sys.meta_path if type(finder).__module__ == shims.__name__]


# --- when ---


def test_nothing_is_imported_before_the_engine_does(engine, shim):
    shim()
    shims.install(["one"], log)
    assert "fake_engine.model" not in sys.modules
    assert shim.calls == []


def test_it_is_applied_right_after_the_import(engine, shim, caplog):
    shim()
    shims.install(["one"], log)
    with caplog.at_level(logging.DEBUG):
        from_engine = model()
    assert from_engine.Draft().norm() == "repaired"
    assert shim.calls == [("one", from_engine)]
    assert "dflash-plugin: one: repaired" in caplog.text


def test_it_is_applied_at_once_where_the_module_is_there_already(engine, shim):
    shim()
    from_engine = model()
    shims.install(["one"], log)
    assert from_engine.Draft().norm() == "repaired"
    assert finders() == []


def test_it_is_applied_once(engine, shim):
    shim()
    for _ in range(3):
        shims.install(["one"], log)
    assert len(finders()) == 1
    from_engine = model()
    shims.install(["one"], log)
    assert len(shim.calls) == 1
    assert from_engine.LOADED == [1]


def test_two_shims_of_one_module_are_both_applied(engine, shim):
    for name in ("one", "two"):
        shim(name, fingerprints={"Draft.fail": frozenset({FAIL})})
        shims.install([name], log)
    assert len(finders()) == 1
    model()
    assert [name for name, _ in shim.calls] == ["one", "two"]


def test_other_modules_are_left_alone(engine, shim):
    (engine / "other.py").write_text(SOURCE)
    shim()
    shims.install(["one"], log)
    assert importlib.import_module("fake_engine.other").Draft().norm() == "published"
    assert len(finders()) == 1


# --- the import system afterwards ---


def test_the_finder_leaves_after_use(engine, shim):
    before = list(sys.meta_path)
    shim()
    shims.install(["one"], log)
    model()
    assert sys.meta_path == before


def test_the_module_keeps_its_own_loader(engine, shim):
    shim()
    shims.install(["one"], log)
    from_engine = model()
    for loader in (from_engine.__loader__, from_engine.__spec__.loader):
        assert type(loader).__module__.startswith(("importlib", "_frozen_importlib"))


def test_looking_for_the_module_does_not_use_the_shim_up(engine, shim):
    shim()
    shims.install(["one"], log)
    for _ in range(2):
        spec = importlib.util.find_spec("fake_engine.model")
        assert spec.loader.get_source("fake_engine.model") == SOURCE
    assert model().Draft().norm() == "repaired"


def test_an_import_that_fails_may_be_tried_again(engine, shim):
    (engine / "model.py").write_text("import no_such_module_at_all\n")
    shim()
    shims.install(["one"], log)
    with pytest.raises(ModuleNotFoundError, match="no_such_module_at_all"):
        model()
    (engine / "model.py").write_text(SOURCE)
    importlib.invalidate_caches()
    assert model().Draft().norm() == "repaired"


def test_a_module_that_is_not_there_is_still_not_there(engine, shim):
    (engine / "model.py").unlink()
    shim()
    shims.install(["one"], log)
    with pytest.raises(ModuleNotFoundError, match=r"fake_engine\.model"):
        model()


def test_sources_and_tracebacks_still_work(engine, shim):
    shim()
    shims.install(["one"], log)
    from_engine = model()
    assert inspect.getsource(from_engine) == SOURCE
    with pytest.raises(ValueError, match="from the engine") as caught:
        from_engine.Draft().fail()
    text = "".join(traceback.format_tb(caught.value.__traceback__))
    assert 'raise ValueError("from the engine")' in text
    assert "dflash_plugin" not in text


def test_threads_that_import_at_once_get_one_repaired_module(engine, shim):
    (engine / "model.py").write_text("import time\ntime.sleep(0.05)\n" + SOURCE)
    shim()
    shims.install(["one"], log)
    start, found = threading.Barrier(8), []

    def use(look: bool) -> None:
        start.wait()
        if look:
            importlib.util.find_spec("fake_engine.model")
        found.append(model().Draft().norm())

    threads = [threading.Thread(target=use, args=(i % 2 == 0,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == ["repaired"] * 8
    assert len(shim.calls) == 1
    assert finders() == []


# --- what is left alone ---


def test_an_unknown_source_is_left_alone_with_a_warning(engine, shim, caplog):
    (engine / "model.py").write_text(SOURCE.replace('"published"', '"new release"'))
    shim()
    shims.install(["one"], log)
    assert model().Draft().norm() == "new release"
    assert shim.calls == []
    (record,) = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert "one not applied: Draft.norm in fake_engine.model is not the source" in record.message


@pytest.mark.parametrize("symbol", ["Draft.gone", "Gone.norm"])
def test_a_symbol_that_is_gone_is_logged(engine, shim, caplog, symbol):
    shim(fingerprints={symbol: frozenset({NORM})})
    shims.install(["one"], log)
    assert model().Draft().norm() == "published"
    assert "one not applied because of the error below" in caplog.text
    assert "AttributeError" in caplog.text


def test_sources_in_other_modules_count_too(engine, shim, caplog):
    (engine / "other.py").write_text("def norm():\n    return 1\n")
    symbol = "fake_engine.other:norm"
    good = shims.fingerprint(shims.resolve(model(), symbol))
    shim(fingerprints={symbol: frozenset({good})})
    shims.install(["one"], log)
    assert len(shim.calls) == 1
    shim("two", fingerprints={symbol: frozenset({"0" * 16})})
    shims.install(["two"], log)
    assert len(shim.calls) == 1
    assert "two not applied: fake_engine.other:norm" in caplog.text


def test_a_shim_that_fails_does_not_break_the_import(engine, shim, caplog):
    def apply(module):
        raise RuntimeError("wrong here")

    shim(apply=apply)
    shims.install(["one"], log)
    assert model().Draft().norm() == "published"
    assert "wrong here" in caplog.text


def test_one_failing_shim_does_not_stop_the_next(engine, shim):
    shim("one", fingerprints={"Draft.gone": frozenset()})
    shim("two")
    shims.install(["one", "two"], log)
    assert model().Draft().norm() == "repaired"


# --- fingerprints ---


def test_the_fingerprint_is_the_known_one(engine):
    assert shims.fingerprint(model().Draft.norm) == NORM
    assert shims.fingerprint(model().Draft.fail) == FAIL


@pytest.mark.parametrize(
    ("old", "new", "same"),
    [
        ('return "published"', 'return "published"   ', True),
        ("LOADED = []", "LOADED = []\n\n# more above", True),
        ("class Draft:", "if True:\n  class Draft:", True),
        ('return "published"', 'return "other"', False),
        ("def norm(self)", "def norm(self, x=1)", False),
    ],
)
def test_only_what_a_function_says_counts(engine, old, new, same):
    (engine / "model.py").write_text(SOURCE.replace(old, new))
    assert (shims.fingerprint(model().Draft.norm) == NORM) is same


def test_shims_are_frozen(shim):
    with pytest.raises(dataclasses.FrozenInstanceError):
        shim().name = "other"
