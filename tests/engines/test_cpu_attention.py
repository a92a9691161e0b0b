"""The CPU attention shims on the real kernels of the releases they were written for."""

from __future__ import annotations

import json
import os
import subprocess
from functools import lru_cache
from pathlib import Path

import pytest

from ci import environment
from dflash_plugin import matrix

RELEASES = ["vllm-0.18.1", "vllm-0.19.1", "vllm-0.20.2", "vllm-0.22.1"]
PROBE = Path(__file__).with_name("cpu_attention_probe.py")
LARGEST = {"torch.float32": 1e-5, "torch.bfloat16": 0.02}


@lru_cache
def probe(engine_id: str) -> dict:
    env = environment.ensure_engine(matrix.load().engines[engine_id], "cpu", plugin=False)
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [env.python, PROBE], env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.parametrize("engine_id", RELEASES)
def test_cpu_stale_kv_is_still_needed(engine_id: str) -> None:
    """Fails once the release's kernel stops at a sequence's end, or its source is another."""
    assert probe(engine_id)["wrong"] is True
    assert probe(engine_id)["cpu-stale-kv"] is True


@pytest.mark.parametrize("engine_id", RELEASES)
def test_cpu_kv_update_is_still_needed(engine_id: str) -> None:
    """Fails once the back-end has the method, or its source is another."""
    assert probe(engine_id)["no_update"] is True
    assert probe(engine_id)["cpu-kv-update"] is True


@pytest.mark.parametrize("engine_id", RELEASES)
def test_repaired_attention_is_attention(engine_id: str) -> None:
    errors = probe(engine_id)["errors"]
    assert len(errors) == 48
    for dtype, *case, error in errors:
        assert error < LARGEST[dtype], (dtype, *case)
