"""Fake engine modules for the shims: made in memory, gone after the test."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import Any

import pytest


@pytest.fixture
def engine(monkeypatch):
    """``engine("vllm.some.module", name=value)``: a module, its packages and attributes."""
    if "vllm" in sys.modules:
        pytest.skip("the real vllm is imported in this process")

    def make(name: str, **attributes: Any) -> ModuleType:
        parent = None
        for end in range(1, name.count(".") + 2):
            part = ".".join(name.split(".")[:end])
            module = sys.modules.get(part)
            if module is None:
                module = ModuleType(part)
                module.__path__ = []  # type: ignore[attr-defined]
                monkeypatch.setitem(sys.modules, part, module)
                if parent is not None:
                    monkeypatch.setattr(parent, part.rpartition(".")[2], module, raising=False)
            parent = module
        assert parent is not None
        for key, value in attributes.items():
            setattr(parent, key, value)
        return parent

    return make
