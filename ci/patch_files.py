"""``patches/<engine>/`` from its ``repairs.toml``, the shims and the engine's sources.

A patch puts one call below the definitions that its shim knows; git writes it, so that it is
what anybody gets who makes the same change by hand.
"""

from __future__ import annotations

import ast
import os
import shutil
import subprocess
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path

from packaging.version import Version

from dflash_plugin import shims, support
from dflash_plugin.errors import UsageError
from dflash_plugin.shims import Shim
from dflash_plugin.toml_table import Table, read_toml

from .engine_sources import Tree

ROOT = Path(__file__).parents[1] / "patches"
ENGINES = ("vllm", "sglang")
VARIANTS = ("core", "swa", "gemma4", "cpu")
ALL = "all"
AUTHOR = "dflash-plugin contributors"
_MAIL = "dflash-plugin@users.noreply.github.com"
_CALL = """

# Repaired by dflash-plugin: {patch}.
from dflash_plugin.shims import patched  # noqa: E402

patched("{shim}")
"""
_FORMAT = (
    *("format-patch", "-1", "--stdout", "--zero-commit", "--full-index"),
    *("--no-renames", "--no-signature", "-N"),
)


@dataclass(frozen=True)
class Repair:
    """What ``repairs.toml`` says of one shim's patch."""

    shim: str
    patch: str
    variant: str
    subject: str
    bug: str
    upstream: str
    measured: str
    after: str | None
    updated: date

    @property
    def file(self) -> str:
        """The patch file's name."""
        return f"{self.patch}.patch"


@dataclass(frozen=True)
class Repairs:
    """The whole of an engine's ``repairs.toml``."""

    engine: str
    releases: tuple[str, ...]
    by_shim: dict[str, Repair]

    def of(self, version: str, variant: str) -> list[Repair]:
        """The repairs of one set, in the order in which the plugin applies them."""
        found = [self.by_shim[name] for name in _needed(self.engine, version)]
        return [repair for repair in found if variant in (ALL, repair.variant)]

    def sets(self) -> Iterator[tuple[str, str, list[Repair]]]:
        """(version, variant, repairs) of every set that has any."""
        for version in self.releases:
            for variant in (*VARIANTS, ALL):
                repairs = self.of(version, variant)
                if repairs:
                    yield version, variant, repairs


def read(engine: str, root: Path | None = None) -> Repairs:
    """``<root>/<engine>/repairs.toml``.

    Raises:
        MatrixError: it breaks its form, has a shim twice, or lacks one that a release needs.
    """
    path = (root or ROOT) / engine / "repairs.toml"
    top = Table(path, "top level", read_toml(path))
    releases, updated = top.strings("releases"), top.take("updated", date)
    found: dict[str, Repair] = {}
    for table in top.tables("repair"):
        name = table.identifier("shim")
        repair = Repair(
            shim=name,
            patch=table.take("patch", str),
            variant=table.take("variant", str),
            subject=table.take("subject", str),
            bug=table.take("bug", str),
            upstream=table.take("upstream", str),
            measured=table.take("measured", str),
            after=table.take("after", str, default=None),
            updated=updated,
        )
        table.reference("variant", repair.variant, dict.fromkeys(VARIANTS))
        table.reference("shim", name, shims.names(engine))
        if name in found:
            raise table.error("this shim has a repair already")
        table.finish()
        found[name] = repair
    top.finish()
    missing = {name for version in releases for name in _needed(engine, version)} - set(found)
    if missing:
        raise top.error(f"no [[repair]] for shim {', '.join(sorted(missing))}")
    return Repairs(engine, releases, found)


def _needed(engine: str, version: str) -> list[str]:
    """The shims of a release, on any platform, in the order in which the plugin applies them."""
    base = Version(version)
    rows = support.differences(engine)
    return list(dict.fromkeys(d.shim for d in rows if Version(d.first) <= base <= Version(d.last)))


def changed(text: str, repair: Repair, shim: Shim) -> str:
    """A module's text with the call put in.

    Raises:
        UsageError: it has not the definition below which the call belongs.
    """
    owned = [symbol.partition(".")[0] for symbol in shim.fingerprints if ":" not in symbol]
    wanted = {repair.after} if repair.after else set(owned)
    ends = {
        name: node.end_lineno or 0
        for node in ast.parse(text).body
        for name in _names(node)
        if name in wanted
    }
    if set(ends) != wanted:
        gone = ", ".join(sorted(wanted - set(ends)))
        raise UsageError(
            f"{shim.module} has no top-level {gone}, below which {repair.file} puts its call",
            hint="correct `after` in repairs.toml",
        )
    lines = text.splitlines(keepends=True)
    at = max(ends.values())
    # Below the calls of patches that were here before: they are applied in order.
    while "".join(lines[at : at + 6]).startswith("\n\n# Repaired by dflash-plugin:"):
        at += 6
    call = _CALL.format(patch=repair.patch, shim=repair.shim)
    return "".join([*lines[:at], call, *lines[at:]])


def message(repair: Repair, shim: Shim) -> str:
    """The commit message: subject, mechanism, DEP-3 fields and our own."""
    upstream = repair.upstream
    fields = {
        "Origin": "vendor, dflash-plugin",
        "Bug": repair.bug,
        "Forwarded": "not-needed" if upstream[0].isdigit() else "no",
        "Applied-Upstream": upstream,
        "Last-Update": repair.updated.isoformat(),
        "Removal-Condition": shim.removal,
        "Effect": f"{shim.symptom}. Measured: {repair.measured}",
        "Replaces-Shim": repair.shim,
    }
    told = [
        textwrap.fill(f"{name}: {text}", 80, subsequent_indent=" ", break_on_hyphens=False)
        for name, text in fields.items()
    ]
    body = textwrap.fill(shim.mechanism[0].upper() + shim.mechanism[1:] + ".", 72)
    return "\n".join([repair.subject, "", body, "", *told]) + "\n"


def render(tree: Tree, repairs: Sequence[Repair]) -> dict[str, str]:
    """The files of one set, series included, by name.

    Raises:
        UsageError: a source is missing, or is not the one that a shim was written against.
    """
    files = {"series": "".join(f"{repair.file}\n" for repair in repairs)}
    with tempfile.TemporaryDirectory(prefix="dflash-patches-") as folder:
        repository = Path(folder)
        _git(repository, "init", "-q")
        loaded = {repair.shim: shims.load(repair.shim) for repair in repairs}
        for shim in loaded.values():
            name = shim.module.replace(".", "/") + ".py"
            if not (tree.site / name).exists():
                raise UsageError(f"{tree.site / name}: no such file", hint="name a complete tree")
            target = repository / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(tree.site / name, target)
        _git(repository, "add", ".")
        _git(repository, "commit", "-q", "-m", "the release")
        for repair in repairs:
            shim = loaded[repair.shim]
            path = repository / (shim.module.replace(".", "/") + ".py")
            path.write_text(changed(path.read_text("utf-8"), repair, shim), "utf-8")
            day = f"{repair.updated.isoformat()}T00:00:00+00:00"
            command = ("commit", "-qa", "--cleanup=verbatim", "-m", message(repair, shim))
            _git(repository, *command, GIT_AUTHOR_DATE=day)
            files[repair.file] = _git(repository, *_FORMAT)
    return files


def write(tree: Tree, variant: str, repairs: Sequence[Repair], root: Path) -> bool:
    """Write one set's files; True if anything changed."""
    folder = root / tree.engine / tree.version / variant
    files = render(tree, repairs)
    old = {path.name: path.read_text("utf-8") for path in folder.glob("*")}
    if old == files:
        return False
    folder.mkdir(parents=True, exist_ok=True)
    for name in old.keys() - files.keys():
        (folder / name).unlink()
    for name, text in files.items():
        (folder / name).write_text(text, "utf-8")
    return True


def _names(node: ast.stmt) -> list[str]:
    if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
        return [node.name]
    if isinstance(node, ast.Assign):
        return [target.id for target in node.targets if isinstance(target, ast.Name)]
    return []


def _git(folder: Path, *args: str, **variables: str) -> str:
    environment = {
        **os.environ,
        # Nobody's own settings, so that the bytes are everybody's.
        **{"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"},
        **{"GIT_AUTHOR_NAME": AUTHOR, "GIT_AUTHOR_EMAIL": _MAIL},
        **{"GIT_COMMITTER_NAME": AUTHOR, "GIT_COMMITTER_EMAIL": _MAIL, "LC_ALL": "C"},
        **variables,
    }
    done = subprocess.run(
        ["git", *args], cwd=folder, env=environment, check=True, capture_output=True, text=True
    )
    return done.stdout
