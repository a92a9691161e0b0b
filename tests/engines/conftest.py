"""Fixtures over real engines; everything here takes minutes."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from ci import environment
from ci.environment import Environment
from dflash_plugin import demo, matrix

ROOT = Path(__file__).parents[2]
ENGINE = "vllm-0.32.0"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.engine)
            item.add_marker(pytest.mark.timeout(1500))


@dataclass(frozen=True)
class CellRun:
    """One finished `python -m ci` command: its exit code, output and first result."""

    exit_code: int
    output: str
    out: Path
    result: dict


def harness(out: Path, command: str, *args: str) -> CellRun:
    """Run the harness as a user would, in a process of its own."""
    line = [sys.executable, "-m", "ci", command, *args, "--out", str(out)]
    done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True, check=False)
    results = json.loads((out / "report.json").read_text(encoding="utf-8"))
    return CellRun(done.returncode, done.stdout + done.stderr, out, results[0])


@pytest.fixture(scope="session")
def engine() -> matrix.Engine:
    return matrix.load().engines[ENGINE]


@pytest.fixture(scope="session")
def plugin_env(engine: matrix.Engine) -> Environment:
    return environment.ensure_engine(engine, "cpu", plugin=True)


@pytest.fixture(scope="session")
def stock_env(engine: matrix.Engine) -> Environment:
    return environment.ensure_engine(engine, "cpu", plugin=False)


@pytest.fixture(scope="session")
def reference_env() -> Environment:
    return environment.ensure_reference()


@pytest.fixture(scope="session")
def pair() -> demo.DemoPair:
    return demo.demo_pair()


@pytest.fixture(scope="session")
def plugin_run(tmp_path_factory: pytest.TempPathFactory) -> CellRun:
    out = tmp_path_factory.mktemp("plugin")
    return harness(out, "run", f"{ENGINE}/plugin/cpu/smollm2-135m", "--profile", "ci")


@pytest.fixture(scope="session")
def stock_run(tmp_path_factory: pytest.TempPathFactory) -> CellRun:
    out = tmp_path_factory.mktemp("stock")
    return harness(out, "check", f"{ENGINE}/stock/cpu/smollm2-135m", "--profile", "ci")
