"""Whether an engine's source files are the ones the shims were written against.

Reads text only and imports nothing of the engine: for ``doctor``, and for wheels of
platforms that this machine has not.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Callable
from pathlib import Path

from . import Shim, fingerprint_of

Read = Callable[[str], "str | None"]
"""A module's dotted name -> its source text; None where there is no such module."""


def installed(site: Path) -> Read:
    """Sources below a site-packages folder."""

    def read(module: str) -> str | None:
        stem = site.joinpath(*module.split("."))
        for path in (stem.with_suffix(".py"), stem / "__init__.py"):
            if path.exists():
                return path.read_text(encoding="utf-8")
        return None

    return read


def differences(shim: Shim, read: Read) -> list[str]:
    """What is not as the shim knows it, one line a symbol; empty: it will be applied."""
    found = []
    for symbol, known in shim.fingerprints.items():
        module, _, name = symbol.rpartition(":")
        module = module or shim.module
        text = read(module)
        value = None if text is None else fingerprint_in(text, name)
        if value not in known:
            what = "is gone" if value is None else f"is another source ({value})"
            found.append(f"{module}.{name} {what}")
    return found


def fingerprint_in(text: str, symbol: str) -> str | None:
    """:func:`dflash_plugin.shims.fingerprint` of ``Class.method`` in a module's text."""
    source = source_in(text, symbol)
    return None if source is None else fingerprint_of(source)


def source_in(text: str, symbol: str) -> str | None:
    """The source of ``Class.method`` in a module's text; None: there is none."""
    node: ast.AST = ast.parse(text)
    for part in symbol.split("."):
        named = [
            child
            for child in _statements(node)
            if isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
            and child.name == part
        ]
        if not named:
            return None
        node = named[-1]
    assert isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))
    first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
    # What inspect.getsource would give, comments after the last statement included.
    return "".join(inspect.getblock(text.splitlines(keepends=True)[first - 1 :]))


def _statements(node: ast.AST) -> list[ast.AST]:
    """The statements of a body, those under a top-level ``if`` or ``try`` included."""
    found: list[ast.AST] = []
    for child in ast.iter_child_nodes(node):
        found.append(child)
        if isinstance(child, (ast.If, ast.Try, ast.ExceptHandler)):
            found += _statements(child)
    return found
