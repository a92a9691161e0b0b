"""Pages made from data: the README's table by release, and what the plugin changes in vLLM."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from packaging.version import Version

from dflash_plugin import shims, support
from dflash_plugin.matrix import Cell, Matrix, Variant
from dflash_plugin.shims import Shim

from .records import FAILED, NOT_RUN, PASSED, CellResult

_VARIANTS: tuple[Callable[[Variant], bool], ...] = (
    lambda variant: not variant.plugin and variant.patches is None,
    lambda variant: variant.plugin,
    lambda variant: variant.patches is not None,
)
"""The table's columns: stock, with the plugin, patched."""


def by_release(results: Sequence[CellResult], matrix: Matrix) -> list[str]:
    """A Markdown table: per release and platform what is decided and what came out of it."""
    found = {result.id: result for result in results}
    groups: dict[tuple[str, str, str], list[tuple[Cell, CellResult]]] = {}
    for cell in matrix.cells:
        key = (cell.engine.name, cell.engine.version, cell.platform)
        groups.setdefault(key, []).append((cell, found[cell.id]))
    lines = [
        "| release | platform | dflash-plugin | stock, pairs | with the plugin, pairs "
        "| patched, pairs | speed-up at batch 1 |",
        "|---|---|---|---|---|---|---|",
    ]
    for (name, version, platform), rows in sorted(groups.items(), key=_age):
        level = support.decide(name, version, platform).level.value
        columns = [
            outcome([result for cell, result in rows if belongs(cell.variant)])
            for belongs in _VARIANTS
        ]
        lines.append(
            f"| {name} {version} | {platform} | {level} | {' | '.join(columns)} "
            f"| {_speedup([result for cell, result in rows if cell.variant.plugin])} |"
        )
    return lines


def _age(group: tuple[tuple[str, str, str], object]) -> tuple[str, Version, str]:
    name, version, platform = group[0]
    return name, Version(version), platform


def outcome(results: Sequence[CellResult]) -> str:
    """How many pairs passed both tests of correctness, and what the others did."""
    if not results:
        return "–"
    good, counts = 0, dict.fromkeys(_WORDS, 0)
    for result in results:
        kind = _kind(result)
        if kind is None:
            good += 1
        else:
            counts[kind] += 1
    if counts[NOT_RUN] == len(results):
        return _WORDS[NOT_RUN]
    others = [f"{count} {_WORDS[kind]}" for kind, count in counts.items() if count]
    return ", ".join([f"{good} of {len(results)} lossless and faithful", *others])


_WORDS = {
    "serves": "not served",
    "lossless": "not lossless",
    "faithful": "not faithful",
    "other": "not judged",
    NOT_RUN: "not run",
}


def _kind(result: CellResult) -> str | None:
    """What kept a cell from being lossless and faithful; None: nothing did."""
    if result.status == NOT_RUN and not result.settings:
        return NOT_RUN
    for name in ("serves", "lossless", "faithful"):
        if getattr(result, name).status == FAILED:
            return name
    both = result.lossless.status, result.faithful.status
    return None if both == (PASSED, PASSED) else "other"


def _speedup(results: Sequence[CellResult]) -> str:
    cells = [
        f"{result.id.rsplit('/', 1)[-1]} {result.speedup:.2f}x"
        for result in results
        if result.speedup is not None
    ]
    return ", ".join(cells) or "–"


def differences(shim_of: Callable[[str], Shim] = shims.load) -> list[str]:
    """``docs/vllm-repairs.md``: every upstream difference that a shim bridges."""
    lines = [
        "# What the plugin changes in vLLM, release by release",
        "",
        "Written by `python -m ci report --readme` from `dflash_plugin/support.py` and the shims",
        "themselves. A shim is applied only to the very sources it was written against",
        "(`dflash-plugin doctor` says whether it meets them); otherwise the engine runs as",
        "published, and its log says so.",
        "",
    ]
    rows: dict[str, list[support.Difference]] = {}
    for row in support.differences("vllm"):
        rows.setdefault(row.shim, []).append(row)
    for name, where in rows.items():
        shim = shim_of(name)
        ranges = dict.fromkeys(
            (r.first if r.first == r.last else f"{r.first} to {r.last}") for r in where
        )
        platforms = dict.fromkeys(r.platform or "every platform" for r in where)
        lines += [
            f"## {name}",
            "",
            f"vLLM {', '.join(ranges)}; {', '.join(platforms)}; changes `{shim.module}`.",
            "",
            f"- Without it: {shim.symptom}.",
            f"- What it does: {shim.mechanism}.",
            f"- It goes {shim.removal}.",
            "",
        ]
    return lines
