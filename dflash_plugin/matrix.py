"""``compat_matrix.toml`` -> frozen dataclasses; anything unknown is an error.

The file is data that people edit: engine releases and how to install them, the
variants, the model pairs, which of them are run together, and how long a run
is. Nothing here is written by a program.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

from .errors import MatrixError, UnknownCellError, near_names
from .toml_table import Table, read_toml, unique

T = TypeVar("T")
VERDICTS = ("lossless", "faithful", "faster")
SERVES = "serves"
"""What comes before the verdicts: the engine starts with the draft and answers."""


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
    """A target and its draft.

    ``embedded`` pairs travel with this package. ``replica`` names a tiny pair that the
    harness builds; ``target`` and ``draft`` are then no repositories.
    """

    id: str
    target: str
    target_revision: str | None
    draft: str
    draft_revision: str | None
    embedded: bool
    num_speculative_tokens: int
    notes: str
    expected: tuple[Expected, ...]
    replica: str | None = None


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
    """How much of a cell is run: counts of prompts, tokens and rounds.

    Zero ``control_prompts``, ``speed_prompts`` or ``speed_rounds``: that stage is not run.
    """

    name: str
    lossless_prompts: int
    control_prompts: int
    speed_prompts: int
    speed_rounds: int
    max_tokens: int
    concurrency: tuple[int, ...]

    @property
    def measures_speed(self) -> bool:
        """Whether there is anything to time."""
        return bool(self.speed_prompts and self.speed_rounds and self.concurrency)


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
class Published:
    """Numbers as a pair's authors state them, and the settings they belong to.

    ``al`` and ``speedup`` (to the same engine without speculation) are by data set.
    ``temperature`` or ``max_tokens`` None: not stated.
    """

    target: str
    draft: str
    revision: str
    engine: str
    hardware: str
    template: str
    temperature: float | None
    num_speculative_tokens: int
    max_tokens: int | None
    concurrency: int
    al: Mapping[str, float]
    speedup: Mapping[str, float]
    source: str
    grade: str


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
    published: tuple[Published, ...] = ()

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
    raw = read_toml(path)
    top = Table(path, "top level", raw)
    if top.take("schema", int) != 1:
        raise MatrixError(f"{path}: schema is {raw['schema']}, expected 1", hint="update this tool")
    engines = unique(path, "engine", [_engine(t) for t in top.tables("engine")])
    variants = unique(path, "variant", [_variant(t) for t in top.tables("variant")])
    pairs = unique(path, "pair", [_pair(t) for t in top.tables("pair")])
    profiles = unique(path, "profile", [_profile(t) for t in top.tables("profile")])
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
    published = tuple(_published(table) for table in top.tables("published"))
    top.finish()
    return Matrix(
        path, engines, variants, pairs, profiles, tuple(cells.values()), known, published
    )  # fmt: skip


def _engine(table: Table) -> Engine:
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


def _variant(table: Table) -> Variant:
    variant = Variant(
        name=table.identifier("name"),
        plugin=table.take("plugin", bool),
        description=table.take("description", str),
    )
    table.finish()
    return variant


def _pair(table: Table) -> Pair:
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
    name, replica = table.identifier("id"), table.take("replica", str, default=None)
    if replica is None:
        target, draft = table.take("target", str), table.take("draft", str)
    else:
        target, draft = f"replica:{replica}/target", f"replica:{replica}/draft"
    published = replica is None
    pair = Pair(
        id=name,
        target=target,
        target_revision=table.take("target_revision", str, default=None) if published else None,
        draft=draft,
        draft_revision=table.take("draft_revision", str, default=None) if published else None,
        embedded=table.take("embedded", bool, default=False) if published else False,
        num_speculative_tokens=table.count("num_speculative_tokens"),
        notes=table.take("notes", str, default=""),
        expected=tuple(expected),
        replica=replica,
    )
    table.finish()
    return pair


def _profile(table: Table) -> Profile:
    profile = Profile(
        name=table.identifier("name"),
        lossless_prompts=table.count("lossless_prompts"),
        control_prompts=table.count("control_prompts", at_least=0),
        speed_prompts=table.count("speed_prompts", at_least=0),
        speed_rounds=table.count("speed_rounds", at_least=0),
        max_tokens=table.count("max_tokens"),
        concurrency=table.integers("concurrency"),
    )
    table.finish()
    return profile


def _cells(
    table: Table,
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


def _known(table: Table, cells: Mapping[str, Cell]) -> Known:
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


def _published(table: Table) -> Published:
    row = Published(
        **{key: table.take(key, str) for key in ("target", "draft", "engine", "hardware")},
        revision=table.take("revision", str, default=""),
        template=table.take("template", str),
        temperature=table.number("temperature") if "temperature" in table.raw else None,
        num_speculative_tokens=table.count("num_speculative_tokens"),
        max_tokens=table.count("max_tokens") if "max_tokens" in table.raw else None,
        concurrency=table.count("concurrency"),
        al=table.numbers_by_name("al"),
        speedup=table.numbers_by_name("speedup"),
        source=table.take("source", str),
        grade=table.take("grade", str),
    )
    if not row.al and not row.speedup:
        raise table.error("neither al nor speedup", hint="state at least one")
    table.finish()
    return row


def _lookup(known: Mapping[str, T], name: str, kind: str, path: Path) -> T:
    if name not in known:
        raise UnknownCellError(f"{path}: no {kind} {name!r}", hint=near_names(name, known))
    return known[name]
