"""The table of ``docs/pairs.md``: what every back-end and engine made of every replica."""

from __future__ import annotations

from collections.abc import Sequence

from packaging.version import Version

from dflash_plugin.matrix import Cell, Matrix

from . import local_runs, replica_specs, replica_traits
from .local_runs import LocalResult
from .records import FAILED, NOT_RUN, PASSED, CellResult

_NAMES = {"reference": "reference", "transformers": "Transformers", "mlx": "MLX"}
_ENGINES = {"vllm": "vLLM", "sglang": "SGLang"}


def lines(matrix: Matrix, results: Sequence[CellResult]) -> list[str]:
    """The section, line by line."""
    specs = replica_specs.load()
    stands: dict[str, list[str]] = {name: [] for name in specs.pairs}
    for row in matrix.pairs.values():
        spec = replica_traits.stand_in(row, specs)
        if spec is not None and row.replica is None:
            stands[spec.id].append(row.id)
    local = {
        backend: {result.replica: result for result in local_runs.saved(backend)}
        for backend in local_runs.BACKENDS
    }
    notes: dict[str, str] = {}
    table = []
    for name in local_runs.all_pairs():
        cells = [_local(local[backend].get(name), notes) for backend in local_runs.BACKENDS]
        cells += [_engine(engine, name, matrix, results, notes) for engine in _ENGINES]
        pairs, kept = "itself, whole", "–"
        if name != local_runs.DEMO:
            pairs = ", ".join(f"`{pair}`" for pair in stands[name]) or "–"
            kept = ", ".join(replica_traits.of_replica(specs.pair(name)))
        table.append(f"| `{name}` | {pairs} | {kept} | " + " | ".join(cells) + " |")
    titles = [*_NAMES.values(), *(f"{name}, newest" for name in _ENGINES.values())]
    return [
        "## Verdicts of the replicas",
        "",
        "A pair's replica is of its family and keeps every trait it is known to have; pairs whose",
        "traits coincide share one. The demo pair is run itself. “passed” is lossless, faithful",
        "block by block, and, on the first three, taps equal to Transformers' hidden states; the",
        "number is the acceptance length. `python -m ci local --save` makes the first three",
        "columns (`docs/results/local/`), the newest release with a CPU build and the plugin the",
        "others.",
        "",
        f"| replica | stands for | traits | {' | '.join(titles)} |",
        "|---|---|---|" + "---|" * len(titles),
        *table,
        "",
        *(f"- [{key}] {reason}" for reason, key in notes.items()),
        *([""] if notes else []),
    ]


def _local(result: LocalResult | None, notes: dict[str, str]) -> str:
    if result is None:
        return _outcome(NOT_RUN, "no recorded run", None, notes)
    return _outcome(result.status, result.reason, result.al, notes)


def _engine(
    engine: str, name: str, matrix: Matrix, results: Sequence[CellResult], notes: dict[str, str]
) -> str:
    cells: dict[str, Cell] = {
        cell.id: cell
        for cell in matrix.cells
        if (cell.engine.name, cell.platform) == (engine, "cpu")
        and name in (cell.pair.replica, cell.pair.id)
        and cell.variant.plugin
    }
    found = [result for result in results if result.id in cells]
    if not found:
        return _outcome(NOT_RUN, "no cell", None, notes)
    newest = max(found, key=lambda result: Version(cells[result.id].engine.version))
    status, reason = newest.status, newest.reason
    # Speed is not asked of a replica: without it the cell as a whole is "not run".
    if {newest.lossless.status, newest.faithful.status} == {PASSED}:
        status, reason = PASSED, ""
    return _outcome(status, reason, newest.al, notes)


def _outcome(status: str, reason: str, al: float | None, notes: dict[str, str]) -> str:
    words = status.replace("_", " ")
    if status == PASSED:
        return words if al is None else f"{words}, {al:.2f}"
    if status in (NOT_RUN, FAILED) and reason:
        return f"{words} [{notes.setdefault(reason, str(len(notes) + 1))}]"
    return words
