"""Fixtures over real engines; everything here takes minutes."""

from __future__ import annotations

from pathlib import Path

import pytest
from cell_runs import ENGINE, CellRun, harness

from ci import environment
from ci.environment import Environment
from dflash_plugin import demo, matrix


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.engine)
            item.add_marker(pytest.mark.timeout(1500))


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
    return harness(out, "check", f"{ENGINE}/stock/cpu/tiny-qwen3", "--profile", "ci")
