"""``python -m ci lock``: the exact packages of an engine's environment, as ``ci/locks/<name>``.

A lock is a pip requirements file: every package at one version with its hashes, for every
platform and every Python from 3.11 on. ``uv`` writes it; pip alone installs it.
"""

from __future__ import annotations

import argparse
import difflib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name

from dflash_plugin import cache, matrix
from dflash_plugin.errors import (
    EnvironmentBuildError,
    MissingDependencyError,
    UnknownCellError,
    VerdictFailedError,
    near_names,
)

LOCKS = Path(__file__).parent / "locks"
PYTHON = "3.11"
"""The lowest Python a lock holds for."""

REFERENCE = "reference"
REFERENCE_TORCH = "2.13.0"
"""The same release as the engines' own, so that one torch on disk serves all."""
REFERENCE_REQUIREMENTS = (
    "transformers==5.19.0",
    "safetensors",
    "tokenizers",
    "jinja2",
    "tqdm",
    "packaging",
    "numpy",
)

LEFT_OUT = ("torch", "torchvision", "torchaudio", "torchcodec", "triton")
"""Never in a lock: the torch family is a layer of its own, triton is not used on a CPU."""

CUDA_ONLY = (
    *("cuda-python", "cuda-tile", "nvidia-cutlass-dsl", "nvidia-mathdx", "nvshmem4py-cu13"),
    *("flash-attn-4", "flashinfer-python", "humming-kernels", "quack-kernels", "tilelang"),
    *("sgl-deep-ep", "sgl-deep-gemm", "sgl-flash-mla", "sglang-kernel", "tokenspeed-mla"),
)
"""What SGLang asks for whatever the platform: gigabytes of GPU kernels, of no use on a CPU."""

_WHY = """\
# torch {torch} is left out: it is a layer of its own, shared by all environments, and its
# CPU build is not on the index that this file was made from. triton is left out: 1 GB,
# unused on a CPU (a CUDA build of torch brings its own).
"""
_WHY_CUDA = "# Left out too, for they are for GPUs only:\n"


@dataclass(frozen=True)
class Lock:
    """What one lock file is made from."""

    id: str
    path: Path
    requirements: tuple[str, ...]
    torch: str
    left_out: tuple[str, ...] = LEFT_OUT


def known_locks(path: Path | None = None, *, folder: Path = LOCKS) -> Mapping[str, Lock]:
    """Every lock there should be, by id: ``reference`` and one per engine build.

    The id of a build is the engine's, with ``/<platform>`` for any build but the first.
    """
    locks = [Lock(REFERENCE, folder / "reference.txt", REFERENCE_REQUIREMENTS, REFERENCE_TORCH)]
    for engine in matrix.load(path).engines.values():
        for position, build in enumerate(b for b in engine.builds.values() if b.lock):
            lock_id = f"{engine.id}/{build.platform}" if position else engine.id
            requirement = f"{build.distribution}=={engine.version}"
            left_out = (*LEFT_OUT, *CUDA_ONLY) if engine.name == "sglang" else LEFT_OUT
            locks.append(
                Lock(lock_id, folder / str(build.lock), (requirement,), build.torch, left_out)
            )
    return {lock.id: lock for lock in locks}


def compile_lock(lock: Lock, *, upgrade: bool = False) -> str:
    """The lock's text, resolved now; versions already in the file are kept unless ``upgrade``.

    Raises:
        MissingDependencyError: no ``uv``.
        EnvironmentBuildError: ``uv`` failed (no such version, no network).
    """
    with tempfile.TemporaryDirectory(prefix="dflash-lock-") as name:
        folder = Path(name)
        out = folder / "lock.txt"
        if lock.path.exists():
            shutil.copyfile(lock.path, out)  # uv prefers what is in its output file
        (folder / "in.txt").write_text("\n".join(lock.requirements) + "\n", encoding="utf-8")
        # torch stays in the resolution, so that what it shares with the engine fits both.
        overrides = [f"{n}{_pin(n, lock)} ; sys_platform == 'never'" for n in lock.left_out]
        (folder / "over.txt").write_text("\n".join(overrides) + "\n", encoding="utf-8")
        command = [_uv(), "pip", "compile", "in.txt", "--override", "over.txt", "--universal"]
        command += ["--generate-hashes", "--python-version", PYTHON, "--no-header"]
        command += ["--no-emit-index-url", "--no-emit-find-links", "--annotation-style", "line"]
        command += ["--no-progress", "--quiet", "--output-file", out.name]
        command += [arg for n in lock.left_out for arg in ("--no-emit-package", n)]
        command += ["--upgrade"] if upgrade else []
        env = {**os.environ, "NO_COLOR": "1"}
        done = subprocess.run(
            command, cwd=folder, capture_output=True, text=True, check=False, env=env
        )
        if done.returncode:
            tail = "\n".join(done.stderr.strip().splitlines()[-15:])
            raise EnvironmentBuildError(
                f"{lock.id}: uv could not resolve {' '.join(lock.requirements)}:\n{tail}",
                hint="check the versions in compat_matrix.toml, and that the index can be reached",
            )
        return _header(lock) + _without_never(out.read_text(encoding="utf-8"))


def lock_problems(path: Path) -> list[str]:
    """What is wrong with a lock file, without the network; empty when nothing is.

    Every requirement is one exact version with SHA-256 hashes; no addresses, no options,
    nothing of :data:`LEFT_OUT`.
    """
    if not path.exists():
        return [f"{path.name}: is missing; write it with `python -m ci lock --all`"]
    text = path.read_text(encoding="utf-8")
    problems = []
    if "://" in text:
        problems.append(f"{path.name}: contains an address; a lock must work with any index")
    entries = _entries(text)
    if not entries:
        problems.append(f"{path.name}: has no packages")
    for entry in entries:
        joined = " ".join(part.rstrip("\\").strip() for part in _code(entry))
        spec, *hashes = joined.split(" --hash=")
        try:
            requirement = Requirement(spec)
        except InvalidRequirement:
            problems.append(f"{path.name}: {spec!r} is not `name==version`")
            continue
        pins = list(requirement.specifier)
        exact = len(pins) == 1 and pins[0].operator == "==" and not pins[0].version.endswith("*")
        if not exact or requirement.url:
            problems.append(f"{path.name}: {spec!r} is not pinned with == to one version")
        if not hashes or not all(re.fullmatch(r"sha256:[0-9a-f]{64}", h.strip()) for h in hashes):
            problems.append(f"{path.name}: {requirement.name} has no sha256 hash, or a broken one")
        if canonicalize_name(requirement.name) in LEFT_OUT:
            problems.append(f"{path.name}: {requirement.name} does not belong in a lock")
    return problems


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of ``python -m ci lock``."""
    parser.add_argument("id", nargs="?", help="an engine id, or `reference`")
    parser.add_argument("--all", action="store_true", help="every lock")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 if one is stale")
    parser.add_argument("--upgrade", action="store_true", help="move to the newest that fits")


def run(args: argparse.Namespace) -> int:
    """``python -m ci lock ENGINE_ID|reference|--all [--check] [--upgrade]``."""
    known = known_locks()
    if not args.all and args.id not in known:
        raise UnknownCellError(f"no lock {args.id!r}", hint=near_names(args.id or "", known))
    stale = []
    for lock in known.values() if args.all else [known[args.id]]:
        text = compile_lock(lock, upgrade=args.upgrade)
        old = lock.path.read_text(encoding="utf-8") if lock.path.exists() else ""
        count = len(_entries(text))
        if text == old:
            print(f"{lock.path.name}: up to date, {count} packages")
        elif args.check:
            stale.append(lock)
            diff = difflib.unified_diff(_pins(old), _pins(text), "checked in", "now", lineterm="")
            print(f"{lock.path.name}: stale", *list(diff), sep="\n")
        else:
            cache.atomic_write_text(lock.path, text)
            print(f"{lock.path.name}: written, {count} packages")
    if stale:
        raise VerdictFailedError(
            "stale: " + ", ".join(lock.path.name for lock in stale),
            hint="; ".join(f"python -m ci lock {lock.id}" for lock in stale),
        )
    return 0


def _pin(name: str, lock: Lock) -> str:
    return f"=={lock.torch}" if name == "torch" else ""


def _uv() -> str:
    beside = Path(sys.executable).with_name("uv")
    found = str(beside) if beside.exists() else shutil.which("uv")
    if not found:
        raise MissingDependencyError("writing a lock needs uv", hint="pip install uv")
    return found


def _header(lock: Lock) -> str:
    made = f"# Written by `python -m ci lock {lock.id}` from: {' '.join(lock.requirements)}\n"
    more = [name for name in lock.left_out if name not in LEFT_OUT]
    names = textwrap.wrap(
        ", ".join(more), 94, initial_indent="# ", subsequent_indent="# ", break_on_hyphens=False
    )
    why = [_WHY_CUDA, *(f"{line}\n" for line in names)] if more else []
    return made + _WHY.format(torch=lock.torch) + "".join(why)


def _entries(text: str) -> list[list[str]]:
    """The lines of each requirement: its own, its hashes, and the comments under it."""
    entries: list[list[str]] = []
    for line in text.splitlines():
        if line[:1].isspace():
            if entries:
                entries[-1].append(line)
        elif line and not line.startswith("#"):
            entries.append([line])
    return entries


def _code(entry: list[str]) -> list[str]:
    return [line for line in entry if not line.lstrip().startswith("#")]


def _pins(text: str) -> list[str]:
    return [entry[0].rstrip("\\ ") for entry in _entries(text)]


def _without_never(text: str) -> str:
    """Drop what only torch and its kin asked for; their own layer brings it."""
    kept = [entry for entry in _entries(text) if "'never'" not in entry[0]]
    return "".join(line + "\n" for entry in kept for line in entry)
