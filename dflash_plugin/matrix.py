"""``compat_matrix.toml`` -> frozen dataclasses; anything unknown is an error.

The file is data that people edit: engine releases and how to install them, the
variants, the model pairs, which of them are run together, and how long a run
is. Nothing here is written by a program.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import Any, TypeVar

from .errors import MatrixError, UnknownCellError, near_names

if sys.version_info >= (3, 11):
    import tomllib
else:  # pragma: no cover
    import tomli as tomllib

T = TypeVar("T")
VERDICTS = ("lossless", "faithful", "faster")
SERVES = "serves"
"""What comes before the verdicts: the engine starts with the draft and answers."""
_ID = re.compile(r"[a-z0-9][a-z0-9.:+_-]*")


@dataclass(frozen=True)
class Build:
    """How one engine release is installed and started on one platform."""

    platform: str
    distribution: str
    torch: str
    requires_python: str
    lock: str | None  # None: not built here, an interpreter that has it must be named
    env: Mapping[str, str]
    args: tuple[str, ...]


@dataclass(frozen=True)
class Engine:
    """One engine release, e.g. ``vllm-0.32.0``."""

    name: str
    version: str
    builds: Mapping[str, Build]

    @property
    def id(self) -> str:
        """``<name>-<version>``, the first part of a cell id."""
        return f"{self.name}-{self.version}"


@dataclass(frozen=True)
class Variant:
    """What is done to the stock engine: nothing, the plugin, a patch set."""

    name: str
    plugin: bool
    description: str


@dataclass(frozen=True)
class Expected:
    """A known acceptance length of a pair, and the settings it belongs to."""

    prompts: str
    num_speculative_tokens: int
    al: float
    tolerance: float
    source: str


@dataclass(frozen=True)
class Pair:
    """A target and its draft. ``embedded`` pairs travel with this package."""

    id: str
    target: str
    target_revision: str | None
    draft: str
    draft_revision: str | None
    embedded: bool
    num_speculative_tokens: int
    notes: str
    expected: tuple[Expected, ...]


@dataclass(frozen=True)
class Cell:
    """One engine release x variant x platform x pair.

    ``not_run``: why it is listed and yet not run by default; empty: it is run.
    """

    engine: Engine
    variant: Variant
    platform: str
    pair: Pair
    not_run: str = ""

    @property
    def id(self) -> str:
        """Names the result, the test, the log and the container."""
        return f"{self.engine.id}/{self.variant.name}/{self.platform}/{self.pair.id}"

    @property
    def build(self) -> Build:
        """The engine's build for this cell's platform."""
        return self.engine.builds[self.platform]


@dataclass(frozen=True)
class Profile:
    """How much of a cell is run: counts of prompts, tokens and rounds."""

    name: str
    lossless_prompts: int
    control_prompts: int
    speed_prompts: int
    speed_rounds: int
    max_tokens: int
    concurrency: tuple[int, ...]


@dataclass(frozen=True)
class Known:
    """A verdict (or ``serves``) that is known not to pass, why, and until when.

    ``cell`` is a cell's id or a glob of several.
    """

    cell: str
    verdict: str
    reason: str
    until: str


@dataclass(frozen=True)
class Matrix:
    """The whole file."""

    path: Path
    engines: Mapping[str, Engine]
    variants: Mapping[str, Variant]
    pairs: Mapping[str, Pair]
    profiles: Mapping[str, Profile]
    cells: tuple[Cell, ...]
    known: tuple[Known, ...]

    def known_failures(self, cell_id: str) -> dict[str, Known]:
        """The verdicts of a cell that are known not to pass, by name."""
        return {row.verdict: row for row in self.known if fnmatchcase(cell_id, row.cell)}

    def cell(self, cell_id: str) -> Cell:
        """The cell of that id; ``UnknownCellError`` with the near names otherwise."""
        by_id = {cell.id: cell for cell in self.cells}
        return _lookup(by_id, cell_id, "cell", self.path)

    def profile(self, name: str) -> Profile:
        """The profile of that name."""
        return _lookup(self.profiles, name, "profile", self.path)

    def pair(self, name: str) -> Pair:
        """The pair of that id."""
        return _lookup(self.pairs, name, "pair", self.path)

    def pair_for(self, target: str) -> Pair | None:
        """The pair whose id or target repository is ``target``, if there is one."""
        for pair in self.pairs.values():
            if target in (pair.id, pair.target):
                return pair
        return None


def default_path() -> Path:
    """The packaged matrix, or the checkout's own."""
    packaged = Path(__file__).parent / "data" / "compat_matrix.toml"
    return packaged if packaged.exists() else Path(__file__).parents[1] / "compat_matrix.toml"


@lru_cache(maxsize=8)
def load(path: Path | None = None) -> Matrix:
    """Read and check a matrix file.

    Raises:
        MatrixError: missing file, bad TOML, unknown or missing key, wrong type,
            or a reference to something undefined; names file, table and field.
    """
    path = path or default_path()
    try:
        with path.open("rb") as file:
            raw = tomllib.load(file)
    except OSError as err:
        raise MatrixError(
            f"{path}: cannot be read ({err.strerror})", hint="check the path"
        ) from err
    except (ValueError, RecursionError) as err:  # bad TOML, or not UTF-8
        raise MatrixError(f"{path}: not valid TOML: {err}", hint="correct the line named") from err

    top = _Table(path, "top level", raw)
    if top.take("schema", int) != 1:
        raise MatrixError(f"{path}: schema is {raw['schema']}, expected 1", hint="update this tool")
    engines = _unique(path, "engine", [_engine(t) for t in top.tables("engine")])
    variants = _unique(path, "variant", [_variant(t) for t in top.tables("variant")])
    pairs = _unique(path, "pair", [_pair(t) for t in top.tables("pair")])
    profiles = _unique(path, "profile", [_profile(t) for t in top.tables("profile")])
    cells: dict[str, Cell] = {}
    for table in top.tables("cells"):
        for cell in _cells(table, engines, variants, pairs):
            if cell.id in cells:
                raise MatrixError(
                    f"{path}: [[cells]] lists {cell.id} twice", hint="remove one of the two"
                )
            cells[cell.id] = cell
    known = tuple(_known(table, cells) for table in top.tables("known"))
    rows = [(row.cell, row.verdict) for row in known]
    for cell_id, verdict in rows:
        if rows.count((cell_id, verdict)) > 1:
            raise MatrixError(
                f"{path}: [[known]] lists {verdict} of {cell_id} twice",
                hint="remove one of the two",
            )
    top.finish()
    return Matrix(path, engines, variants, pairs, profiles, tuple(cells.values()), known)


def _engine(table: _Table) -> Engine:
    name, version = table.identifier("name"), table.take("version", str)
    builds = {}
    for platform, sub in table.subtables("build"):
        builds[platform] = Build(
            platform=platform,
            distribution=sub.take("distribution", str),
            torch=sub.take("torch", str),
            requires_python=sub.take("requires_python", str),
            lock=sub.take("lock", str, default=None),
            env=sub.strings_by_name("env"),
            args=sub.strings("args"),
        )
        sub.finish()
    table.finish()
    return Engine(name, version, builds)


def _variant(table: _Table) -> Variant:
    variant = Variant(
        name=table.identifier("name"),
        plugin=table.take("plugin", bool),
        description=table.take("description", str),
    )
    table.finish()
    return variant


def _pair(table: _Table) -> Pair:
    expected = []
    for sub in table.tables("expected"):
        expected.append(
            Expected(
                prompts=sub.take("prompts", str),
                num_speculative_tokens=sub.count("num_speculative_tokens"),
                al=sub.number("al"),
                tolerance=sub.number("tolerance"),
                source=sub.take("source", str),
            )
        )
        sub.finish()
    pair = Pair(
        id=table.identifier("id"),
        target=table.take("target", str),
        target_revision=table.take("target_revision", str, default=None),
        draft=table.take("draft", str),
        draft_revision=table.take("draft_revision", str, default=None),
        embedded=table.take("embedded", bool, default=False),
        num_speculative_tokens=table.count("num_speculative_tokens"),
        notes=table.take("notes", str, default=""),
        expected=tuple(expected),
    )
    table.finish()
    return pair


def _profile(table: _Table) -> Profile:
    profile = Profile(
        name=table.identifier("name"),
        lossless_prompts=table.count("lossless_prompts"),
        control_prompts=table.count("control_prompts"),
        speed_prompts=table.count("speed_prompts"),
        speed_rounds=table.count("speed_rounds"),
        max_tokens=table.count("max_tokens"),
        concurrency=table.integers("concurrency"),
    )
    table.finish()
    return profile


def _cells(
    table: _Table,
    engines: Mapping[str, Engine],
    variants: Mapping[str, Variant],
    pairs: Mapping[str, Pair],
) -> Iterator[Cell]:
    chosen = {key: table.strings(key) for key in ("engines", "variants", "platforms", "pairs")}
    for key, names in chosen.items():
        if not names:
            raise table.error(f"{key} is empty, so nothing would be run")
    not_run = table.take("not_run", str, default="")
    table.finish()
    for engine_id in chosen["engines"]:
        engine = table.reference("engines", engine_id, engines)
        for variant in chosen["variants"]:
            for platform in chosen["platforms"]:
                table.reference("platforms", platform, engine.builds)
                for pair in chosen["pairs"]:
                    yield Cell(
                        engine=engine,
                        variant=table.reference("variants", variant, variants),
                        platform=platform,
                        pair=table.reference("pairs", pair, pairs),
                        not_run=not_run,
                    )


def _known(table: _Table, cells: Mapping[str, Cell]) -> Known:
    known = Known(
        cell=table.take("cell", str),
        verdict=table.take("verdict", str),
        reason=table.take("reason", str),
        until=table.take("until", str),
    )
    if not any(fnmatchcase(cell_id, known.cell) for cell_id in cells):
        table.reference("cell", known.cell, cells)
    table.reference("verdict", known.verdict, dict.fromkeys((SERVES, *VERDICTS)))
    table.finish()
    return known


class _Table:
    """One TOML table being read: every key is taken once, and none may be left."""

    def __init__(self, path: Path, name: str, raw: Any) -> None:
        self.path, self.name = path, name
        if not isinstance(raw, dict):
            raise MatrixError(f"{path}: {name} is {type(raw).__name__}, expected a table")
        self.raw: dict[str, Any] = dict(raw)
        self.known: set[str] = set()

    def error(
        self, message: str, hint: str = "see the comments at the top of the file"
    ) -> MatrixError:
        return MatrixError(f"{self.path}: {self.name}: {message}", hint=hint)

    def take(self, key: str, kind: type[T], default: Any = ...) -> Any:
        self.known.add(key)
        if key not in self.raw:
            if default is not ...:
                return default
            raise self.error(f"missing key {key!r} ({kind.__name__})", hint=f"add {key} = …")
        value = self.raw.pop(key)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise self.error(f"{key} is {value!r}, expected {kind.__name__}")
        return value

    def count(self, key: str) -> int:
        value: int = self.take(key, int)
        if value < 1:
            raise self.error(f"{key} is {value}, expected at least 1")
        return value

    def number(self, key: str) -> float:
        value = self.take(key, object)
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise self.error(f"{key} is {value!r}, expected a number")
        return float(value)

    def identifier(self, key: str) -> str:
        value: str = self.take(key, str)
        if not _ID.fullmatch(value):
            raise self.error(
                f"{key} is {value!r}, expected lower case letters, digits and . : + _ -"
            )
        self.name = f"{self.name} {value!r}"
        return value

    def strings(self, key: str) -> tuple[str, ...]:
        values = self.take(key, list)
        if not all(isinstance(value, str) for value in values):
            raise self.error(f"{key} is {values!r}, expected a list of strings")
        return tuple(values)

    def integers(self, key: str) -> tuple[int, ...]:
        values = self.take(key, list)
        if not all(isinstance(v, int) and not isinstance(v, bool) and v > 0 for v in values):
            raise self.error(f"{key} is {values!r}, expected a list of positive integers")
        return tuple(values)

    def strings_by_name(self, key: str) -> Mapping[str, str]:
        values = self.take(key, dict, default={})
        if not all(isinstance(value, str) for value in values.values()):
            raise self.error(f"{key} is {values!r}, expected strings")
        return dict(values)

    def tables(self, key: str) -> list[_Table]:
        rows = self.take(key, list, default=[])
        return [_Table(self.path, f"[[{key}]] #{i + 1}", row) for i, row in enumerate(rows)]

    def subtables(self, key: str) -> list[tuple[str, _Table]]:
        rows = self.take(key, dict)
        return [
            (name, _Table(self.path, f"{self.name} {key}.{name}", row))
            for name, row in rows.items()
        ]

    def reference(self, key: str, name: str, known: Mapping[str, T]) -> T:
        if name not in known:
            raise self.error(f"{key} names {name!r}, which is not defined", near_names(name, known))
        return known[name]

    def finish(self) -> None:
        """Raise on keys nobody asked for: a misspelt key must not pass as a default."""
        for key in self.raw:
            raise self.error(f"unknown key {key!r}", hint=near_names(key, self.known))


def _unique(path: Path, kind: str, rows: list[T]) -> dict[str, T]:
    found: dict[str, T] = {}
    for row in rows:
        name: str = getattr(row, "id", None) or row.name  # type: ignore[attr-defined]
        if name in found:
            raise MatrixError(f"{path}: {kind} {name!r} is defined twice", hint="remove one")
        found[name] = row
    return found


def _lookup(known: Mapping[str, T], name: str, kind: str, path: Path) -> T:
    if name not in known:
        raise UnknownCellError(f"{path}: no {kind} {name!r}", hint=near_names(name, known))
    return known[name]
