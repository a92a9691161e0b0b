"""The ``image:`` environments that cells run in: an engine's server as a Docker container.

Bridge network, one port on the loopback address, models and recorder read-only, limits on
memory and cores, no capabilities. A container and its volumes are removed in every case; what a
killed harness left is removed by the next one.
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import json
import os
import shlex
import socket
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dflash_plugin.backends.process import Server, interrupts_deferred
from dflash_plugin.errors import (
    CacheError,
    ContainerKilledError,
    ContainerMemoryError,
    DFlashError,
    DockerUnavailableError,
    EnvironmentBuildError,
    ImageMissingError,
    MissingDependencyError,
    PortInUseError,
)

from .environment import Container
from .serve import RECORDER, ServerSpec, taps_beside

PORT = 8000
"""Where the engine listens inside, as the image says."""
TARGET, DRAFT, IN_RECORDER, IN_RECORD = (
    f"/dflash/{name}" for name in ("target", "draft", "recorder", "blocks.jsonl")
)
"""Where a container has what it is given."""
OWNER, CELL = "dflash.owner", "dflash.cell"
"""Labels of a container: the process that started it, and what it is for."""
SHARED_MEMORY = 1 << 30
"""Bytes of /dev/shm: engine processes hand tensors over there, and Docker's default is 64 MiB."""
PROCESSES = 4096
API_SECONDS = 120
OOM_SECONDS = 3
"""After a container's end, until the daemon has heard that it was for memory."""
_PASSED_ON = ("OMP_", "KMP_")
"""Variables of the harness that a container gets too: how threads are used."""
_SIGNALLED = 128


def connect() -> Any:
    """A client of the Docker daemon that the environment names (``DOCKER_HOST``), or the local one.

    Raises:
        MissingDependencyError: the package ``docker`` is not installed.
        DockerUnavailableError: no daemon answers.
    """
    docker = sdk()
    with errors("Docker"):
        client = docker.from_env(timeout=API_SECONDS)
        client.ping()
    return client


@contextlib.contextmanager
def errors(what: str) -> Iterator[None]:
    """Raise what the Docker SDK raises as errors of this project, about ``what``."""
    docker = sdk()
    requests = importlib.import_module("requests")
    try:
        yield
    except docker.errors.ImageNotFound as err:
        raise ImageMissingError(
            f"{what}: {said(err)}", hint="python -m ci images --build IMAGE, or --registry PREFIX"
        ) from err
    except docker.errors.APIError as err:
        raise refused(what, err) from err
    except (docker.errors.DockerException, requests.exceptions.RequestException, OSError) as err:
        raise DockerUnavailableError(
            f"{what}: no Docker daemon answers ({str(err)[:200]})",
            hint="start it (as root: images/engine.sh start), or run the cell without --env image",
        ) from err


def refused(what: str, err: Any) -> DFlashError:
    """The error for a daemon's refusal (an ``APIError``) of ``what``."""
    words = said(err)
    text = words.lower()
    if "no space left on device" in text:
        return CacheError(
            f"{what}: {words}",
            hint="docker system df shows what is kept, docker system prune frees",
        )
    if "port is already allocated" in text or "address already in use" in text:
        return PortInUseError(f"{what}: {words}", hint="choose another --port, or leave it out")
    if "could not select device driver" in text:
        return DockerUnavailableError(
            f"{what}: {words}", hint="a GPU in a container needs the NVIDIA container toolkit"
        )
    return DockerUnavailableError(f"{what}: {words}", hint="see the Docker daemon's log")


def said(err: Any) -> str:
    """The daemon's words, in one line."""
    return " ".join(str(getattr(err, "explanation", None) or err).split())[:500]


def sdk() -> Any:
    """The package ``docker``, or the error that says how to get it."""
    try:
        return importlib.import_module("docker")
    except ImportError as err:
        raise MissingDependencyError(
            "the package docker is needed to run a cell in a container",
            hint="pip install 'dflash-plugin[containers]'",
        ) from err


class ContainerServer(Server):
    """A server in a container, from :meth:`start` on."""

    def __init__(self, spec: ServerSpec, port: int, container: Container) -> None:
        super().__init__(spec, port)
        self._spec, self._given = spec, container
        self._client: Any = None
        self._container: Any = None
        self._follower: threading.Thread | None = None

    def start(self) -> None:
        """Create and start it; it is not ready yet."""
        self._client = self._client or connect()
        remove_orphans(self._client)
        if self._spec.record is not None:
            for path in (self._spec.record, taps_beside(self._spec.record)):
                path.touch()  # Docker would make a folder of it
        wanted = options(self._spec, self.port, self._given)
        self.begin_log(["docker", "run", self._given.image, shlex.join(wanted["command"])])
        with interrupts_deferred(), errors(f"{self.spec.label}: {self._given.image}"):
            self._container = self._client.containers.create(self._given.id, **wanted)
            self._container.start()
        self._follower = threading.Thread(target=self._follow, daemon=True)
        self._follower.start()

    def require_running(self) -> None:
        """Raise what ended the container, if it has ended.

        Raises:
            ContainerMemoryError: it needed more than it was given.
            ContainerKilledError: a signal that is not ours, or it was removed.
            EngineExitedError: the engine ended by itself.
        """
        if self._container is None:
            return
        state = self._state()
        if state is None:
            raise ContainerKilledError(
                f"{self.spec.label}: the container was removed from outside\n{self.log_tail()}",
                hint=f"see {self.spec.log}, and run the cell again",
            )
        if state["Status"] not in ("exited", "dead"):
            return
        self._wait_for_log()
        code = int(state["ExitCode"])
        if self._ran_out_of_memory(state):
            raise ContainerMemoryError(
                f"{self.spec.label}: out of memory: the container was given "
                f"{self._given.memory / (1 << 30):.1f} GiB\n{self.log_tail()}",
                hint="--memory GIB gives each container more",
            )
        if code > _SIGNALLED:
            raise ContainerKilledError(
                f"{self.spec.label}: the container was killed by signal {code - _SIGNALLED} "
                f"from outside\n{self.log_tail()}",
                hint=f"see {self.spec.log}, and the system's log for its out-of-memory killer",
            )
        raise self.exited(code)

    def ask_to_end(self) -> None:
        """Send SIGTERM; returns at once."""
        with contextlib.suppress(Exception):  # it may have ended, or the daemon
            if self._container is not None:
                self._container.kill("SIGTERM")

    def alive(self) -> bool:
        """Whether it still runs."""
        with contextlib.suppress(DFlashError):
            state = self._state()
            return state is not None and state["Status"] not in ("exited", "dead", "created")
        return False

    def end(self) -> None:
        """Remove it with its volumes, running or not."""
        if self._container is not None:
            _remove(self._container)
            self._wait_for_log()
        if self._client is not None:
            self._client.close()

    def _state(self) -> Mapping[str, Any] | None:
        """What the daemon says of it; None: there is none."""
        if self._container is None:
            return None
        docker = sdk()
        with errors(self.spec.label):
            try:
                self._container.reload()
            except docker.errors.NotFound:
                return None
        state: Mapping[str, Any] = self._container.attrs["State"]
        return state

    def _ran_out_of_memory(self, state: Mapping[str, Any]) -> bool:
        """Whether the kernel ended it, or a process of it, for memory.

        The daemon may tell of the end before it hears of the reason, and older ones then never
        correct the state; their events have it a moment later.
        """
        if state.get("OOMKilled") or not int(state["ExitCode"]):
            return bool(state.get("OOMKilled"))
        began, ended = (_epoch(state.get(name, "")) for name in ("StartedAt", "FinishedAt"))
        if began is None or ended is None:
            return False
        wanted = {"container": self._container.id, "event": "oom"}
        with errors(self.spec.label):  # waits, where `until` is yet to come
            told = self._client.events(
                since=int(began), until=int(ended) + OOM_SECONDS, filters=wanted, decode=True
            )
            return any(True for _ in told)

    def _follow(self) -> None:
        """Write what it prints to the log, until it ends."""
        # The stream breaks when the container goes or the daemon does: no news, both are seen.
        with contextlib.suppress(Exception), self.spec.log.open("ab", buffering=0) as log:
            for chunk in self._container.logs(stream=True, follow=True):
                log.write(chunk)

    def _wait_for_log(self) -> None:
        if self._follower is not None:
            self._follower.join(5)


def _epoch(told: str) -> float | None:
    """Seconds since 1970 of a daemon's time, to the second; None: no time, or that of nothing."""
    try:
        found = datetime.datetime.fromisoformat(told[:19]).replace(tzinfo=datetime.timezone.utc)
    except ValueError:
        return None
    return found.timestamp() if found.year > 1 else None


def options(spec: ServerSpec, port: int, given: Container) -> dict[str, Any]:
    """The arguments of ``containers.create`` for a server on ``port`` of this machine."""
    types = importlib.import_module("docker.types")
    target, target_mount = _model(spec.target, TARGET)
    mounts = [target_mount]
    draft = ""
    if spec.draft is not None:
        draft, draft_mount = _model(spec.draft, DRAFT)
        mounts.append(draft_mount)
    if spec.record is not None:
        mounts.append((RECORDER, IN_RECORDER, True))
        record = spec.record.absolute()
        mounts.append((record, IN_RECORD, False))
        mounts.append((taps_beside(record), str(taps_beside(Path(IN_RECORD))), False))
    # The entry point is the image's: `vllm serve` takes the model without a name.
    named = {"vllm": [] if given.gpu else ["--model"], "sglang": ["--model-path"]}
    model = [*named[spec.engine_name], target]
    threads = {k: v for k, v in os.environ.items() if k.startswith(_PASSED_ON)}
    gpus = [types.DeviceRequest(count=-1, capabilities=[["gpu"]])] if given.gpu else None
    return {
        "command": [*model, *spec.arguments("0.0.0.0", PORT, draft)],
        "environment": {**threads, **spec.variables(IN_RECORDER, IN_RECORD)},
        "name": _name(spec),
        # Who runs the harness can read the models; group 0 is what the image's folders are for.
        "user": f"{os.getuid()}:0",
        "labels": {OWNER: owner(os.getpid()), CELL: spec.cell.id},
        "mounts": [
            types.Mount(inside, str(outside), type="bind", read_only=read_only)
            for outside, inside, read_only in mounts
        ],
        "ports": {f"{PORT}/tcp": (spec.host, port)},
        "mem_limit": given.memory,
        "memswap_limit": given.memory,
        "nano_cpus": int(given.cpus * 1e9),
        "pids_limit": PROCESSES,
        "shm_size": SHARED_MEMORY,
        "cap_drop": ["ALL"],
        "security_opt": ["no-new-privileges"],
        "device_requests": gpus,
    }


def _model(folder: Path, inside: str) -> tuple[str, tuple[Path, str, bool]]:
    """A model folder's path in the container, and the mount that makes it so.

    A hub's snapshot is a folder of links to files beside it: the folder above both is mounted.
    """
    folder = folder.resolve()
    files = [path.resolve() for path in folder.iterdir()]
    root = Path(os.path.commonpath([folder, *files]))
    seen = Path(inside, folder.relative_to(root))
    return str(seen), (root, inside, True)


def _name(spec: ServerSpec) -> str:
    mode = "dflash" if spec.drafting else "base"
    return f"dflash-{spec.cell.id.replace('/', '.')}-{mode}-{spec.dtype}-{os.getpid()}"


def owner(pid: int) -> str:
    """The label of containers that process ``pid`` of this machine started."""
    return f"{socket.gethostname()}:{pid}"


def remove_orphans(client: Any) -> None:
    """Remove the containers whose harness is gone without having removed them."""
    host = owner(0).removesuffix("0")
    with errors("Docker"):
        for container in client.containers.list(
            all=True, filters={"label": OWNER}, ignore_removed=True
        ):
            name = container.labels.get(OWNER, "")
            pid = name.removeprefix(host)
            if name.startswith(host) and pid.isdigit() and not _runs(int(pid)):
                _remove(container)


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:  # another user's
        return True
    return True


def _remove(container: Any) -> None:
    docker = sdk()
    with errors("removing a container"), contextlib.suppress(docker.errors.NotFound):
        container.remove(force=True, v=True)


def packages(client: Any, image_id: str, names: tuple[str, ...]) -> dict[str, str]:
    """The versions of Python and of ``names`` inside an image; what is not there is left out."""
    code = (
        "import importlib.metadata as m, json, platform, sys\n"
        "have = {d.metadata['Name'].lower(): d.version for d in m.distributions()}\n"
        "have['python'] = platform.python_version()\n"
        "print(json.dumps({n: have[n] for n in ('python', *sys.argv[1:]) if n in have}))"
    )
    answer = output(client, image_id, "-c", code, *names)
    found: dict[str, str] = json.loads(answer.splitlines()[-1])
    return found


def output(client: Any, image: str, *args: str) -> str:
    """What an image's python3 prints, without a network; its container is removed.

    Raises:
        EnvironmentBuildError: it failed.
    """
    what = f"looking into {image[:60]}"
    with errors(what):
        container = client.containers.create(
            image,
            list(args),
            entrypoint="python3",
            network_mode="none",
            labels={OWNER: owner(os.getpid())},
        )
    try:
        with errors(what):
            container.start()
            code = container.wait()["StatusCode"]
            said = [container.logs(stdout=out, stderr=not out) for out in (True, False)]
    finally:
        _remove(container)
    text, complaint = (str(part, errors="replace") for part in said)
    if code:
        raise EnvironmentBuildError(
            f"{what}: its python3 ended with exit code {code}: {complaint[-300:]}",
            hint="is it an image of this project? python -m ci images lists them",
        )
    return text
