"""Which cells a command runs, and with what settings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

from dflash_plugin.errors import UnknownCellError, UsageError
from dflash_plugin.matrix import Cell, Matrix, Profile

from . import prompts
from .environment import Wanted
from .prompts import Prompt


@dataclass(frozen=True)
class Overrides:
    """What a person may change on the command line; None: as the matrix says.

    ``reference_draft``: the draft the reference replays with, to hold an engine that
    serves a doubtful ``draft`` against one known to be good. ``containers``: run the engines
    in their images.
    """

    target: Path | None = None
    draft: Path | None = None
    reference_draft: Path | None = None
    num_speculative_tokens: int | None = None
    env_python: tuple[tuple[str, Path], ...] = ()
    containers: Wanted | None = None
    port: int = 0
    ready_timeout: float = 600.0
    compiled: bool = False


@dataclass(frozen=True)
class PromptSet:
    """Prompts, and the name results know them by: where from, and a hash."""

    name: str
    prompts: tuple[Prompt, ...]

    @classmethod
    def of(cls, label: str, rows: Sequence[Prompt]) -> PromptSet:
        """Name ``rows`` after ``label`` and their content."""
        return cls(f"{label}@{prompts.digest(rows)}", tuple(rows))


@dataclass(frozen=True)
class Shard:
    """The ``index``-th of ``count`` parts of a run, from 1: one machine's share."""

    index: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Shard:
        """From ``i/n``; ``ValueError`` unless 1 <= i <= n."""
        index, count = map(int, text.split("/"))
        if not 1 <= index <= count:
            raise ValueError(text)
        return cls(index, count)

    def of(self, cells: Sequence[Cell]) -> list[Cell]:
        """Its share. A release's cells stay together: they share environment and baseline.

        Raises:
            UsageError: there are fewer releases than shards, so this one has nothing.
        """
        releases = list(jobs(cells))
        mine = releases[self.index - 1 :: self.count]
        if not mine:
            raise UsageError(
                f"shard {self.index}/{self.count} has no cells: "
                f"the chosen ones are of {len(releases)} release(s)",
                hint=f"--shard i/n with n at most {len(releases)}",
            )
        return [cell for cell in cells if (cell.engine.id, cell.platform) in mine]


def jobs(cells: Sequence[Cell]) -> dict[tuple[str, str], list[Cell]]:
    """The cells by release and platform, in order: what one machine can run in one go."""
    found: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        found.setdefault((cell.engine.id, cell.platform), []).append(cell)
    return found


@dataclass(frozen=True)
class Plan:
    """Cells in matrix order, and what is done in each.

    ``replica_prompts``: of the cells whose pair is a replica; the others have ``prompts``.
    """

    cells: tuple[Cell, ...]
    profile: Profile
    prompts: PromptSet
    replica_prompts: PromptSet
    overrides: Overrides = Overrides()

    def prompts_of(self, cell: Cell) -> PromptSet:
        """The prompts that a cell is run with."""
        return self.replica_prompts if cell.pair.replica else self.prompts

    def to_json(self) -> dict[str, Any]:
        """For `python -m ci plan --json` and workflows."""
        return {
            "cells": [cell.id for cell in self.cells],
            "jobs": [
                {
                    "engine": engine,
                    "platform": platform,
                    "distribution": cells[0].build.distribution,
                    "version": cells[0].engine.version,
                    "cells": [cell.id for cell in cells],
                }
                for (engine, platform), cells in jobs(self.cells).items()
            ],
            "profile": asdict(self.profile),
            "prompts": {"set": self.prompts.name, "count": len(self.prompts.prompts)},
        }


def make(
    matrix: Matrix,
    cells: Sequence[str],
    profile: str,
    prompt_files: Sequence[str] = (),
    overrides: Overrides | None = None,
    *,
    shard: Shard | None = None,
) -> Plan:
    """Resolve names; ids and globs of cells, none meaning all.

    Prompt files are for every cell; without them replicas have prompts of their own.

    Raises:
        UnknownCellError: a name or glob that matches nothing.
        UsageError: a prompt file that cannot be read, or a shard without cells.
    """
    chosen = []
    for name in cells:
        if any(c in name for c in "*?["):
            matching = [cell for cell in matrix.cells if fnmatchcase(cell.id, name)]
            if not matching:
                raise UnknownCellError(
                    f"{matrix.path}: no cell matches {name!r}", hint="python -m ci plan lists them"
                )
            chosen += matching
        else:
            chosen.append(matrix.cell(name))
    selected = list({cell.id: cell for cell in (chosen if cells else matrix.cells)}.values())
    if shard is not None:
        selected = shard.of(selected)
    label = "+".join(Path(f).name for f in prompt_files) if prompt_files else "packaged"
    chosen_prompts = PromptSet.of(label, prompts.load(prompt_files))
    own = chosen_prompts if prompt_files else PromptSet.of("replica", prompts.of_replicas())
    return Plan(
        cells=tuple(selected),
        profile=matrix.profile(profile),
        prompts=chosen_prompts,
        replica_prompts=own,
        overrides=overrides or Overrides(),
    )
