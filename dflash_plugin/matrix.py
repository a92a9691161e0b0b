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
from typing import Any, TypeVar

from . import architectures
from .errors import MatrixError, UnknownCellError, near_names
from .matrix_rows import (
    ANNOUNCED,
    DEMO,
    DFLASH2,
    PUBLISHED,
    REPLICA,
    SERVES,
    STATUSES,
    VERDICTS,
    Build,
    Cell,
    Engine,
    Expected,
    Known,
    Pair,
    Profile,
    Published,
    Variant,
)
from .toml_table import Table, read_toml, unique

__all__ = ["DFLASH2", "PUBLISHED", "REPLICA", "SERVES", "STATUSES", "VERDICTS", "Build", "Cell",
           "Engine", "Expected", "Known", "Matrix", "Pair", "Profile", "Published", "Variant",
           "default_path", "load"]  # fmt: skip
T = TypeVar("T")


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

    def published_for(self, pair: Pair) -> tuple[Published, ...]:
        """What is published of a pair, as far as it may be of this generation of its draft."""
        return tuple(
            row
            for row in self.published
            if (row.target, row.draft) == (pair.target, pair.draft)
            and row.revision in ("", pair.generation)
        )

    def pair_for(self, target: str) -> Pair | None:
        """The pair whose id or target repository is ``target``, if there is one.

        Of several generations of a draft, the one listed first.
        """
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
            torchvision=sub.take("torchvision", str, default=None),
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
        patches=table.take("patches", str, default=None),
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
    published = replica is None
    embedded = table.take("embedded", bool, default=False) if published else False
    status = REPLICA if replica else DEMO if embedded else table.take("status", str, PUBLISHED)
    table.reference("status", status, dict.fromkeys(STATUSES))
    announced = status == ANNOUNCED
    if published:
        target = table.take("target", str)
        draft = table.take("draft", str, **({"default": ""} if announced else {}))
    else:
        target, draft = f"replica:{replica}/target", f"replica:{replica}/draft"
    shapes = {}
    for part, known in _shapes().items():
        key = f"{part}_architecture"
        shape = table.take(key, str, default=None)
        shapes[f"{part}_shape"] = table.reference(key, shape, known) if shape else None
    pair = Pair(
        id=name,
        target=target,
        target_revision=table.take("target_revision", str, default=None) if published else None,
        draft=draft,
        draft_revision=table.take("draft_revision", str, default=None) if published else None,
        embedded=embedded,
        num_speculative_tokens=0 if announced else table.count("num_speculative_tokens"),
        notes=table.take("notes", str, default=""),
        expected=tuple(expected),
        replica=replica,
        status=status,
        generation=table.take("generation", str, default=""),
        **shapes,
        args=_args(table),
    )
    if pair.draft_shape is not None and pair.num_speculative_tokens >= (
        pair.draft_shape.block_size or pair.num_speculative_tokens + 1
    ):
        raise table.error(
            f"num_speculative_tokens is {pair.num_speculative_tokens}, but the draft's block is "
            f"{pair.draft_shape.block_size}, so that at most one less can be drafted"
        )
    table.finish()
    return pair


def _args(table: Table) -> dict[str, tuple[str, ...]]:
    if "args" not in table.raw:
        return {}
    inner = table.table("args")
    args = {engine: inner.strings(engine) for engine in list(inner.raw)}
    for engine in args:
        inner.reference("args", engine, dict.fromkeys(("vllm", "sglang")))
    return args


def _shapes() -> dict[str, Mapping[str, Any]]:
    known = architectures.load()
    return {"target": known.targets, "draft": known.drafts}


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
