"""``ci/data/replicas.toml``: what the tiny pairs are made of; unknown keys are errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from dflash_plugin.errors import PairMismatchError, UnknownCellError, near_names
from dflash_plugin.pair import DraftConfig
from dflash_plugin.toml_table import Table, read_toml, unique

from .replica_builder.language import Language

PATH = Path(__file__).parent / "data" / "replicas.toml"


@dataclass(frozen=True)
class LanguageSpec:
    """Arguments of :class:`~ci.replica_builder.language.Language`."""

    seed: int
    words: int
    topics: int

    def language(self) -> Language:
        """The language itself."""
        return Language(self.seed, words=self.words, topics=self.topics)


@dataclass(frozen=True)
class TargetSpec:
    """A target: its ``config.json`` and how long it is trained."""

    id: str
    seed: int
    steps: int
    learning_rate: float
    config: Mapping[str, Any]


@dataclass(frozen=True)
class PairSpec:
    """A draft for a target: its ``config.json`` and how long it is trained."""

    id: str
    target: TargetSpec
    seed: int
    steps: int
    learning_rate: float
    draft: Mapping[str, Any]


@dataclass(frozen=True)
class Specs:
    """The whole file."""

    path: Path
    language: LanguageSpec
    targets: Mapping[str, TargetSpec]
    pairs: Mapping[str, PairSpec]

    def pair(self, name: str) -> PairSpec:
        """The replica of that id; ``UnknownCellError`` with the near names otherwise."""
        if name not in self.pairs:
            raise UnknownCellError(
                f"{self.path}: no replica {name!r}", hint=near_names(name, self.pairs)
            )
        return self.pairs[name]

    def for_target(self, spec: TargetSpec) -> dict[str, Any]:
        """Everything that decides a target, as JSON-ready data."""
        return {"language": asdict(self.language), "target": asdict(spec)}

    def for_pair(self, spec: PairSpec) -> dict[str, Any]:
        """Everything that decides a pair, as JSON-ready data."""
        return {"language": asdict(self.language), "pair": asdict(spec)}


@lru_cache(maxsize=8)
def load(path: Path = PATH) -> Specs:
    """Read and check a file of replicas.

    Raises:
        MatrixError: missing file, bad TOML, unknown or missing key, wrong type, a target
            that is not defined, or a draft config that is not one; names file and field.
    """
    top = Table(path, "top level", read_toml(path))
    table = top.table("language")
    language = LanguageSpec(
        seed=table.take("seed", int), words=table.count("words"), topics=table.count("topics")
    )
    table.finish()
    configs: dict[str, Mapping[str, Any]] = {}
    targets = unique(path, "target", [_target(row, configs) for row in top.tables("target")])
    drafts: dict[str, Mapping[str, Any]] = {}
    pairs = unique(path, "pair", [_pair(row, targets, drafts) for row in top.tables("pair")])
    top.finish()
    return Specs(path, language, targets, pairs)


def _target(table: Table, before: dict[str, Mapping[str, Any]]) -> TargetSpec:
    name = table.identifier("id")
    target = TargetSpec(
        id=name,
        seed=table.take("seed", int),
        steps=table.count("steps"),
        learning_rate=table.number("learning_rate"),
        config=_config(table, name, "config", before),
    )
    table.finish()
    return target


def _config(
    table: Table, name: str, key: str, before: dict[str, Mapping[str, Any]]
) -> Mapping[str, Any]:
    """A row's config: that of the earlier row ``like`` names, with what this one says instead."""
    own: Mapping[str, Any] = table.take(key, dict)
    if "like" in table.raw:
        own = {**table.reference("like", table.take("like", str), before), **own}
    before[name] = own
    return own


def _pair(
    table: Table, targets: Mapping[str, TargetSpec], before: dict[str, Mapping[str, Any]]
) -> PairSpec:
    name = table.identifier("id")
    pair = PairSpec(
        id=name,
        target=table.reference("target", table.take("target", str), targets),
        seed=table.take("seed", int),
        steps=table.count("steps"),
        learning_rate=table.number("learning_rate"),
        draft=_config(table, name, "draft", before),
    )
    table.finish()
    try:
        DraftConfig.from_dict(pair.draft, table.path)
    except PairMismatchError as err:
        raise table.error(f"draft: {err.message}") from err
    return pair
