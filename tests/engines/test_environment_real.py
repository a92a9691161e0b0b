"""The matrix's engines are really installed: minutes the first time, nothing after that."""

from __future__ import annotations

import os
import subprocess
import time

import pytest

from ci import environment
from dflash_plugin import matrix
from dflash_plugin.errors import EnvironmentBuildError

pytestmark = pytest.mark.engine


# Those of SGLang, with a torch of 5 GB, where its tests are asked for.
_ON_CPU = [
    name
    for name, engine in matrix.load().engines.items()
    if "cpu" in engine.builds
    and (engine.name == "vllm" or name == os.environ.get("DFLASH_TEST_SGLANG"))
]


@pytest.mark.parametrize("engine_id", _ON_CPU)
def test_engine_environment(engine_id: str) -> None:
    engine = matrix.load().engines[engine_id]
    build = engine.builds["cpu"]
    try:
        env = environment.ensure_engine(engine, "cpu", plugin=False)
    except EnvironmentBuildError as err:
        if "needs Python" in err.message:
            pytest.skip(err.message)
        raise
    code = (
        "import importlib.metadata as m, torch; "
        f"print(m.version({build.distribution!r}), torch.__version__)"
    )
    done = subprocess.run(
        [env.python, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    version, torch = done.stdout.split()
    assert version == engine.version == env.packages[build.distribution]
    assert torch.split("+")[0] == build.torch

    began = time.monotonic()
    assert environment.ensure_engine(engine, "cpu", plugin=False) == env
    assert time.monotonic() - began < 0.2


def test_plugin_environment() -> None:
    """This checkout's wheel beside the engine, installed the way users get it."""
    engine = next(iter(matrix.load().engines.values()))
    try:
        env = environment.ensure_engine(engine, "cpu", plugin=True)
    except EnvironmentBuildError as err:
        if "needs Python" in err.message:
            pytest.skip(err.message)
        raise
    code = "import dflash_plugin; print(dflash_plugin.__version__, dflash_plugin.__file__)"
    done = subprocess.run(
        [env.python, "-c", code], capture_output=True, text=True, check=True, cwd="/"
    )
    version, file = done.stdout.split(maxsplit=1)
    assert version == env.packages["dflash-plugin"]
    assert file.startswith(str(env.path))
