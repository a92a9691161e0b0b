"""``python -m ci refresh``: what is new upstream, and the change of the matrix it calls for.

Releases on the package index, revisions on the hub, and how the newest patch set fares on a new
release. What cannot be reached is listed, and the rest is done all the same.
"""

from __future__ import annotations

import argparse
import difflib
import json
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from packaging.version import Version

from dflash_plugin import cache, engines, matrix, patchset
from dflash_plugin.errors import DFlashError, NewsFoundError, SourceUnreachableError
from dflash_plugin.matrix import Matrix

from . import drift, engine_sources, patch_files, proposal, releases, revisions
from .releases import Found
from .revisions import Repository


@dataclass(frozen=True)
class Report:
    """All that a watch found.

    ``repositories``: those with news alone. ``diff``: of the matrix, unified; empty: none.
    ``locks``: the new engines whose lock is then to be written.
    """

    releases: tuple[Found, ...]
    repositories: tuple[Repository, ...]
    drift: tuple[drift.Row, ...]
    unreachable: tuple[str, ...]
    diff: str
    locks: tuple[str, ...]

    @property
    def news(self) -> int:
        """How many findings want a person."""
        drifted = [row for row in self.drift if row.work]
        return len(self.releases) + len(self.repositories) + len(drifted)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``python -m ci refresh``."""
    parser.add_argument("--matrix", type=Path, help="another compat_matrix.toml")
    parser.add_argument("--index-url", metavar="URL", help="a simple index (default: pip's)")
    parser.add_argument("--write", action="store_true", help="apply the proposed diff")
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """``python -m ci refresh``; 0 where nothing is new and all was reached.

    Raises:
        NewsFoundError: something is new, whether or not all was reached.
        SourceUnreachableError: nothing new is known, and not all was reached.
        CacheError: with ``--write``, the matrix cannot be written; it is as it was.
    """
    data = matrix.load(args.matrix)
    old = data.path.read_text("utf-8")
    if args.index_url:  # for pip too, which finds the wheels whose sources are read
        os.environ["PIP_INDEX_URL"] = args.index_url
    report, new = look(data, old)
    if args.write and new != old:
        cache.atomic_write_text(data.path, new)
    print(json.dumps(_document(report), indent=1) if args.json else "\n".join(_lines(report)))
    missed = "not all was reached"
    if report.news or report.diff:
        also = f"; {missed}" if report.unreachable else ""
        hint = "read it, then --write" if report.diff and not args.write else "docs/watch.md"
        raise NewsFoundError(f"upstream has news{also}", hint=hint)
    if report.unreachable:
        raise SourceUnreachableError(missed, hint="it is listed above; try again with a network")
    return 0


def look(data: Matrix, text: str) -> tuple[Report, str]:
    """The report, and the matrix file as it should be."""
    unreachable: list[str] = []
    found = releases.look_up(releases.watched(data), unreachable, _note)
    pins = revisions.pinned(data)
    repositories = revisions.look_up(pins, unreachable, _note)
    rows = [row for name in patch_files.ENGINES for row in _drift(name, found, unreachable)]
    new, locks = proposal.matrix_text(data, text, found, repositories)
    name = data.path.name
    diff = difflib.unified_diff(
        text.splitlines(keepends=True), new.splitlines(keepends=True), f"a/{name}", f"b/{name}"
    )
    news = [one for one in repositories.values() if _is_news(one, pins[one.repo])]
    told = Report(tuple(found), tuple(news), tuple(rows), tuple(unreachable), "".join(diff),
                  tuple(dict.fromkeys(locks)))  # fmt: skip
    return told, new


def _is_news(seen: Repository, pins: set[str]) -> bool:
    return seen.newest not in pins or None in seen.differs.values()


def _drift(engine: str, found: Sequence[Found], unreachable: list[str]) -> list[drift.Row]:
    """An engine's newest patch set on its newest new release.

    Where vLLM's CUDA and CPU wheels are both new, on the sources of the CUDA wheel.
    """
    distributions = engines.DISTRIBUTIONS[engine]
    newer = {one.distribution: one.newest for one in found if one.distribution in distributions}
    sets = [v for name, v, variant in patchset.available(patch_files.ROOT)
            if name == engine and variant == patch_files.ALL]  # fmt: skip
    if not newer or not sets:
        return []
    version, distribution = max(
        ((v, name) for name, v in newer.items()),
        key=lambda item: (Version(item[0]), item[1] == distributions[0]),
    )
    held = max(sets, key=Version)
    if Version(held) >= Version(version):
        return []
    _note(f"patches of {held} on {distribution} {version}")
    try:
        engine_sources.fetch(engine, version, distribution)
    except DFlashError as err:
        unreachable.append(f"sources of {distribution} {version}: {err.message}")
        return []
    sources = engine_sources.trees(engine, version)
    tree = next(t for t in sources if t.distribution == distribution)
    one = patchset.load(patch_files.ROOT, engine, held, patch_files.ALL)
    return drift.report(one.patches, tree, one.id)


def _note(what: str) -> None:
    print(f"looking up {what}", file=sys.stderr, flush=True)


def _document(report: Report) -> Mapping[str, Any]:
    return {"news": report.news, **asdict(report)}


def _lines(report: Report) -> list[str]:
    """For people."""
    lines = [
        f"new: {one.distribution} {', '.join(one.versions)} (known: {one.known}, {one.where})"
        for one in report.releases
    ]
    lines += [
        f"    no row proposed for {one.distribution}: its wheel's torch or Python cannot be told"
        for one in report.releases
        if one.built and not (one.torch and one.requires_python)
    ]
    for seen in report.repositories:
        lines.append(f"revision: {seen.repo} is at {seen.newest}")
        for pin, files in seen.differs.items():
            what = "not there any more" if files is None else ", ".join(files) or "documents only"
            lines.append(f"    since {pin}: {what}")
    if report.drift:
        lines += drift.table(report.drift)
    lines += [f"not reached: {line}" for line in report.unreachable]
    lines += [f"then: python -m ci lock {name}" for name in report.locks]
    if not lines:
        lines = ["nothing new"]
    return [*lines, *report.diff.splitlines()]
