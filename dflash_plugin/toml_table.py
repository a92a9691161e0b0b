"""People's TOML files read table by table: a key that nobody asked for is an error."""

from __future__ import annotations

import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from .errors import MatrixError, near_names

T = TypeVar("T")
_ID = re.compile(r"[a-z0-9][a-z0-9.:+_-]*")


def read_toml(path: Path) -> dict[str, Any]:
    """The parsed file.

    Raises:
        MatrixError: it cannot be read, or is not TOML.
    """
    # Here: local back-ends given two folders read no TOML, and the parser is half a MB.
    if sys.version_info >= (3, 11):
        import tomllib
    else:  # pragma: no cover
        import tomli as tomllib

    try:
        with path.open("rb") as file:
            parsed: dict[str, Any] = tomllib.load(file)
    except OSError as err:
        raise MatrixError(
            f"{path}: cannot be read ({err.strerror})", hint="check the path"
        ) from err
    except (ValueError, RecursionError) as err:  # bad TOML, or not UTF-8
        raise MatrixError(f"{path}: not valid TOML: {err}", hint="correct the line named") from err
    return parsed


class Table:
    """One TOML table being read: every key is taken once, and none may be left.

    Every method raises ``MatrixError`` with file, table and key.
    """

    def __init__(self, path: Path, name: str, raw: Any) -> None:
        self.path, self.name = path, name
        if not isinstance(raw, dict):
            raise MatrixError(f"{path}: {name} is {type(raw).__name__}, expected a table")
        self.raw: dict[str, Any] = dict(raw)
        self.known: set[str] = set()

    def error(
        self, message: str, hint: str = "see the comments at the top of the file"
    ) -> MatrixError:
        """The error to raise for this table."""
        return MatrixError(f"{self.path}: {self.name}: {message}", hint=hint)

    def take(self, key: str, kind: type[T], default: Any = ...) -> Any:
        """The value of ``key``, of that type; without ``default`` it has to be there."""
        self.known.add(key)
        if key not in self.raw:
            if default is not ...:
                return default
            raise self.error(f"missing key {key!r} ({kind.__name__})", hint=f"add {key} = …")
        value = self.raw.pop(key)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(f"{key} is {value!r}, expected {kind.__name__}")
        return value

    def count(self, key: str, at_least: int = 1) -> int:
        """An integer that is not too small."""
        value: int = self.take(key, int)
        if value < at_least:
            raise self.error(f"{key} is {value}, expected at least {at_least}")
        return value

    def number(self, key: str) -> float:
        """An integer or a float."""
        value = self.take(key, object)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(f"{key} is {value!r}, expected a number")
        return float(value)

    def identifier(self, key: str) -> str:
        """A name in lower case; from here on messages call the table by it."""
        value: str = self.take(key, str)
        if not _ID.fullmatch(value):
            raise self.error(
                f"{key} is {value!r}, expected lower case letters, digits and . : + _ -"
            )
        self.name = f"{self.name} {value!r}"
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        """A list of strings."""
        values = self.take(key, list)
        if not all(isinstance(value, str) for value in values):
            raise self.error(f"{key} is {values!r}, expected a list of strings")
        return tuple(values)

    def integers(self, key: str) -> tuple[int, ...]:
        """A list of positive integers."""
        values = self.take(key, list)
        if not all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in values):
            raise self.error(f"{key} is {values!r}, expected a list of positive integers")
        return tuple(values)

    def strings_by_name(self, key: str) -> Mapping[str, str]:
        """A table of strings; absent: empty."""
        values = self.take(key, dict, default={})
        if not all(isinstance(value, str) for value in values.values()):
            raise self.error(f"{key} is {values!r}, expected strings")
        return dict(values)

    def numbers_by_name(self, key: str) -> Mapping[str, float]:
        """A table of numbers; absent: empty."""
        values = self.take(key, dict, default={})
        inner = Table(self.path, f"{self.name} {key}", values)
        return {name: inner.number(name) for name in values}

    def table(self, key: str) -> Table:
        """The ``[key]`` table."""
        return Table(self.path, f"{self.name} {key}", self.take(key, dict))

    def tables(self, key: str) -> list[Table]:
        """``[[key]]`` rows; absent: none."""
        rows = self.take(key, list, default=[])
        return [Table(self.path, f"[[{key}]] #{i + 1}", row) for i, row in enumerate(rows)]

    def subtables(self, key: str) -> list[tuple[str, Table]]:
        """``[key.name]`` tables by name."""
        rows = self.take(key, dict)
        return [
            (name, Table(self.path, f"{self.name} {key}.{name}", row)) for name, row in rows.items()
        ]

    def reference(self, key: str, name: str, known: Mapping[str, T]) -> T:
        """What ``name``, given under ``key``, refers to."""
        if name not in known:
            raise self.error(f"{key} names {name!r}, which is not defined", near_names(name, known))
        return known[name]

    def finish(self) -> None:
        """Raise on keys nobody asked for: a misspelt key must not pass as a default."""
        for key in self.raw:
            raise self.error(f"unknown key {key!r}", hint=near_names(key, self.known))


def unique(path: Path, kind: str, rows: list[T]) -> dict[str, T]:
    """Rows by their ``id`` or ``name``; ``MatrixError`` where two have the same."""
    found: dict[str, T] = {}
    for row in rows:
        name: str = getattr(row, "id", None) or row.name  # type: ignore[attr-defined]
        if name in found:
            raise MatrixError(f"{path}: {kind} {name!r} is defined twice", hint="remove one")
        found[name] = row
    return found
