"""``python -m ci replicas``: the tiny pairs, found in the cache or built into it.

    <cache>/replicas/target-<id>-<key>/     config, tokenizer, weights
    <cache>/replicas/<pair id>-<key>/       target/ (a copy), draft/, replica.json

A key changes with what a part is made of: its rows in ``ci/data/replicas.toml``, the code
that builds it, and the releases of torch and Transformers. Nothing is ever half there.
Torch runs in a process of its own, in the reference's environment.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dflash_plugin
from dflash_plugin import cache, pair
from dflash_plugin.errors import TrainingError, UsageError

from . import environment, replica_specs
from .environment import Environment
from .replica_specs import PairSpec, Specs, TargetSpec

ROOT = Path(__file__).parents[1]
RECORD = "replica.json"
"""Written last by the builder: how a pair was trained, and its acceptance lengths."""
COMMAND = (sys.executable, "-m", "ci", "replicas")
"""What builds one of several at a time."""
_BUILDER = Path(__file__).parent / "replica_builder"
_TARGET_CODE = ("language.py", "tokenizer.py", "target.py")
_LOG_LINES = 12


@dataclass(frozen=True)
class Replica:
    """A built pair."""

    id: str
    target: Path
    draft: Path
    record: Mapping[str, Any]


def ensure(name: str, *, specs: Specs | None = None, force: bool = False) -> Replica:
    """The replica of that id, built first if it is not there.

    One process builds; others wait for it.

    Args:
        specs: None for the checkout's own.
        force: build the draft anew; its target only if it is missing.

    Raises:
        UnknownCellError: no such replica.
        TrainingError: the builder failed; the message has its last lines.
        CacheError: disk full, no permission.
        PairMismatchError: what was built does not pass the preflight of a pair.
    """
    specs = specs or replica_specs.load()
    spec = specs.pair(name)
    reference = environment.ensure_reference()
    folder = _pair_folder(specs, spec, reference)
    found = _read(name, folder)
    if found is not None and not force:
        return found
    with cache.locked(folder.name, sweep=folder):
        found = _read(name, folder)
        if found is not None and not force:  # built by the process that this one waited for
            return found
        target = _ensure_target(specs, spec.target, reference)
        with cache.staged_dir(folder) as staging:
            shutil.copytree(target, staging / "target")
            _build(reference, f"draft {name}", "draft", specs.for_pair(spec), staging)
            pair.require(pair.preflight(staging / "target", staging / "draft"))
    built = _read(name, folder)
    assert built is not None
    return built


def find(name: str, *, specs: Specs | None = None) -> Replica | None:
    """The replica of that id if it is built."""
    specs = specs or replica_specs.load()
    spec = specs.pair(name)
    return _read(name, _pair_folder(specs, spec, environment.ensure_reference()))


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Of the command ``replicas``."""
    parser.add_argument("ids", nargs="*", metavar="ID", help="of ci/data/replicas.toml")
    parser.add_argument("--all", action="store_true", help="every one")
    parser.add_argument("--list", action="store_true", help="say which are built; build none")
    parser.add_argument("--force", action="store_true", help="build the drafts anew")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="built at a time")


def run(args: argparse.Namespace) -> int:
    """Build, and print ``id target draft`` per pair; or list."""
    specs = replica_specs.load()
    if args.ids and args.all:
        raise UsageError("replicas: ids and --all", hint="give one of the two")
    if args.list:
        for name in args.ids or specs.pairs:
            found = find(name, specs=specs)
            print(name, found.target.parent if found else "not built")
        return 0
    if not args.ids and not args.all:
        raise UsageError(
            "replicas: nothing to build", hint="name some, or --all; --list shows them"
        )
    names = list(dict.fromkeys(specs.pair(name).id for name in args.ids or specs.pairs))
    if args.jobs < 1:
        raise UsageError(f"replicas: --jobs is {args.jobs}, expected at least 1")
    side_by_side = args.jobs > 1
    if side_by_side:
        _build_side_by_side(specs, names, args.jobs, args.force)
    for name in names:
        replica = ensure(name, specs=specs, force=args.force and not side_by_side)
        print(name, replica.target, replica.draft, flush=True)
        if not side_by_side:  # what built it has said so
            lengths = ", ".join(f"{k} {v:.3f}" for k, v in replica.record["al"].items())
            print(f"{name}: acceptance length {lengths}", file=sys.stderr)
    return 0


def _build_side_by_side(specs: Specs, names: Sequence[str], jobs: int, force: bool) -> None:
    """Build them, each by a command of its own; what one of them says is said here.

    A pair whose target another one is making comes later: it would only wait.

    Raises:
        TrainingError: some failed; the others are built.
    """
    command = [*COMMAND, *(["--force"] * force)]
    reference = environment.ensure_reference()
    folders = {name: _target_folder(specs, specs.pair(name).target, reference) for name in names}
    waiting, failed = list(names), list[str]()
    running: dict[int, tuple[str, subprocess.Popen[bytes]]] = {}
    try:
        while waiting or running:
            for place in set(range(jobs)) - set(running):
                begun = {folders[one] for one, _ in running.values() if not folders[one].exists()}
                name = next((name for name in waiting if folders[name] not in begun), "")
                if not name:
                    break
                waiting.remove(name)
                process = subprocess.Popen([*command, name], cwd=ROOT, stdout=subprocess.DEVNULL)
                running[place] = name, process
                _keep_to_cores(process.pid, place, jobs)
            time.sleep(0.1)
            for place, (name, process) in list(running.items()):
                if process.poll() is not None:
                    del running[place]
                    failed += [name] * bool(process.returncode)
    finally:
        for _, process in running.values():
            process.terminate()
        for _, process in running.values():
            process.wait()
    if failed:
        raise TrainingError(
            f"replicas: {', '.join(failed)} not built", hint="what they said is above; run it again"
        )


def _keep_to_cores(process: int, place: int, jobs: int) -> None:
    """Give one of ``jobs`` processes its share of the cores: two that wander are a tenth slower."""
    if not hasattr(os, "sched_setaffinity"):  # Linux alone has it
        return
    cores = sorted(os.sched_getaffinity(0))
    with contextlib.suppress(ProcessLookupError):
        os.sched_setaffinity(process, cores[place::jobs] or cores)


def _ensure_target(specs: Specs, spec: TargetSpec, reference: Environment) -> Path:
    """The folder of a trained target; several pairs may share it."""
    folder = _target_folder(specs, spec, reference)
    with cache.locked(folder.name, sweep=folder):
        if not folder.exists():
            with cache.staged_dir(folder) as staging:
                what = specs.for_target(spec)
                _build(reference, f"target {spec.id}", "target", what, staging)
    return folder


def _target_folder(specs: Specs, spec: TargetSpec, reference: Environment) -> Path:
    key = _key(specs.for_target(spec), (_BUILDER / name for name in _TARGET_CODE), reference)
    return _root() / f"target-{spec.id}-{key}"


def _pair_folder(specs: Specs, spec: PairSpec, reference: Environment) -> Path:
    training = Path(dflash_plugin.__file__).parent / "training"
    code = (*sorted(_BUILDER.glob("*.py")), *sorted(training.glob("*.py")))
    return _root() / f"{spec.id}-{_key(specs.for_pair(spec), code, reference)}"


def _root() -> Path:
    return cache.cache_dir() / "replicas"


def _key(spec: Mapping[str, Any], code: Iterable[Path], reference: Environment) -> str:
    digest = hashlib.sha256(json.dumps(spec, sort_keys=True).encode())
    for path in code:
        digest.update(f"\n{path.name}\n".encode() + path.read_bytes())
    versions = {name: reference.packages[name] for name in ("torch", "transformers")}
    digest.update(json.dumps(versions, sort_keys=True).encode())
    return digest.hexdigest()[:10]


def _read(name: str, folder: Path) -> Replica | None:
    try:
        record = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    return Replica(name, folder / "target", folder / "draft", record)


def _build(
    reference: Environment, what: str, part: str, spec: Mapping[str, Any], folder: Path
) -> None:
    """Run the builder: it reads ``spec`` as JSON and fills ``folder``."""
    command = [str(reference.python), "-m", "ci.replica_builder", part, str(folder)]
    env = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "HF_HUB_OFFLINE": "1",
        # A second thread that spins while others need its core makes all slower.
        "OMP_WAIT_POLICY": "PASSIVE",
        # glibc gives each large tensor's pages back to the kernel and asks for them again.
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    }
    # On a terminal its progress bar is shown; elsewhere its last lines are kept.
    terminal = sys.stderr.isatty()
    print(f"building {what}: some minutes", file=sys.stderr, flush=True)
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=env,
        input=json.dumps(spec),
        stdout=subprocess.DEVNULL,
        stderr=None if terminal else subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode != 0:
        tail = _tail((done.stderr or "see above").splitlines())
        raise TrainingError(
            f"{what}: the builder ended with exit code {done.returncode}\n{tail}",
            hint="nothing was kept; run the command again",
        )


def _tail(lines: Sequence[str]) -> str:
    return "\n".join(f"    | {line}" for line in lines[-_LOG_LINES:])
