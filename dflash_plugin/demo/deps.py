"""The demo's optional packages, imported only when something is fetched or converted."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from ..errors import MissingDependencyError


def need(module: str) -> Any:
    """Import ``module``; a missing package is a ``MissingDependencyError`` that names the extra."""
    try:
        return import_module(module)
    except ImportError as err:
        raise MissingDependencyError(
            f"the demo pair needs the Python package {err.name or module}",
            hint="pip install 'dflash-plugin[demo]'",
        ) from err
