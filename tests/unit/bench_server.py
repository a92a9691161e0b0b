"""``ci/workers/stub_server.py`` as a child process, and how a test asks it."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from dflash_plugin.bench.client import Sampling
from dflash_plugin.bench.datasets import Dataset, Item
from dflash_plugin.bench.plan import Arm, Plan
from dflash_plugin.bench.records import Level

STUB = Path(__file__).resolve().parents[2] / "ci" / "workers" / "stub_server.py"


@contextlib.contextmanager
def stub(**options: object) -> Iterator[str]:
    """A stub server's address."""
    process = subprocess.Popen(
        [sys.executable, str(STUB), json.dumps(options)], stdout=subprocess.PIPE
    )
    assert process.stdout is not None
    try:
        yield f"http://127.0.0.1:{int(process.stdout.readline())}"
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()


def items(count: int, turns: int = 1) -> tuple[Item, ...]:
    return tuple(
        Item(f"p{i}", "k", tuple(f"turn {t} of {i}" for t in range(turns))) for i in range(count)
    )


def plan(count: int = 4, *, arms=("base", "dflash"), levels=("c2",), rounds=1, turns=1) -> Plan:
    return Plan(
        backend="vllm",
        model="stub",
        draft=None,
        arms=tuple(Arm(name) for name in arms),
        datasets=(Dataset("set", "file", items(count, turns)),),
        levels=tuple(map(Level.parse, levels)),
        rounds=rounds,
        sampling=Sampling(8),
    )
