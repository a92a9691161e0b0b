"""DFlash speculative decoding beside stock inference engines."""

from __future__ import annotations

from typing import Any

_EXPORTS = {
    "load": "local",
    "generate": "local",
    "stream_generate": "local",
    "Pair": "backends.api",
    "Options": "backends.api",
    "Result": "backends.api",
    "Step": "backends.rows",
    "DFlashDraftModel": "backends.transformers_draft",
}


def __getattr__(name: str) -> Any:
    # Lazily: this package is imported in every engine process, and reading
    # distribution metadata costs more than the rest of the import together.
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("dflash-plugin")
        except PackageNotFoundError:
            return "0+unknown"
    if name in _EXPORTS:
        from importlib import import_module

        return getattr(import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*globals(), "__version__", *_EXPORTS])
