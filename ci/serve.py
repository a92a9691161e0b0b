"""The real engine server as a child process: ready, exited or timed out; always stopped."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dflash_plugin import engines
from dflash_plugin.backends.server import ServerClient
from dflash_plugin.errors import (
    EngineExitedError,
    EngineTimeoutError,
    EnvironmentBuildError,
    PortInUseError,
)
from dflash_plugin.matrix import Cell

from .environment import Environment

MODEL_NAME = "target"
READY_TIMEOUT = 600.0
RECORDER = Path(__file__).parent / "recorder"
_LOG_LINES = 20


@dataclass(frozen=True)
class ServerSpec:
    """Everything that decides what is started.

    ``draft`` None: no speculation. ``record``: file for the drafted blocks.
    """

    cell: Cell
    environment: Environment
    target: Path
    draft: Path | None
    num_speculative_tokens: int
    dtype: str
    log: Path
    max_model_len: int = 2048
    max_num_seqs: int = 16
    eager: bool = True
    record: Path | None = None
    host: str = "127.0.0.1"
    port: int = 0  # 0: any free one

    @property
    def label(self) -> str:
        """For messages: cell, what is served, dtype."""
        mode = "dflash" if self.draft else "base"
        return f"{self.cell.id} ({mode}, {self.dtype})"

    def command(self, port: int) -> tuple[list[str], dict[str, str]]:
        """Command line and environment of the server."""
        args = [
            *("--served-model-name", MODEL_NAME, "--host", self.host, "--port", str(port)),
            *("--dtype", self.dtype, "--max-model-len", str(self.max_model_len)),
            *("--max-num-seqs", str(self.max_num_seqs)),
            *self.cell.build.args,
        ]
        if self.eager:
            args.append("--enforce-eager")
        if self.draft is not None:
            config = engines.speculative_config(str(self.draft), self.num_speculative_tokens)
            args += ["--speculative-config", config]
        engine = installed(self.environment, self.cell.engine.name)
        command, extra = engines.serve_command(
            str(self.environment.python), engine, str(self.target), args
        )
        env = {
            **_clean_environment(),
            **self.cell.build.env,
            **extra,
            # Nothing here needs a hub; a look-up would only wait for a time-out.
            "HF_HUB_OFFLINE": "1",
            "VLLM_NO_USAGE_STATS": "1",
        }
        plugins = ["dflash"] if self.cell.variant.plugin else []
        if self.record is not None:
            env["PYTHONPATH"] = str(RECORDER)
            env["DFLASH_RECORD"] = str(self.record)
            plugins.append("dflash_recorder")
        # Named, so that a cell runs what it says and no other plugin of the environment.
        env["VLLM_PLUGINS"] = ",".join(plugins)
        return command, env


@contextlib.contextmanager
def serve(spec: ServerSpec, *, timeout: float = READY_TIMEOUT) -> Iterator[ServerClient]:
    """Start one server, wait until it is ready, stop it in every case."""
    with serve_all([spec], timeout=timeout) as clients:
        yield clients[0]


@contextlib.contextmanager
def serve_all(
    specs: Sequence[ServerSpec], *, timeout: float = READY_TIMEOUT
) -> Iterator[list[ServerClient]]:
    """Start several servers side by side and wait for all of them.

    Raises:
        PortInUseError: the port asked for is taken.
        EngineExitedError, EngineTimeoutError: with the last lines of the log.
    """
    servers: list[Server] = []
    try:
        for spec in specs:
            servers.append(Server(spec))
        for server in servers:
            server.wait_ready(timeout)
        yield [server.client for server in servers]
        for server in servers:
            server.require_running()
    finally:
        stop_all(servers)


class Server:
    """A started server process and its process group."""

    def __init__(self, spec: ServerSpec) -> None:
        self.spec = spec
        self.port = spec.port or _free_port(spec.host)
        _require_free(spec.host, self.port)
        command, env = spec.command(self.port)
        spec.log.parent.mkdir(parents=True, exist_ok=True)
        with spec.log.open("w", encoding="utf-8") as log:
            log.write(f"+ {' '.join(command)}\n")
            log.flush()
            # A session of its own: engines start worker processes, and only the whole
            # group can be stopped for certain.
            self.process = subprocess.Popen(
                command,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.client = ServerClient(f"http://{spec.host}:{self.port}", MODEL_NAME)

    def wait_ready(self, timeout: float) -> None:
        """Return when the health check answers; raise when it never will."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            self.require_running()
            if self.client.ready():
                return
            time.sleep(0.2)
        raise EngineTimeoutError(
            f"{self.spec.label}: not ready after {timeout:.0f} s, still running\n{self.log_tail()}",
            hint=f"see {self.spec.log}, or allow more time with --ready-timeout",
        )

    def require_running(self) -> None:
        """Raise ``EngineExitedError`` with the end of the log if the process has ended."""
        code = self.process.poll()
        if code is not None:
            raise EngineExitedError(
                f"{self.spec.label}: the engine exited with code {code}\n{self.log_tail()}",
                hint=f"see {self.spec.log}",
            )

    def log_tail(self) -> str:
        """The last lines of the server's log, indented."""
        try:
            lines = self.spec.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as err:
            return f"    (no log: {err})"
        return "\n".join(f"    | {line[:300]}" for line in lines[-_LOG_LINES:])


def stop_all(servers: Sequence[Server], grace: float = 15.0) -> None:
    """End every server's whole process group; a second Ctrl-C meanwhile is ignored."""
    previous = _ignore_interrupts()
    try:
        for server in servers:
            _signal_group(server.process, signal.SIGTERM)
        deadline = time.monotonic() + grace
        while time.monotonic() < deadline and any(_group_alive(s.process) for s in servers):
            time.sleep(0.05)
        for server in servers:
            _signal_group(server.process, signal.SIGKILL)
            server.process.wait()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def installed(environment: Environment, engine: str) -> engines.Installed:
    """The engine as the environment's own interpreter sees it."""
    command = [str(environment.python), str(Path(engines.__file__)), engine]
    answer = subprocess.run(command, capture_output=True, text=True, check=False)
    try:
        return engines.Installed(**json.loads(answer.stdout))
    except (ValueError, TypeError) as err:
        raise EnvironmentBuildError(
            f"{environment.python}: no {engine} found there: {answer.stderr[-300:]}",
            hint="remove the environment and run again",
        ) from err


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _require_free(host: str, port: int) -> None:
    with socket.socket() as probe:
        # As the engine's own socket does, so that a port in TIME_WAIT counts as free.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as err:
            raise PortInUseError(
                f"port {port} on {host} is in use", hint="choose another --port, or leave it out"
            ) from err


def _clean_environment() -> dict[str, str]:
    """This process's environment without what would leak into an engine's."""
    dropped = ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "DFLASH_PLUGIN_ANNOUNCED")
    return {k: v for k, v in os.environ.items() if k not in dropped and not k.startswith("VLLM_")}


def _signal_group(process: subprocess.Popen[bytes], number: int) -> None:
    # The group outlives its leader while workers run, and its id is not reused before.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, number)


def _group_alive(process: subprocess.Popen[bytes]) -> bool:
    process.poll()
    try:
        os.killpg(process.pid, 0)
    except (ProcessLookupError, PermissionError):
        return False
    return True


def _ignore_interrupts() -> Mapping[int, signal._HANDLER]:
    try:
        return {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, which gets no signals either
        return {}


if sys.platform == "win32":  # pragma: no cover
    raise ImportError("the harness needs a POSIX system")
