"""The learning curve: a line per step, and a plot of loss and acceptance length."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from ...cache import atomic_write_text, make_dir
from ...errors import from_os_error

LOG = "log.jsonl"
PLOT = "curve.png"


def append(folder: Path, row: dict[str, Any]) -> None:
    """Add a step's row; raises ``CacheError`` on a full disk."""
    make_dir(folder)
    try:
        with (folder / LOG).open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as err:
        raise from_os_error(err, str(folder / LOG)) from err


def read(folder: Path) -> list[dict[str, Any]]:
    """The rows so far; a line that was cut off is left out."""
    path = folder / LOG
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").split("\n"):
        try:
            rows.append(json.loads(line))
        except ValueError:
            continue
    return rows


def rewind(folder: Path, step: int) -> None:
    """Forget what came after ``step``: it is done again."""
    kept = [row for row in read(folder) if row["step"] <= step]
    atomic_write_text(folder / LOG, "".join(json.dumps(row) + "\n" for row in kept))


def plot(folder: Path) -> Path | None:
    """Draw ``curve.png``; None without matplotlib or without rows."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = read(folder)
    if not rows:
        return None
    figure, axis = pyplot.subplots(figsize=(7, 4))
    seen = [row["labels"] / 1e6 for row in rows]
    axis.plot(seen, _smooth([row["loss"] for row in rows]), color="tab:blue", label="loss")
    axis.set_xlabel("labels, millions")
    axis.set_ylabel("training loss (moving mean)", color="tab:blue")
    measured = [(row["labels"] / 1e6, row["al"]) for row in rows if "al" in row]
    if measured:
        other = axis.twinx()
        other.plot(*zip(*measured, strict=True), "o-", color="tab:orange")
        other.set_ylabel("acceptance length, held-out texts", color="tab:orange")
    figure.tight_layout()
    path = folder / PLOT
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _smooth(values: list[float], share: float = 0.05) -> list[float]:
    found, mean = [], values[0]
    for value in values:
        mean += share * (value - mean)
        found.append(mean)
    return found
