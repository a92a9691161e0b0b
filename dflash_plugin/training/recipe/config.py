"""What a training run is: a TOML file, read strictly into frozen dataclasses.

Paths in it are relative to the working directory. ``examples/`` has commented ones.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import MISSING, Field, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from ...errors import MatrixError, UsageError
from ...toml_table import Table, read_toml

T = TypeVar("T")
STAGES = ("prompts", "regenerate", "features", "fit", "evaluate", "export")


def _operational(default: Any) -> Any:
    """A field that changes how a stage runs, not what it makes."""
    return field(default=default, metadata={"operational": True})


@dataclass(frozen=True)
class Target:
    """The frozen model. ``model``: ``demo``, a hub id or a folder."""

    model: str
    revision: str = ""
    dtype: str = "bfloat16"
    device: str = _operational("")


@dataclass(frozen=True)
class Draft:
    """The draft's shape; what is not said here is as in the target.

    Attributes:
        taps: target layers whose outputs condition it; empty: spread over the depth.
        sliding_window: of all layers but those in ``full_layers``; 0: all attend to everything.
        init: ``target`` (its last layers), ``random``, or a draft's folder or hub id.
        config: further fields of ``config.json``, as published.
    """

    layers: int
    block_size: int
    mask_token_id: int
    taps: tuple[int, ...] = ()
    sliding_window: int = 0
    full_layers: tuple[int, ...] = ()
    init: str = "target"
    config: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Source:
    """Where prompts come from.

    Attributes:
        kind: ``templates`` (our own, by ``name``), ``jsonl`` (``path``), ``hub`` (``dataset``),
            ``python`` (functions of Python's library, to be completed) or ``target`` (messages
            that the target makes up, on the server of ``regenerate``).
        name: groups results; for templates it says which.
        prompt: field of a record: a text, or a list of messages.
        count: at most so many; 0: all, of files and data sets.
        vary: of files and data sets, so many more of each record with other numbers and names
            in the last message.
    """

    kind: str
    name: str
    count: int = 0
    path: str = ""
    dataset: str = ""
    subset: str = ""
    split: str = "train"
    prompt: str = "prompt"
    vary: int = 0


@dataclass(frozen=True)
class Prompts:
    """``exclude``: JSONL files (any text field) and ``.sha256`` lists of what is never trained on.

    ``heldout``: share of prompts kept for the learning curve and the evaluation.
    """

    exclude: tuple[str, ...] = ()
    heldout: float = 0.03
    source: tuple[Source, ...] = ()


@dataclass(frozen=True)
class Regenerate:
    """The target's own answers.

    Attributes:
        how: ``transformers`` here, or a running ``server`` (vLLM, SGLang) at ``url``.
        batch: answers at a time (transformers), or requests in flight (server).
        reuse: JSONL files of earlier answers: ``kind``, ``prompt`` and ``answer`` (token ids).
        template: arguments of the chat template, such as ``enable_thinking``.
    """

    how: str = "transformers"
    url: str = _operational("http://127.0.0.1:8000")
    model: str = _operational("")
    batch: int = _operational(32)
    max_tokens: int = 256
    temperature: float = 0.0
    reuse: tuple[str, ...] = ()
    template: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Features:
    """Tapped hidden states.

    Attributes:
        how: ``stored`` once in shards, or computed ``on-the-fly`` at every step.
        shard: texts per file.
        max_length: longer texts are cut, in tokens.
        teacher: keep what the target's head is applied to as well, for distillation.
    """

    how: str = "stored"
    shard: int = 256
    batch: int = _operational(8)
    max_length: int = 1024
    teacher: bool = False


@dataclass(frozen=True)
class Fit:
    """The loop.

    Attributes:
        batch: texts per step and process; ``anchors``: blocks per text.
        optimizer: ``adamw``, or ``muon`` for the matrices.
        decay: the loss of a block's i-th drafted token weighs exp(-i / decay).
        head_rows: rows of the head in the loss: the commonest tokens of the answers, beside
            the labels and ``negatives`` random ones; 0: the whole vocabulary.
        distill: weight of the target's own distribution against its token; 0: none.
        ema: of the exported weights, per step; 0: none.
        evaluate_every, checkpoint_every: in steps.
        evaluate_texts: held-out texts of the learning curve.
    """

    epochs: float = 5.0
    batch: int = 12
    anchors: int = 24
    optimizer: str = "adamw"
    learning_rate: float = 1e-3
    warmup: int = 50
    floor: float = 0.02
    weight_decay: float = 0.01
    clip: float = 1.0
    decay: float = 4.0
    head_rows: int = 4096
    negatives: int = 1024
    distill: float = 0.0
    ema: float = 0.998
    precision: str = "bfloat16"
    gradient_checkpointing: bool = False
    checkpoint_every: int = _operational(200)
    evaluate_every: int = _operational(200)
    evaluate_texts: int = _operational(24)


@dataclass(frozen=True)
class Evaluate:
    """Acceptance lengths.

    Attributes:
        texts: held-out answers per kind, replayed by the reference.
        tokens: generated per prompt of ``source``, whose prompts may be test prompts.
        k: drafted tokens; 0: the whole block.
        url, model: a server of the pair; its own counters are read.
    """

    texts: int = 8
    tokens: int = 128
    k: int = 0
    url: str = ""
    model: str = ""
    source: tuple[Source, ...] = ()


@dataclass(frozen=True)
class Export:
    """The model card's facts."""

    base_model: str = ""
    licence: str = ""
    notes: str = ""


@dataclass(frozen=True)
class Shares:
    """How stages share a time budget."""

    regenerate: float = 0.4
    features: float = 0.1
    fit: float = 0.4
    evaluate: float = 0.1


@dataclass(frozen=True)
class Config:
    """One run; ``path`` is the file it came from, ``out`` the folder of all it makes."""

    path: Path
    name: str
    out: Path
    seed: int
    target: Target
    draft: Draft
    prompts: Prompts
    regenerate: Regenerate
    features: Features
    fit: Fit
    evaluate: Evaluate
    export: Export
    budget: Shares

    def key(self, *names: str) -> str:
        """A short hash of the named tables' settings that change what is made."""
        told: dict[str, Any] = {"seed": self.seed}
        for name in names:
            told[name] = _essential(getattr(self, name))
        return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:12]


def load(path: Path, out: Path | None = None) -> Config:
    """Read a run's file; ``out`` replaces its output folder.

    Raises:
        UsageError: names file, table and key: unknown, missing, of another type, impossible.
    """
    from .checks import problems

    try:
        top = Table(path, "the file", read_toml(path))
        told = {
            name: _read(kind, _optional(top, name, required=name in ("target", "draft")))
            for name, kind in _TABLES.items()
        }
        config = Config(
            path=path,
            name=top.take("name", str),
            out=out or Path(top.take("out", str)),
            seed=top.take("seed", int, default=0),
            **told,
        )
        top.take("out", str, default="")
        top.finish()
        for table, message in problems(config):
            raise top.error(f"{table}: {message}", hint="correct the value")
    except MatrixError as err:
        raise UsageError(err.message, hint=err.hint) from err
    return config


_TABLES: dict[str, type[Any]] = {
    "target": Target,
    "draft": Draft,
    "prompts": Prompts,
    "regenerate": Regenerate,
    "features": Features,
    "fit": Fit,
    "evaluate": Evaluate,
    "export": Export,
    "budget": Shares,
}


def _optional(top: Table, name: str, *, required: bool) -> Table:
    if name not in top.raw and not required:
        top.known.add(name)
        return Table(top.path, name, {})
    return Table(top.path, name, top.take(name, dict))


def _read(kind: type[T], table: Table) -> T:
    """``kind`` (a dataclass) from a table; its fields say types and defaults."""
    values = {one.name: _value(table, one) for one in fields(kind)}  # type: ignore[arg-type]
    table.finish()
    return kind(**values)


def _value(table: Table, one: Field[Any]) -> Any:
    kind = str(one.type)
    if kind == "tuple[Source, ...]":
        return tuple(_read(Source, row) for row in table.tables(one.name))
    if one.name not in table.raw and one.default is not MISSING:
        table.known.add(one.name)
        return one.default
    if one.name not in table.raw and one.default_factory is not MISSING:
        table.known.add(one.name)
        return one.default_factory()
    return _TAKE[kind](table, one.name)


def _indices(table: Table, name: str) -> tuple[int, ...]:
    values = table.take(name, list)
    if not all(type(value) is int and value >= 0 for value in values):
        raise table.error(f"{name} is {values!r}, expected a list of indices from 0")
    return tuple(values)


_TAKE: dict[str, Callable[[Table, str], Any]] = {
    "int": lambda table, name: table.take(name, int),
    "str": lambda table, name: table.take(name, str),
    "bool": lambda table, name: table.take(name, bool),
    "dict[str, Any]": lambda table, name: table.take(name, dict),
    "float": Table.number,
    "tuple[str, ...]": Table.strings,
    "tuple[int, ...]": _indices,
}


def _essential(table: Any) -> dict[str, Any]:
    told = {}
    for one in fields(table):
        if not one.metadata.get("operational"):
            value = getattr(table, one.name)
            if isinstance(value, tuple):
                value = [_essential(row) if isinstance(row, Source) else row for row in value]
            told[one.name] = value
    return told
