"""An engine's server as a child process: ready, exited or timed out; always stopped."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Protocol, TypeVar

from .. import engines
from ..cache import make_dir
from ..errors import (
    EngineExitedError,
    EngineTimeoutError,
    EnvironmentBuildError,
    PortInUseError,
    RequestError,
    from_os_error,
)
from .server import ServerClient
from .sglang_server import SglangClient

CLIENTS: Mapping[str, type[ServerClient]] = {"vllm": ServerClient, "sglang": SglangClient}
MODEL_NAME = "target"
SHARED: Mapping[str, tuple[tuple[str, ...], Mapping[str, str]]] = {
    "vllm": ((), {}),
    # A scheduler with nothing to do would keep a core busy, and several servers share them. A
    # health check would generate a token each time, and wait a second for it.
    "sglang": (("--sleep-on-idle",), {"SGLANG_ENABLE_HEALTH_ENDPOINT_GENERATION": "0"}),
}
"""Arguments and environment of servers that run side by side on one machine."""
READY_TIMEOUT = 600.0
STOP_GRACE = 15.0
"""Seconds between SIGTERM and SIGKILL."""
_MOMENT, _LAST_WORDS = 1.0, 15.0
"""Seconds that a server has left to end in, answering health checks and not."""
POLL = 0.2
"""Seconds between two looks at a server that is not ready."""
_LOG_LINES = 20
_RAISED = re.compile(
    r"^(?:\(\S+ pid=\d+\) )?(?:[A-Z]+ [\d-]+ [\d:]+ \[[\w.]+:\d+\] )?"
    r"((?:[A-Za-z_]\w*\.)*(?:[A-Za-z_]\w*(?:Error|Exception))(?:: .*)?)$"
)
"""The last line of a traceback, with or without vLLM's process and logging prefixes."""


class Spec(Protocol):
    """What is started, and where its output goes."""

    @property
    def label(self) -> str:
        """For messages."""
        ...

    @property
    def engine_name(self) -> str:
        """One of :data:`CLIENTS`."""
        ...

    @property
    def log(self) -> Path:
        """The file for its output; the folder is made, and the server runs in it."""
        ...

    @property
    def host(self) -> str:
        """Where it listens."""
        ...

    @property
    def port(self) -> int:
        """Where it listens; 0: any free port."""
        ...

    @property
    def drafting(self) -> bool:
        """Whether it serves with a draft."""
        ...

    def command(self, port: int) -> tuple[list[str], dict[str, str]]:
        """Command line and environment; it serves its model as :data:`MODEL_NAME`."""
        ...


_SpecT = TypeVar("_SpecT", bound=Spec)


@contextlib.contextmanager
def serve_all(
    specs: Sequence[_SpecT],
    *,
    timeout: float = READY_TIMEOUT,
    server: Callable[[_SpecT, int], Server] | None = None,
) -> Iterator[list[ServerClient]]:
    """Start several servers side by side and wait for all of them.

    Args:
        server: makes a server of a spec and its port; None: a child process.

    Raises:
        PortInUseError: a port asked for is taken; nothing was started.
        EngineExitedError, EngineTimeoutError: with the last lines of the log.
        CacheError: the log cannot be written.
    """
    ports = _ports(specs)
    make = server or Server
    servers = [make(spec, port) for spec, port in zip(specs, ports, strict=True)]
    try:
        for one in servers:
            one.start()
        _wait_ready(servers, timeout)
        yield [one.client for one in servers]
        for one in servers:
            one.require_running()
    except RequestError:
        # What a request meets when its engine dies is not the news; the log's end is.
        _wait_for_an_end(servers)
        raise
    finally:
        stop_all(servers)


def _wait_for_an_end(servers: Sequence[Server]) -> None:
    """Raise for a server that is ending: at once, or some seconds after it answers no more."""
    began = time.monotonic()
    while True:
        for server in servers:
            server.require_running()
        waited = time.monotonic() - began
        healthy = all(server.client.ready() for server in servers)
        if waited > (_MOMENT if healthy else _LAST_WORDS):
            return
        time.sleep(0.05)


def _wait_ready(servers: Sequence[Server], timeout: float) -> None:
    """Return when every health check answers; raise as soon as one never will."""
    deadline = time.monotonic() + timeout
    waiting = list(servers)
    while waiting:
        try:
            for server in servers:
                server.require_running()
        except EngineExitedError as err:
            if err.drafting:
                _require_without_draft(servers)
            raise
        waiting = [server for server in waiting if not server.client.ready()]
        if waiting and time.monotonic() >= deadline:
            spec = waiting[0].spec
            raise EngineTimeoutError(
                f"{spec.label}: not ready after {timeout:.0f} s, still running\n"
                f"{waiting[0].log_tail()}",
                hint=f"see {spec.log}, or allow more time with --ready-timeout",
            )
        if waiting:
            time.sleep(POLL)


def _require_without_draft(servers: Sequence[Server]) -> None:
    """Raise if a server without a draft ends too: then the draft is not what is wrong."""
    plain = [server for server in servers if not server.spec.drafting]
    deadline = time.monotonic() + _LAST_WORDS
    while time.monotonic() < deadline and not all(server.client.ready() for server in plain):
        for server in plain:
            server.require_running()
        time.sleep(0.05)


class Server:
    """A server process, from :meth:`start` on, and its process group."""

    def __init__(self, spec: Spec, port: int) -> None:
        self.spec, self.port = spec, port
        self.client = CLIENTS[spec.engine_name](f"http://{spec.host}:{port}", MODEL_NAME)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start it; it is not ready yet."""
        command, env = self.spec.command(self.port)
        folder = self.begin_log(command)
        with self.spec.log.open("ab") as log, interrupts_deferred():
            # A session of its own: engines start worker processes, and only the whole
            # group can be stopped for certain. A folder of its own: `-m` would find
            # this checkout's modules before the environment's.
            self.process = subprocess.Popen(
                command,
                cwd=folder,
                env=env,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def begin_log(self, command: Sequence[str]) -> Path:
        """Make the log, with the command as its first line; returns its folder."""
        folder = make_dir(self.spec.log.parent)
        try:
            self.spec.log.write_text(f"+ {' '.join(command)}\n", encoding="utf-8")
        except OSError as err:
            raise from_os_error(err, str(self.spec.log)) from err
        return folder

    def require_running(self) -> None:
        """Raise ``EngineExitedError`` with the end of the log if the process has ended."""
        code = self.process.poll() if self.process is not None else None
        if code is not None:
            raise self.exited(code)

    def exited(self, code: int) -> EngineExitedError:
        """The error for an engine that ended by itself."""
        return EngineExitedError(
            f"{self.spec.label}: the engine exited with code {code}\n{self.log_tail()}",
            hint=f"see {self.spec.log}",
            cause=first_error(self._log()),
            drafting=self.spec.drafting,
        )

    def ask_to_end(self) -> None:
        """Send SIGTERM; returns at once."""
        if self.process is not None:
            _signal_group(self.process, signal.SIGTERM)

    def alive(self) -> bool:
        """Whether anything of it still runs."""
        return self.process is not None and _group_alive(self.process)

    def end(self) -> None:
        """End what is left of it, for certain."""
        if self.process is not None:
            _signal_group(self.process, signal.SIGKILL)
            self.process.wait()

    def _log(self) -> list[str]:
        try:
            return self.spec.log.read_text(encoding="utf-8", errors="replace").splitlines()
        except OSError as err:
            return [f"(no log: {err})"]

    def log_tail(self) -> str:
        """The last lines of the server's log, indented."""
        return "\n".join(f"    | {line[:300]}" for line in self._log()[-_LOG_LINES:])


def first_error(log: Sequence[str]) -> str:
    """The first error raised in an engine's log, in one line without folders; empty if none.

    The first and not the last: each process that hears of it raises an error of its own.
    """
    for number, line in enumerate(log):
        match = _RAISED.match(line)
        if match is None:
            continue
        found = match[1]
        if "validation error" in found:  # pydantic goes on for a field and a complaint
            rest = [re.sub(r"^\(\S+ pid=\d+\) ", "", more) for more in log[number + 1 :][:2]]
            found = " ".join([found, *map(str.strip, rest)])
        return re.sub(r"(?:/[\w.+-]+)+/(?=[\w.+-])", "", found)[:500]
    return ""


def stop_all(servers: Sequence[Server]) -> None:
    """End every server and all that it started; a second Ctrl-C meanwhile is ignored."""
    previous = _ignore_interrupts()
    try:
        for server in servers:
            server.ask_to_end()
        deadline = time.monotonic() + STOP_GRACE
        while time.monotonic() < deadline and any(server.alive() for server in servers):
            time.sleep(0.05)
        for server in servers:
            server.end()
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _ports(specs: Sequence[Spec]) -> list[int]:
    """A port for each server: the one asked for, or a free one; all different."""
    with contextlib.ExitStack() as probes:
        found = {}
        for spec in sorted(specs, key=lambda spec: not spec.port):  # those asked for first
            probe = probes.enter_context(socket.socket())
            # As the engine's own socket does, so that a port in TIME_WAIT counts as free.
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((spec.host, spec.port))
            except OSError as err:
                raise PortInUseError(
                    f"port {spec.port} on {spec.host} cannot be had: {err.strerror}",
                    hint="choose another --port, or leave it out",
                ) from err
            found[id(spec)] = int(probe.getsockname()[1])
        return [found[id(spec)] for spec in specs]


@lru_cache
def installed_at(python: Path, engine: str) -> engines.Installed:
    """The engine as another interpreter sees it.

    Raises:
        EnvironmentBuildError: it is not installed there.
    """
    command = [str(python), str(Path(engines.__file__)), engine]
    answer = subprocess.run(
        command, env=clean_environment(), capture_output=True, text=True, check=False
    )
    try:
        return engines.Installed(**json.loads(answer.stdout))
    except (ValueError, TypeError) as err:
        raise EnvironmentBuildError(
            f"{python}: no {engine} found there: {answer.stderr[-300:]}",
            hint="remove the environment and run again",
        ) from err


def clean_environment() -> dict[str, str]:
    """This process's environment without what would leak into an engine's.

    ``LD_PRELOAD`` is the harness's to set: another allocator would be in the timings.
    """
    dropped = (
        *("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "LD_PRELOAD"),
        *("DFLASH_PLUGIN_ANNOUNCED", "DFLASH_PLUGIN_ANNOUNCED_SGLANG", "DFLASH_RECORD"),
    )
    engines_own = ("VLLM_", "SGLANG_")
    return {
        k: v for k, v in os.environ.items() if k not in dropped and not k.startswith(engines_own)
    }


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


@contextlib.contextmanager
def interrupts_deferred() -> Iterator[None]:
    """Hold Ctrl-C back: between fork and return a process would be lost to its parent."""
    caught: list[int] = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    try:
        previous = {n: signal.signal(n, lambda n, _: caught.append(n)) for n in numbers}
    except ValueError:  # not the main thread, which gets no signals either
        yield
        return
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
    if caught:
        raise KeyboardInterrupt


def _ignore_interrupts() -> Mapping[int, signal._HANDLER]:
    try:
        return {n: signal.signal(n, signal.SIG_IGN) for n in (signal.SIGINT, signal.SIGTERM)}
    except ValueError:  # not the main thread, which gets no signals either
        return {}


if sys.platform == "win32":  # pragma: no cover
    raise ImportError("serving needs a POSIX system")
