"""The compatibility matrix as a grid: one square a cell, and why it is not a pass."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..matrix import SERVES, VERDICTS, Cell, Matrix

PASSED, FAILED, KNOWN, NOT_RUN = "passed", "failed", "known", "not_run"
SIGNS = {PASSED: "✓", FAILED: "✕", KNOWN: "!", NOT_RUN: "–"}
WORDS = {
    PASSED: "passed",
    FAILED: "failed",
    KNOWN: "known not to pass",
    NOT_RUN: "not run",
}


@dataclass(frozen=True)
class Square:
    """One cell: ``kind`` is a key of :data:`WORDS`; ``lines`` say why, one a line."""

    id: str
    anchor: str
    kind: str
    lines: tuple[str, ...]
    al: float | None
    speedup: float | None

    @property
    def sign(self) -> str:
        """The kind without a colour."""
        return SIGNS[self.kind]

    @property
    def word(self) -> str:
        """The kind in words."""
        return WORDS[self.kind]


@dataclass(frozen=True)
class Grid:
    """Rows of release, variant and platform; columns of pairs; None: no such cell."""

    pairs: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Square | None, ...]], ...]

    @property
    def squares(self) -> list[Square]:
        """Every cell."""
        return [square for _, row in self.rows for square in row if square is not None]


def default_results() -> Path | None:
    """The recorded results of a checkout; None in an installed package."""
    path = Path(__file__).parents[2] / "docs" / "results"
    return path if path.is_dir() else None


def build(matrix: Matrix, results: Path) -> Grid:
    """The grid of every cell of the matrix.

    Args:
        results: folder with ``<engine>-<version>/<variant>.<platform>.<pair>.json``.

    Raises:
        UsageError: a result that cannot be read.
    """
    squares = {cell.id: _square(matrix, cell, results) for cell in matrix.cells}
    pairs = tuple(dict.fromkeys(cell.pair.id for cell in matrix.cells))
    names = dict.fromkeys(cell.id.rpartition("/")[0] for cell in matrix.cells)
    rows = tuple((name, tuple(squares.get(f"{name}/{pair}") for pair in pairs)) for name in names)
    return Grid(pairs, rows)


def _square(matrix: Matrix, cell: Cell, results: Path) -> Square:
    anchor = "cell-" + "".join(c if c.isalnum() else "-" for c in cell.id)
    engine, rest = cell.id.split("/", 1)
    path = results / engine / (rest.replace("/", ".") + ".json")
    if not path.exists():
        return Square(cell.id, anchor, NOT_RUN, (cell.not_run or "no recorded run",), None, None)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
        status, lines = str(data["status"]), _lines(data)
        al, speedup = data.get("al"), data.get("speedup")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        raise UsageError(f"{path}: not a cell result ({err})", hint="run the cell again") from err
    known = matrix.known_failures(cell.id)
    failed = {
        name for name in (SERVES, *VERDICTS) if (data.get(name) or {}).get("status") == FAILED
    }
    lines += [f"{name} is known to fail: {row.reason}; until {row.until}"
              for name, row in known.items()]  # fmt: skip
    correct = all((data.get(name) or {}).get("status") == PASSED for name in VERDICTS[:2])
    if failed:
        kind = KNOWN if failed <= set(known) else FAILED
    elif status == PASSED or correct:
        kind = PASSED
    else:
        kind = FAILED if status in ("failed", "aborted") else NOT_RUN
    return Square(cell.id, anchor, kind, tuple(lines), al, speedup)


def _lines(data: Mapping[str, Any]) -> list[str]:
    """Verdicts with their reasons, then what ran where."""
    lines = []
    for name in (SERVES, *VERDICTS):
        verdict = data.get(name) or {}
        reason = f": {verdict['reason']}" if verdict.get("reason") else ""
        lines.append(f"{name}: {verdict.get('status', 'not_run').replace('_', ' ')}{reason}")
    packages = (data.get("environment") or {}).get("packages") or {}
    if packages:
        lines.append("with " + ", ".join(f"{k} {v}" for k, v in packages.items()))
    return lines
