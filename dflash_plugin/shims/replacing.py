"""Putting a function in the place of an engine's, wherever the engine holds it by name."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def replace(owner: Any, name: str, new: Callable[..., Any]) -> None:
    """Set ``owner.name``, and every module's own name for what was there.

    An engine's worker processes load plugins late: by then ``from module import function``
    has copied the old function into other modules. SGLang's ``HookRegistry`` does the same,
    but imports every module it changes in every process, does not ask what is there, and
    only logs what it could not change.
    """
    old = getattr(owner, name)
    new.__wrapped__ = old  # type: ignore[attr-defined]
    setattr(owner, name, new)
    if not isinstance(owner, ModuleType):
        return
    for module in list(sys.modules.values()):
        if isinstance(module, ModuleType) and module is not owner:
            for key in [key for key, value in list(vars(module).items()) if value is old]:
                setattr(module, key, new)
