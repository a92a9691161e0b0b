"""``dflash-plugin patch``: an engine's source changed once, exactly and reversibly."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from . import engines, patchset, support
from .errors import (
    EngineNotFoundError,
    PatchError,
    PatchStateError,
    PatchVersionError,
    UsageError,
)
from .patchset import GitTree, PatchSet, Tree, distinfo

T = TypeVar("T")
_HELP = {
    "list": "the patch sets there are",
    "show": "a patch set: what each patch repairs; or one patch, as it is",
    "status": "what state an engine is in; settles what an interrupted command left",
    "check": "what apply would do; without VARIANT: whether a patched engine is whole",
    "apply": "apply a patch set: every file, or none",
    "revert": "undo the patch set an engine has",
    "export": "write the commits of a git checkout as a patch set",
    "import": "commit a patch set to a git checkout of the engine, one commit a patch",
}


def add_parser(commands: Any) -> None:
    """The `patch` command and its actions."""
    patch = commands.add_parser("patch", help="change an engine's source once, reversibly")
    actions = patch.add_subparsers(dest="action", required=True, metavar="ACTION")
    made = {name: actions.add_parser(name, help=text) for name, text in _HELP.items()}
    for name, parser in made.items():
        if name != "export":
            parser.add_argument(
                "--patches",
                type=Path,
                metavar="DIR",
                help="other patch sets than the packaged ones",
            )
        if name in ("list", "status"):
            parser.add_argument("--json", action="store_true", help="print one JSON document")
        if name in ("status", "check", "apply", "revert"):
            _add_target(parser)
    for name in ("check", "apply", "import"):
        optional = {"nargs": "?"} if name == "check" else {}
        made[name].add_argument("variant", metavar="VARIANT", **optional)
    made["show"].add_argument("set", metavar="ENGINE/VERSION/VARIANT")
    made["show"].add_argument("patch", nargs="?", metavar="PATCH", help="such as fix-it.patch")
    for name in ("check", "apply", "import"):
        made[name].add_argument(
            "--release", metavar="VERSION", help="of the engine; needed for a git checkout"
        )
    for name in ("export", "import"):
        made[name].add_argument("--git", type=Path, required=True, metavar="DIR")
        made[name].add_argument("--engine", choices=list(engines.DISTRIBUTIONS))
    made["export"].add_argument("--base", metavar="REV", help="default: what was imported onto")
    made["export"].add_argument("folder", type=Path, help="such as patches/vllm/0.24.0/swa")


def _add_target(parser: argparse.ArgumentParser) -> None:
    where = parser.add_mutually_exclusive_group()
    where.add_argument(
        "--python", metavar="EXE", help="an engine in this interpreter's environment"
    )
    where.add_argument("--site-packages", type=Path, metavar="DIR", help="an engine in this folder")
    where.add_argument("--wheel-dir", type=Path, metavar="DIR", help="a wheel unpacked there")
    where.add_argument("--git", type=Path, metavar="DIR", help="a git checkout's working tree")
    parser.add_argument(
        "--engine", choices=list(engines.DISTRIBUTIONS), help="default: the one that is there"
    )


def run(args: argparse.Namespace) -> int:
    """Do what was asked; the exit code."""
    return _ACTIONS[args.action](args)


def _list(args: argparse.Namespace) -> int:
    root = _root(args)
    sets = [patchset.load(root, *found) for found in patchset.available(root)]
    if args.json:
        rows = [
            {"id": s.id, "patches": [p.name for p in s.patches], "replaces_shims": s.replaces_shims}
            for s in sets
        ]
        print(json.dumps(rows, indent=1))
        return 0
    for found in sets:
        shims = ", ".join(found.replaces_shims)
        print(f"{found.id:<24} {len(found.patches)} patches{f' for {shims}' if shims else ''}")
    if not sets:
        print("no patch sets", file=sys.stderr)
    return 0


def _show(args: argparse.Namespace) -> int:
    parts = args.set.split("/")
    if len(parts) != 3:
        raise UsageError(f"{args.set!r}: expected ENGINE/VERSION/VARIANT", hint="see `patch list`")
    found = patchset.load(_root(args), *parts)
    if args.patch is None:
        for patch in found.patches:
            print(f"{patch.name}: {patch.subject}")
            for name, value in patch.fields.items():
                print(f"  {name}: {value}")
            print(f"  Files: {', '.join(file.path for file in patch.files)}")
        return 0
    text = next((patch.text for patch in found.patches if patch.name == args.patch), None)
    if text is None:
        names = ", ".join(patch.name for patch in found.patches)
        raise PatchError(f"{found.id} has no {args.patch}", hint=f"it has {names}")
    sys.stdout.write(text)
    return 0


def _status(args: argparse.Namespace) -> int:
    found = patchset.status(_tree(args), _root(args))
    if args.json:
        print(json.dumps(asdict(found), indent=1))
    else:
        if found.settled:
            print(found.settled, file=sys.stderr)
        print(found.line())
        if found.variant is None and found.release:
            print(f"patch sets for {found.release}: {', '.join(found.variants) or 'none'}")
    return PatchStateError.exit_code if found.edited else 0


def _check(args: argparse.Namespace) -> int:
    tree = _tree(args)
    if args.variant is not None:
        found = _set(args, tree)
        contents = patchset.check(tree, found)
        print(f"{found.id} applies: {len(found.patches)} patches, {len(contents)} files")
        return 0
    state = patchset.status(tree, _root(args))
    print(state.line())
    return PatchStateError.exit_code if state.edited or not state.variant else 0


def _apply(args: argparse.Namespace) -> int:
    tree = _tree(args)
    found = _set(args, tree)
    contents = patchset.apply(tree, found)
    print(f"applied {found.id}: {len(found.patches)} patches, {len(contents)} files in {tree.root}")
    return 0


def _revert(args: argparse.Namespace) -> int:
    tree = _tree(args)
    state = patchset.revert(tree)
    print(f"reverted {state.engine}/{state.release}/{state.variant} in {tree.root}")
    return 0


def _export(args: argparse.Namespace) -> int:
    tree = _git_tree(args)
    for name in patchset.export_set(tree, args.folder, args.base):
        print(args.folder / name)
    return 0


def _import(args: argparse.Namespace) -> int:
    tree = _git_tree(args)
    done = patchset.import_set(tree, _set(args, tree))
    print(f"{len(done.commits)} commits on {done.branch}")
    for name in done.rewritten:
        print(f"note: export will write {name} with the same changes in other bytes")
    return 0


def _root(args: argparse.Namespace) -> Path:
    root: Path = args.patches or patchset.patches_dir()
    if not root.is_dir():
        raise PatchError(f"{root}: no such folder of patch sets", hint="reinstall dflash-plugin")
    return root


def _set(args: argparse.Namespace, tree: Tree) -> PatchSet:
    version = tree.version()
    release = args.release or (version and distinfo.release(version))
    if release is None:
        raise UsageError(
            f"{tree.root}: a git checkout does not say its release", hint="name it with --release"
        )
    try:
        return patchset.load(_root(args), tree.engine, release, args.variant)
    except PatchVersionError as err:
        decision = support.decide(tree.engine, release, "cpu")
        if decision.usable:
            raise
        raise PatchVersionError(f"{err.message}: {decision.reason}", hint=err.hint) from err


def _tree(args: argparse.Namespace) -> Tree:
    if args.git:
        return _git_tree(args)
    folder = args.site_packages or args.wheel_dir
    if folder:
        return _first(lambda name: patchset.site_tree(folder, name), args.engine)
    return _first(lambda name: _installed(args.python, name), args.engine)


def _git_tree(args: argparse.Namespace) -> GitTree:
    return _first(lambda name: patchset.git_tree(args.git, name), args.engine)


def _first(find: Callable[[str], T], engine: str | None) -> T:
    """What is found of the engine; None: of any."""
    problems = []
    for name in [engine] if engine else engines.DISTRIBUTIONS:
        try:
            return find(name)
        except EngineNotFoundError as err:
            problems.append(err)
    raise problems[0]


def _installed(python: str | None, name: str) -> Tree:
    """The engine in an interpreter's environment; None: in this one's."""
    found = engines.find(name) if python is None else _find_in(python, name)
    if found is None or found.location is None:
        raise EngineNotFoundError(
            f"no {name} in the environment of {python or sys.executable}",
            hint="name the environment with --python or --site-packages",
        )
    return patchset.site_tree(Path(found.location), name)


def _find_in(python: str, name: str) -> engines.Installed | None:
    try:
        done = subprocess.run(
            # -E: PYTHONPATH is this process's, not that environment's.
            [python, "-E", str(Path(engines.__file__)), name],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        )
        answer = json.loads(done.stdout)
    except (OSError, subprocess.SubprocessError, ValueError) as err:
        detail = (getattr(err, "stderr", None) or str(err)).strip().splitlines()[-1:]
        raise EngineNotFoundError(
            f"{python} does not run as a Python interpreter: {' '.join(detail)}"
        ) from err
    return engines.Installed(**answer) if answer else None


_ACTIONS: Mapping[str, Callable[[argparse.Namespace], int]] = {
    "list": _list,
    "show": _show,
    "status": _status,
    "check": _check,
    "apply": _apply,
    "revert": _revert,
    "export": _export,
    "import": _import,
}
