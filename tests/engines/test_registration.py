"""dflash on stock vLLM 0.18 and 0.19, where the method is absent.

``DFLASH_TEST_ABSENT`` names the releases to run (default: 0.19.1; 0.18.1 wants libtcmalloc).
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest
from cell_runs import CellRun, harness

from ci import environment
from dflash_plugin import matrix

RELEASES = [f"vllm-{v}" for v in os.environ.get("DFLASH_TEST_ABSENT", "0.19.1").split(",")]
PROBE = Path(__file__).with_name("registration_probe.py")


@pytest.mark.parametrize("engine_id", RELEASES)
def test_registration_is_still_needed(engine_id: str) -> None:
    """Fails once the release has the method, or its source is not what the shims know."""
    env = environment.ensure_engine(matrix.load().engines[engine_id], "cpu", plugin=False)
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [env.python, PROBE], env=clean, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert "dflash" not in report["methods"]
    assert "method" in report["refused"]
    assert report["unknown"] == []


@pytest.fixture(scope="module", params=RELEASES)
def cell(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> CellRun:
    out = tmp_path_factory.mktemp(request.param)
    name = f"{request.param}/plugin/cpu/tiny-qwen3-mixed"
    return harness(out, "check", name, "--profile", "tiny")


def test_a_mixed_draft_is_lossless_and_faithful(cell: CellRun) -> None:
    assert cell.exit_code == 0, cell.output
    result = cell.result
    assert [result[name]["status"] for name in ("lossless", "faithful")] == ["passed", "passed"]
    exact = result["lossless"]["evidence"]["float32"]
    assert exact["equal"] == exact["prompts"] >= 12
    blocks = result["faithful"]["evidence"]["blocks"]
    assert blocks["equal"] + blocks["tie"] == blocks["steps"] > 100
    assert blocks["tie"] <= blocks["steps"] * 0.005
    assert abs(result["al"] / result["al_reference"] - 1) <= 0.01


def test_the_server_says_who_drafts(cell: CellRun) -> None:
    logs = list(cell.out.glob("cells/**/server-dflash-float32.log"))
    assert ": registered (" in logs[0].read_text(encoding="utf-8")
