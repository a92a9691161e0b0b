"""Code prompts from the library of the Python that runs: signatures with their docstrings."""

from __future__ import annotations

import ast
import random
import sysconfig
from collections.abc import Iterator
from pathlib import Path

from ...errors import UsageError

WORDINGS = (
    "Complete this Python function.\n\n```python\n{}\n```",
    "Complete the following code:\n\n{}",
    "Write the body of this function.\n\n```python\n{}\n```",
    "Please finish this Python code.\n\n{}",
    "Implement this function in Python:\n\n```python\n{}\n```",
    "{}",
)
_DOCSTRING = range(30, 501)  # characters
_ARGUMENTS = 80  # characters, at most
_NOT_CODE_TO_COMPLETE = {"site-packages", "dist-packages", "test", "tests", "idle_test", "lib2to3"}


def prompts(count: int, seed: int, root: Path | None = None) -> Iterator[str]:
    """``count`` requests to complete a function, the same for the same library and seed.

    Args:
        root: folder of Python files (None: the standard library).

    Raises:
        UsageError: there are fewer functions with a docstring.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    found = sorted(set(stubs(root)))
    if len(found) < count:
        raise UsageError(
            f"{root} has {len(found)} functions with a docstring, asked for {count}",
            hint="ask for fewer",
        )
    chance = random.Random(f"{seed} python")
    for stub in chance.sample(found, count):
        yield chance.choice(WORDINGS).format(stub)


def stubs(root: Path) -> Iterator[str]:
    """Signature and docstring of every documented function below ``root``."""
    for path in sorted(root.rglob("*.py")):
        if _NOT_CODE_TO_COMPLETE.isdisjoint(path.relative_to(root).parts):
            try:
                tree = ast.parse(path.read_text(encoding="utf-8"))
            except (OSError, ValueError, SyntaxError):
                continue  # templates and deliberately broken files lie among them
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef):
                    yield from _stub(node)


def _stub(node: ast.FunctionDef) -> Iterator[str]:
    docstring = ast.get_docstring(node) or ""
    given = node.args.posonlyargs + node.args.args
    if given and given[0].arg in ("self", "cls"):
        (node.args.posonlyargs or node.args.args).pop(0)
        if len(node.args.defaults) > len(given) - 1:
            return
    arguments = ast.unparse(node.args)
    fits = len(docstring) in _DOCSTRING and len(arguments) <= _ARGUMENTS
    if fits and not node.name.startswith("__"):
        text = docstring.replace("\n", "\n    ")
        yield f'def {node.name}({arguments}):\n    """{text}\n    """'
