"""DFlash speculative decoding beside stock inference engines."""

from __future__ import annotations


def __getattr__(name: str) -> str:
    # Lazily: this package is imported in every engine process, and reading
    # distribution metadata costs more than the rest of the import together.
    if name == "__version__":
        from importlib.metadata import PackageNotFoundError, version

        try:
            return version("dflash-plugin")
        except PackageNotFoundError:
            return "0+unknown"
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
