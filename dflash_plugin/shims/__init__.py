"""Run-time repairs: one upstream difference a file, applied when its module is imported.

Every shim module has a ``SHIM``. Nothing is imported from an engine until the
engine imports it itself, so a shim that is not needed costs nothing.
"""

from __future__ import annotations

import hashlib
import importlib.abc
import importlib.util
import inspect
import logging
import sys
import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.machinery import ModuleSpec
from types import ModuleType

NAMES: Mapping[str, str] = {"context-k-norm": "vllm_context_k_norm"}
"""Shim name, as ``support`` uses it -> module in this package."""


@dataclass(frozen=True)
class Shim:
    """One upstream difference and its bridge.

    Attributes:
        module: the engine module that is changed right after its first import.
        fingerprints: per symbol in it, the :func:`fingerprint` values of the sources this
            was written against; anything else is left alone.
        apply: called with the module; returns what it did, or why nothing was needed.
    """

    name: str
    symptom: str
    mechanism: str
    removal: str
    module: str
    fingerprints: Mapping[str, frozenset[str]]
    apply: Callable[[ModuleType], str]


def load(name: str) -> Shim:
    """The shim of that name."""
    module = importlib.import_module(f"{__name__}.{NAMES[name]}")
    shim: Shim = module.SHIM
    return shim


def install(names: Sequence[str], log: logging.Logger) -> None:
    """Apply shims as soon as the modules they change are imported; idempotent."""
    for name in names:
        shim = load(name)

        def changed(module: ModuleType, shim: Shim = shim) -> None:
            _apply(shim, module, log)

        _after_import(shim.module, changed)


def fingerprint(function: object) -> str:
    """A short hash of a function's source, indentation and trailing blanks aside."""
    source = textwrap.dedent(inspect.getsource(function))  # type: ignore[arg-type]
    lines = [line.rstrip() for line in source.splitlines()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def resolve(module: ModuleType, symbol: str) -> object:
    """``Class.method`` in a module; AttributeError if it is gone."""
    found: object = module
    for part in symbol.split("."):
        found = getattr(found, part)
    return found


def _apply(shim: Shim, module: ModuleType, log: logging.Logger) -> None:
    marker = f"_dflash_plugin_{NAMES[shim.name]}"
    if getattr(module, marker, False):
        return
    try:
        for symbol, known in shim.fingerprints.items():
            found = fingerprint(resolve(module, symbol))
            if found not in known:
                log.warning(
                    "dflash-plugin: %s not applied: %s.%s is not the source it was written "
                    "for (%s); update dflash-plugin",
                    *(shim.name, shim.module, symbol, found),
                )
                return
        done = shim.apply(module)
        setattr(module, marker, True)
        log.info("dflash-plugin: %s: %s", shim.name, done)
    except Exception:  # the engine must run whatever is wrong here
        log.exception("dflash-plugin: %s not applied because of the error below", shim.name)


def _after_import(name: str, action: Callable[[ModuleType], None]) -> None:
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        action(module)
        return
    if not any(isinstance(f, _Finder) and f.name == name for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name, action))


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the import system find ``name`` as ever, and acts once it is loaded."""

    def __init__(self, name: str, action: Callable[[ModuleType], None]) -> None:
        self.name, self.action = name, action

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(fullname)
        if spec is not None and spec.loader is not None:
            spec.loader = _Loader(spec.loader, self.action)
        return spec


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, action: Callable[[ModuleType], None]) -> None:
        self.loader, self.action = loader, action

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self.loader.exec_module(module)
        self.action(module)

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)  # get_source and friends, for tracebacks
