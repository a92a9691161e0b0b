"""Run-time repairs: one upstream difference a file, applied when its module is imported.

Every shim module has a ``SHIM``. Nothing is imported from an engine until the
engine imports it itself, so a shim that is not needed costs nothing.
"""

from __future__ import annotations

import functools
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

from .. import engines, support
from ..errors import UnsupportedEngineError

NAMES: Mapping[str, str] = {
    "context-k-norm": "vllm_context_k_norm",
    "cpu-kv-update": "vllm_cpu_kv_update",
    "cpu-stale-kv": "vllm_cpu_stale_kv",
    "register-arguments": "vllm_register_arguments",
    "register-config": "vllm_register_config",
    "register-async": "vllm_register_async",
    "register-proposer": "vllm_register_proposer",
    "register-lookahead": "vllm_register_lookahead",
    "register-cpu-runner": "vllm_register_cpu_runner",
    "cpu-packed-qkv": "vllm_cpu_packed_qkv",
    "cpu-dflash-inputs": "vllm_cpu_dflash_inputs",
    "cpu-sampler-arguments": "vllm_cpu_sampler_arguments",
    "cpu-taps": "vllm_cpu_taps",
    "tap-offset": "vllm_tap_offset",
    "draft-lookahead": "vllm_draft_lookahead",
    "draft-context-end": "vllm_draft_context_end",
    "draft-windows": "vllm_draft_windows",
    "draft-windows-v2": "vllm_draft_windows_v2",
    "draft-scaling": "vllm_draft_scaling",
    "cpu-expand": "vllm_cpu_expand",
    "cpu-kernels": "vllm_cpu_kernels",
    "draft-lora": "vllm_draft_lora",
    "draft-sampling": "vllm_draft_sampling",
    "draft-scale": "vllm_draft_scale",
    "mixed-swa": "vllm_mixed_swa",
    "mixed-swa-config": "vllm_mixed_swa_config",
    "mixed-swa-model": "vllm_mixed_swa_model",
    "mm-prefix": "vllm_mm_prefix",
    "swa-causal": "vllm_swa_causal",
    "swa-causal-v2": "vllm_swa_causal_v2",
    "triton-geometry": "vllm_triton_geometry",
}
"""Shim name, as ``support`` uses it -> module in this package; each is a patch too. vLLM's."""

SGLANG_NAMES: Mapping[str, str] = {
    name: name.replace("-", "_")
    for name in (
        "sglang-cpu-guard",
        "sglang-cpu-arguments",
        "sglang-cpu-cache-locs",
        "sglang-cpu-streams",
        "sglang-cpu-draft-backend",
        "sglang-cpu-req-to-token",
        "sglang-cpu-kv-copy",
        "sglang-cpu-norm-rope",
        "sglang-cpu-verify",
        "sglang-cpu-sampling",
        "sglang-draft-dtype",
        "sglang-draft-tensors",
        "sglang-draft-attention",
        "sglang-minimax-taps",
    )
}
"""The same for SGLang."""


def names(engine: str) -> Mapping[str, str]:
    """The shims of an engine."""
    return SGLANG_NAMES if engine == "sglang" else NAMES


@dataclass(frozen=True)
class Shim:
    """One upstream difference and its bridge.

    Attributes:
        module: the engine module that is changed right after its first import.
        fingerprints: per symbol (``Class.method`` of ``module``, or ``package.module:name``),
            the :func:`fingerprint` values of the sources this was written against; anything
            else is left alone.
        removal: the condition on which it is deleted, and the test that fails once it holds.
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
    module = importlib.import_module(f"{__name__}.{_module(name)}")
    shim: Shim = module.SHIM
    return shim


def install(names: Sequence[str], log: logging.Logger) -> None:
    """Apply shims as soon as the modules they change are imported; idempotent."""
    for name in names:
        shim = load(name)

        def changed(module: ModuleType, shim: Shim = shim) -> None:
            _apply(shim, module, log)

        _after_import(shim.module, shim.name, changed)


def applied(shim: Shim, module: ModuleType | None) -> bool:
    """Whether ``shim`` is in place in ``module``, its own."""
    return bool(getattr(module, _marker(shim), False))


def fingerprint(function: object) -> str:
    """A short hash of a function's source, indentation and trailing blanks aside."""
    return fingerprint_of(inspect.getsource(function))  # type: ignore[arg-type]


def fingerprint_of(source: str) -> str:
    """:func:`fingerprint` of a function's source text."""
    lines = [line.rstrip() for line in textwrap.dedent(source).splitlines()]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def resolve(module: ModuleType, symbol: str) -> object:
    """``Class.method`` in a module, or ``package.module:Class.method`` in another.

    Raises:
        AttributeError, ImportError: it is gone.
    """
    other, _, name = symbol.rpartition(":")
    found: object = importlib.import_module(other) if other else module
    for part in name.split("."):
        found = getattr(found, part)
    return found


def patched(name: str) -> None:
    """Apply a shim to its module while that is imported, in an engine patched to ask for it.

    A patch calls this below the last definition that the shim needs; see patches/README.md.
    It does nothing on platforms that the difference does not concern.

    Raises:
        UnsupportedEngineError: the repair that the patch promises cannot be made, so the engine
            must not run.
    """
    shim = load(name)
    engine = shim.module.partition(".")[0]
    platforms = {d.platform for d in support.differences(engine) if d.shim == name}
    module = sys.modules[shim.module]
    if applied(shim, module) or not platforms & {None, _platform(engine)}:
        return
    try:
        wrong = _unknown(shim, module)
    except (AttributeError, ImportError) as err:
        wrong = str(err)
    if wrong:
        raise UnsupportedEngineError(
            f"dflash-plugin: this engine was patched for {shim.name}, and {wrong}",
            hint="revert the patch (dflash-plugin patch revert), and apply that of this release",
        )
    shim.apply(module)
    setattr(module, _marker(shim), True)


@functools.cache
def _platform(engine: str) -> str:
    found = engines.find(engine)
    if found is None:
        raise UnsupportedEngineError(
            f"dflash-plugin: this {engine} was patched, and its metadata are not installed",
            hint=f"reinstall {engine}; without them nobody knows which platform it is for",
        )
    if engine == "sglang":
        from . import sglang_device

        return sglang_device.platform(found)
    return found.platform


def _unknown(shim: Shim, module: ModuleType) -> str:
    """What is not the source that the shim was written for; empty: all of it is."""
    for symbol, known in shim.fingerprints.items():
        found = fingerprint(resolve(module, symbol))
        if found not in known:
            return f"{symbol} in {shim.module} is not the source it was written for ({found})"
    return ""


def _apply(shim: Shim, module: ModuleType, log: logging.Logger) -> None:
    if applied(shim, module):
        return
    try:
        wrong = _unknown(shim, module)
        if wrong:
            log.warning("dflash-plugin: %s not applied: %s; update dflash-plugin", shim.name, wrong)
            return
        done = shim.apply(module)
        setattr(module, _marker(shim), True)
        log.debug("dflash-plugin: %s: %s", shim.name, done)
    except Exception:  # the engine must run whatever is wrong here
        log.exception("dflash-plugin: %s not applied because of the error below", shim.name)


def _marker(shim: Shim) -> str:
    return f"_dflash_plugin_{_module(shim.name)}"


def _module(name: str) -> str:
    return NAMES[name] if name in NAMES else SGLANG_NAMES[name]


def _after_import(name: str, key: str, action: Callable[[ModuleType], None]) -> None:
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        action(module)
        return
    finder = next((f for f in sys.meta_path if isinstance(f, _Finder) and f.name == name), None)
    if finder is None:
        finder = _Finder(name)
        sys.meta_path.insert(0, finder)
    finder.actions.setdefault(key, action)


class _Finder(importlib.abc.MetaPathFinder):
    """Lets the import system find ``name`` as ever, and acts once it is loaded.

    It stays until then: looking for a module (``importlib.util.find_spec``) is not
    importing it, and an import that fails may be tried again.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.actions: dict[str, Callable[[ModuleType], None]] = {}

    def find_spec(
        self,
        fullname: str,
        path: Sequence[str] | None,
        target: ModuleType | None = None,
    ) -> ModuleSpec | None:
        if fullname != self.name:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec: ModuleSpec | None = (
                find(fullname, path, target) if find and finder is not self else None
            )
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader, self)
                return spec
        return None

    def loaded(self, module: ModuleType) -> None:
        """Act, once, and leave."""
        # A new list: other threads may be walking the old one, and would skip a finder.
        sys.meta_path = [finder for finder in sys.meta_path if finder is not self]
        actions, self.actions = self.actions, {}
        for action in actions.values():
            action(module)


class _Loader(importlib.abc.Loader):
    def __init__(self, loader: importlib.abc.Loader, finder: _Finder) -> None:
        self.loader, self.finder = loader, finder

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self.loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        # From here on the module looks as if nobody had been between.
        module.__loader__ = self.loader
        if module.__spec__ is not None:
            module.__spec__.loader = self.loader
        self.loader.exec_module(module)
        self.finder.loaded(module)

    def __getattr__(self, name: str) -> object:
        return getattr(self.loader, name)  # get_source and friends, for who only looks
