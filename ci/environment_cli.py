"""``python -m ci env``: build, show, link and prune environments."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from dflash_plugin import matrix
from dflash_plugin.errors import UnknownCellError, UsageError, near_names

from . import environment, layers, lock
from .environment import Environment


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``python -m ci env``."""
    parser.add_argument(
        "id",
        nargs="?",
        help="`reference`, an engine id, or <engine id>/<variant>; built if missing",
    )
    parser.add_argument("--platform", default="cpu", help="build of the engine (default: cpu)")
    parser.add_argument("--python", type=Path, metavar="PATH", help="make it from this interpreter")
    parser.add_argument(
        "--link", type=Path, metavar="VENV", help="let that virtual environment see its packages"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--list", action="store_true", help="what is in the cache, and its size")
    parser.add_argument(
        "--prune", action="store_true", help="remove what no current lock or source asks for"
    )


def run(args: argparse.Namespace) -> int:
    """``python -m ci env …``; returns the exit code."""
    chosen = [bool(args.id), args.list, args.prune]
    if sum(chosen) != 1:
        raise UsageError("env: expected an id, --list or --prune", hint="python -m ci env --help")
    if args.link and not args.id:
        raise UsageError("env: --link needs an id", hint="python -m ci env reference --link .venv")
    if args.list:
        return _list(args.json)
    if args.prune:
        return _prune(args.json)
    env = find(args.id, platform=args.platform, python=args.python)
    linked = environment.link(args.link, env) if args.link else None
    if args.json:
        raw = {**dataclasses.asdict(env), "link": linked}
        print(json.dumps(raw, default=str, indent=1))
        return 0
    print(env.python)
    print("  " + ", ".join(f"{name} {version}" for name, version in env.packages.items()))
    if linked:
        print(f"  linked: {linked}")
    return 0


def find(name: str, *, platform: str, python: Path | None = None) -> Environment:
    """The environment named ``reference``, ``<engine id>`` or ``<engine id>/<variant>``."""
    if name == lock.REFERENCE:
        return environment.ensure_reference(python=python)
    data = matrix.load()
    engine_id, slash, wanted = name.partition("/")
    engine = data.engines.get(engine_id)
    variant = data.variants.get(wanted if slash else "stock")
    if engine is None or variant is None:
        known = [f"{engine_id}/{one}" for one in data.variants] if engine else data.engines
        raise UnknownCellError(
            f"no environment {name!r}", hint=near_names(name, [lock.REFERENCE, *known])
        )
    return environment.ensure_engine(
        engine, platform, plugin=variant.plugin, patches=variant.patches, python=python
    )


def _folders(root: Path) -> list[Path]:
    return sorted(path for path in root.iterdir() if path.is_dir()) if root.is_dir() else []


def _list(as_json: bool) -> int:
    root = environment.env_root()
    rows: list[dict[str, Any]] = []
    for path in _folders(root):
        built = layers.read(path)
        rows.append(
            {
                "name": path.name,
                "complete": built is not None,
                "megabytes": round(_size(path) / 1e6),
                "seconds": built.seconds if built else None,
                "parent": built.parent if built else None,
                "packages": built.packages if built else {},
            }
        )
    if as_json:
        print(json.dumps({"root": str(root), "layers": rows}, indent=1))
        return 0
    print(f"{root}: {len(rows)} layers, {sum(row['megabytes'] for row in rows)} MB")
    for row in rows:
        state = ", ".join(f"{n} {v}" for n, v in row["packages"].items())
        if not row["complete"]:
            state = "incomplete: being built, or left by a killed build"
        print(f"  {row['name']}  {row['megabytes']} MB  {state}")
    return 0


def _prune(as_json: bool) -> int:
    """Remove the layers that nothing current needs; keeps those of any Python still in use."""
    root = environment.env_root()
    data = matrix.load()
    engines = list(data.engines.values())
    patches = [variant.patches for variant in data.variants.values() if variant.patches]
    found = {path.name: layers.read(path) for path in _folders(root)}
    # A layer is current if today's locks ask for it under the Python it was made with, or if
    # a current layer lies on it.
    running = layers.inspect(None)
    pythons = {(b.version, b.machine) for b in found.values() if b}
    current: set[str] = set()
    for version, machine in {*pythons, (running.version, running.machine)}:
        base = layers.Interpreter(Path(f"python{version}"), version, machine, {})
        current |= environment.current_names(engines, base, patches)
    gone = {}
    for name in sorted(set(found) - current):
        megabytes = round(_size(root / name) / 1e6)
        if layers.remove(root, name, leftover=found[name] is None):
            gone[name] = megabytes
    if as_json:
        print(json.dumps({"root": str(root), "removed": gone}, indent=1))
    else:
        print(f"{root}: removed {len(gone)} layers, {sum(gone.values())} MB", *gone, sep="\n  ")
    return 0


def _size(path: Path) -> int:
    """Bytes of the files under ``path``; links are not followed."""
    total = 0
    for folder, _, files in os.walk(path):
        for name in files:
            try:
                total += os.lstat(os.path.join(folder, name)).st_size  # noqa: PTH118  # 50,000 files
            except OSError:  # removed meanwhile
                continue
    return total
