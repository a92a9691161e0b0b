"""``python -m ci patches``: every patch set held against the real sources of its release."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dflash_plugin import patchset, shims, support
from dflash_plugin.errors import DFlashError, UsageError, VerdictFailedError
from dflash_plugin.patchset import PatchSet

from . import drift, engine_sources, patch_files
from .engine_sources import Tree, trees
from .records import FAILED, NOT_RUN, PASSED

CHECKS = ("written", "applies", "compiles", "imports", "reverts")
_WORKER = Path(__file__).parent / "workers" / "import_patched.py"
_CHECKOUT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Row:
    """What came of one set on one tree: a status per check, and what was wrong."""

    set: str
    tree: str
    patches: int
    checks: Mapping[str, str]
    notes: tuple[str, ...]

    @property
    def failed(self) -> bool:
        """Whether any check failed."""
        return FAILED in self.checks.values()


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``python -m ci patches``."""
    parser.add_argument("--engine", choices=patch_files.ENGINES, help="of this engine only")
    parser.add_argument("--version", help="of this release only")
    parser.add_argument("--variant", help="of this variant only")
    parser.add_argument(
        "--write", action="store_true", help="write the patch files anew from the sources"
    )
    parser.add_argument(
        "--no-import", action="store_true", help="do not import patched modules (seconds)"
    )
    parser.add_argument(
        "--drift", action="store_true", help="how the patches fare on newer releases"
    )
    parser.add_argument("--to", metavar="VERSION", help="with --drift: on this release")
    parser.add_argument(
        "--fetch", action="store_true", help="first get the sources that cannot be built here"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document")


def run(args: argparse.Namespace) -> int:
    """``python -m ci patches …``; returns the exit code."""
    hint = "python -m ci patches --drift --engine ENGINE --to VERSION"
    if args.to and not args.drift:
        raise UsageError("--to is for --drift", hint=hint)
    if args.to and not args.engine:
        raise UsageError(f"--to {args.to}: a release of which engine?", hint=hint)
    chosen = [
        one
        for one in patchset.available(patch_files.ROOT)
        if all(asked in (None, found) for asked, found in zip(
            (args.engine, args.version, args.variant), one, strict=True))
    ]  # fmt: skip
    if args.fetch:
        for engine in _engines(args):
            engine_sources.fetch(engine, args.to)
    if args.write:
        return _write(args)
    if not chosen:
        raise UsageError("no such patch set", hint="dflash-plugin patch list shows them")
    if args.drift:
        return drift.run(chosen, to=args.to, as_json=args.json)
    rows = [row for one in chosen for row in check_all(*one, imports=not args.no_import)]
    if args.json:
        print(json.dumps([asdict(row) for row in rows], indent=1))
    else:
        print(*_table(rows), sep="\n")
    wrong = [row for row in rows if row.failed]
    if wrong:
        raise VerdictFailedError(
            f"{len(wrong)} of {len(rows)} failed", hint="the notes above name file and hunk"
        )
    if not any(PASSED in row.checks.values() for row in rows):
        raise UsageError(
            "no sources of these releases are at hand, so nothing was checked",
            hint="python -m ci env ENGINE_ID builds a release, --fetch gets what cannot be built",
        )
    return 0


def check_all(engine: str, version: str, variant: str, *, imports: bool) -> list[Row]:
    """One set on every tree of its release that is at hand."""
    found = trees(engine, version)
    if not found:
        why = f"no sources of {engine} {version} at hand"
        name = f"{engine}/{version}/{variant}"
        return [Row(name, "", 0, dict.fromkeys(CHECKS, NOT_RUN), (why,))]
    return [check(tree, variant, imports=imports) for tree in found]


def check(tree: Tree, variant: str, *, imports: bool, root: Path | None = None) -> Row:
    """One set on one tree; nothing in the tree is changed."""
    root = root or patch_files.ROOT
    done: dict[str, str] = dict.fromkeys(CHECKS, NOT_RUN)
    notes: list[str] = []
    name = f"{tree.engine}/{tree.version}/{variant}"
    try:
        one = patchset.load(root, tree.engine, tree.version, variant)
        old = {path: (tree.site / path).read_bytes().decode() for path in one.paths}
        new = patched_texts(one, old)
    except (DFlashError, OSError) as err:
        return Row(name, tree.id, 0, done | {"applies": FAILED}, (str(err),))
    done["applies"] = PASSED

    def settle(check: str, wrong: Sequence[str]) -> None:
        done[check] = FAILED if wrong else PASSED
        notes.extend(wrong)

    repairs = patch_files.read(tree.engine, root).of(tree.version, variant)
    rendered = patch_files.render(tree, repairs)
    folder = root / tree.engine / tree.version / variant
    stale = [n for n, text in rendered.items() if (folder / n).read_text("utf-8") != text]
    settle("written", [f"{n} is stale: python -m ci patches --write" for n in stale])
    settle("compiles", _compiles(new))
    settle("reverts", _reverts(one, old, new))
    if imports and tree.python is not None:
        wrong, not_here = _imports(tree, one, new)
        settle("imports", wrong)
        notes += [f"not imported: {what}" for what in not_here]
    return Row(name, tree.id, len(one.patches), done, tuple(notes))


def patched_texts(one: PatchSet, texts: Mapping[str, str]) -> dict[str, str]:
    """A set's files after all its patches.

    Raises:
        PatchConflictError: one does not apply.
    """
    new: dict[str, str | None] = dict(texts)
    for patch in one.patches:
        for file in patch.files:
            new[file.path] = patchset.apply_text(file, new[file.path])
    return {path: text for path, text in new.items() if text is not None}


def _compiles(texts: Mapping[str, str]) -> list[str]:
    found = []
    for path, text in texts.items():
        try:
            compile(text, path, "exec", dont_inherit=True)
        except SyntaxError as err:
            found.append(f"{path}: {err}")
    return found


def _reverts(one: PatchSet, old: Mapping[str, str], new: Mapping[str, str]) -> list[str]:
    texts: dict[str, str | None] = dict(new)
    try:
        for patch in reversed(one.patches):
            for file in reversed(patch.files):
                texts[file.path] = patchset.apply_text(patchset.reverse(file), texts[file.path])
    except DFlashError as err:
        return [str(err)]
    found = [f"{path}: other bytes after reverting" for path in old if texts[path] != old[path]]
    return found or [
        f"{path}: other bytes when applied again"
        for path, text in patched_texts(one, old).items()
        if text != new[path]
    ]


def _imports(tree: Tree, one: PatchSet, new: Mapping[str, str]) -> tuple[list[str], list[str]]:
    """(what went wrong, what cannot be imported here with or without the patches)."""
    modules = [path.removesuffix(".py").replace("/", ".") for path in new]
    with tempfile.TemporaryDirectory(prefix="dflash-patches-") as folder:
        files = {}
        for module, text in zip(modules, new.values(), strict=True):
            path = Path(folder) / f"{module}.py"
            path.write_text(text, encoding="utf-8")
            files[module] = str(path)
        told = _work(tree, {"files": files, "modules": modules, "shims": one.replaces_shims})
    errors: dict[str, str] = told["errors"]
    not_here = []
    if errors:
        plain = _work(tree, {"files": {}, "modules": list(errors), "shims": []})["errors"]
        not_here = [f"{module}: {plain[module]}" for module in errors if module in plain]
        errors = {module: text for module, text in errors.items() if module not in plain}
    wrong = [f"{module}: {text}" for module, text in errors.items()]
    without = {line.partition(":")[0] for line in (*not_here, *wrong)}
    needed = support.decide(tree.engine, tree.version, "cpu").shims
    wrong += [
        f"{name}: imported, and not in place"
        for name in one.replaces_shims
        if name in needed and name not in told["applied"]
        and shims.load(name).module not in without
    ]  # fmt: skip
    return wrong, not_here


def _work(tree: Tree, asked: Mapping[str, object]) -> dict[str, dict[str, str]]:
    engines_own = ("VLLM_", "SGLANG_")
    clean = {name: value for name, value in os.environ.items() if not name.startswith(engines_own)}
    # "none": SGLang takes an empty list for all.
    no_plugins = {"VLLM_PLUGINS": "", "SGLANG_PLUGINS": "none"}
    done = subprocess.run(
        [str(tree.python), str(_WORKER)],
        input=json.dumps(asked),
        env={**clean, "PYTHONPATH": str(_CHECKOUT), **no_plugins},
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        answer: dict[str, dict[str, str]] = json.loads(done.stdout.splitlines()[-1])
    except (ValueError, IndexError):
        last = " ".join(done.stderr.strip().splitlines()[-1:])
        return {"errors": {str(tree.python): f"exit code {done.returncode}: {last}"}, "applied": {}}
    return answer


def _write(args: argparse.Namespace) -> int:
    for engine in _engines(args):
        for version, variant, wanted in patch_files.read(engine).sets():
            if args.version not in (None, version) or args.variant not in (None, variant):
                continue
            name, here = f"{engine}/{version}/{variant}", trees(engine, version)
            if not here:
                print(f"{name}: not written: no sources at hand (--fetch)")
                continue
            changed = patch_files.write(here[0], variant, wanted, patch_files.ROOT)
            print(f"{name}: {'written' if changed else 'unchanged'}, from {here[0].id}")
    return 0


def _engines(args: argparse.Namespace) -> tuple[str, ...]:
    return (args.engine,) if args.engine else patch_files.ENGINES


def _table(rows: Sequence[Row]) -> list[str]:
    lines = [f"{'set':20} {'sources':18} {'patches':>7}  " + "  ".join(f"{c:8}" for c in CHECKS)]
    for row in rows:
        told = "  ".join(f"{row.checks[check]:8}" for check in CHECKS)
        lines.append(f"{row.set:20} {row.tree or '-':18} {row.patches:7}  {told}".rstrip())
        lines += [f"    {note}" for note in row.notes]
    return lines
