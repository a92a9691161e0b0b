"""Containers without a daemon: what is asked of Docker, and what its answers mean."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import docker.errors
import pytest
import requests
from ci_fake import PLUGIN, Fake, fake_fixture, pythons_fixture  # noqa: F401  # fixtures

from ci import __main__ as ci_main
from ci import containers, image_build, pipeline
from ci.environment import Container, Environment, Wanted
from ci.records import ABORTED, CellResult
from ci.report import save
from ci.serve import ServerSpec, serve_all
from dflash_plugin.backends import process
from dflash_plugin.errors import (
    CacheError,
    ContainerKilledError,
    ContainerMemoryError,
    DFlashError,
    DockerUnavailableError,
    EngineExitedError,
    EnvironmentBuildError,
    ImageMissingError,
    MissingDependencyError,
    PortInUseError,
    UsageError,
)

GIVEN = Container("image:tag", "sha256:1234", 4 << 30, 2.0, gpu=False)
RUNNING = {"Status": "running", "ExitCode": 0, "OOMKilled": False}


class FakeContainer:
    """One that a fake daemon keeps; ``states`` are told one after the other, the last for ever."""

    id = "c0ffee"

    def __init__(self, daemon: FakeDaemon, wanted: dict[str, Any]) -> None:
        self.daemon, self.wanted = daemon, wanted
        self.labels = wanted["labels"]
        self.attrs: dict[str, Any] = {}
        self.signals: list[str] = []

    def start(self) -> None:
        if self.daemon.refuses_start:
            raise self.daemon.refuses_start

    def reload(self) -> None:
        states = self.daemon.states
        state = states.pop(0) if len(states) > 1 else states[0]
        if isinstance(state, Exception):
            raise state
        self.attrs["State"] = state

    def logs(self, *, stream: bool = False, **_: Any) -> Iterator[bytes] | bytes:
        return iter(self.daemon.output) if stream else b"".join(self.daemon.output)

    def wait(self) -> dict[str, int]:
        return {"StatusCode": self.daemon.code}

    def kill(self, signal: str) -> None:
        self.signals.append(signal)
        self.daemon.states = [{**RUNNING, "Status": "exited"}]

    def remove(self, *, force: bool, v: bool) -> None:
        assert force and v  # its anonymous volumes go with it
        self.daemon.kept.remove(self)


class FakeDaemon:
    """Docker, as far as the harness uses it."""

    def __init__(self) -> None:
        self.kept: list[FakeContainer] = []
        self.made: list[FakeContainer] = []
        self.states: list[Any] = [RUNNING]
        self.output = [b"fake engine: a line\n"]
        self.code = 0
        self.refuses: Exception | None = None
        self.refuses_start: Exception | None = None
        self.containers = self
        self.events_told: list[dict[str, Any]] = []
        self.asked_events: list[dict[str, Any]] = []

    def create(self, image: str, *_: Any, **wanted: Any) -> FakeContainer:
        if self.refuses:
            raise self.refuses
        self.kept.append(FakeContainer(self, wanted))
        self.made.append(self.kept[-1])
        return self.kept[-1]

    def list(self, **_: Any) -> list[FakeContainer]:
        return list(self.kept)

    def events(self, **wanted: Any) -> Iterator[dict[str, Any]]:
        self.asked_events.append(wanted)
        return iter(self.events_told)

    def close(self) -> None:
        pass


@pytest.fixture(name="daemon")
def daemon_fixture(monkeypatch: pytest.MonkeyPatch) -> FakeDaemon:
    daemon = FakeDaemon()
    monkeypatch.setattr(containers, "connect", lambda: daemon)
    monkeypatch.setattr(process, "STOP_GRACE", 0.2)
    return daemon


@pytest.fixture(name="spec")
def spec_fixture(fake: Fake) -> Callable[..., ServerSpec]:
    def make(given: Container = GIVEN, **changes: Any) -> ServerSpec:
        environment = Environment(
            "image", Path("python3"), "vllm-0.32.0", True, {}, Path(given.id), given
        )
        values: dict[str, Any] = {
            "cell": fake.cell(PLUGIN),
            "environment": environment,
            "target": fake.model(),
            "draft": fake.model(half="draft"),
            "num_speculative_tokens": 4,
            "dtype": "float32",
            "log": fake.folder / "logs" / "server.log",
            "record": fake.folder / "blocks.jsonl",
            **changes,
        }
        return ServerSpec(**values)

    return make


def api_error(words: str, kind: type[docker.errors.APIError] = docker.errors.APIError) -> Exception:
    return kind("500 Server Error", explanation=words)


# --- what is asked for ---------------------------------------------------------------------


def test_models_are_read_only_and_limits_are_set(spec: Any, fake: Fake) -> None:
    asked = containers.options(spec(), 4321, GIVEN)
    mounts = {m["Target"]: (m["Source"], m["ReadOnly"]) for m in asked["mounts"]}
    assert mounts[containers.TARGET] == (str(fake.model()), True)
    assert mounts[containers.DRAFT] == (str(fake.model(half="draft")), True)
    assert mounts[containers.IN_RECORDER][1] is True
    assert mounts[containers.IN_RECORD] == (str(fake.folder / "blocks.jsonl"), False)
    taps = (str(fake.folder / "blocks.jsonl.taps"), False)
    assert mounts[containers.IN_RECORD + ".taps"] == taps
    assert asked["ports"] == {"8000/tcp": ("127.0.0.1", 4321)}
    assert "network_mode" not in asked
    assert asked["mem_limit"] == asked["memswap_limit"] == 4 << 30
    assert asked["nano_cpus"] == 2 * 10**9
    assert asked["cap_drop"] == ["ALL"]
    assert asked["user"] == f"{os.getuid()}:0"  # who can read the models and write the record
    assert asked["device_requests"] is None
    assert asked["labels"][containers.CELL] == PLUGIN
    command = asked["command"]
    assert command[:2] == ["--model", containers.TARGET]
    assert command[command.index("--host") + 1] == "0.0.0.0"
    assert command[command.index("--port") + 1] == "8000"
    config = json.loads(command[command.index("--speculative-config") + 1])
    assert config["model"] == containers.DRAFT


def test_only_what_the_cell_says_is_in_its_environment(
    spec: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.setenv("VLLM_OTHER", "1")
    assert containers.options(spec(), 1, GIVEN)["environment"] == {
        "OMP_NUM_THREADS": "3",
        **{k: v for k, v in os.environ.items() if k.startswith(("OMP_", "KMP_"))},
        "VLLM_OF_THE_MATRIX": "1",
        "HF_HUB_OFFLINE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "PYTHONPATH": containers.IN_RECORDER,
        "DFLASH_RECORD": containers.IN_RECORD,
        "VLLM_PLUGINS": "dflash,dflash_recorder",
    }


def test_a_server_without_a_draft_has_none_mounted(spec: Any) -> None:
    asked = containers.options(spec(draft=None, record=None), 1, GIVEN)
    assert [m["Target"] for m in asked["mounts"]] == [containers.TARGET]
    assert "--speculative-config" not in asked["command"]
    assert "DFLASH_RECORD" not in asked["environment"]


def test_a_gpu_is_passed_on(spec: Any) -> None:
    given = Container("image:tag", "sha256:1", 1 << 30, 1.0, gpu=True)
    asked = containers.options(spec(given), 1, given)
    assert asked["device_requests"] == [{"Driver": "", "Count": -1, "DeviceIDs": [],
                                         "Capabilities": [["gpu"]], "Options": {}}]  # fmt: skip
    assert asked["command"][0] == containers.TARGET  # after the image's own `vllm serve`


def test_a_hub_snapshots_links_can_be_followed_inside(spec: Any, tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "repo" / "blobs", tmp_path / "repo" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (blobs / "1").write_text("{}")
    (snapshot / "config.json").symlink_to("../../blobs/1")
    asked = containers.options(spec(target=snapshot), 1, GIVEN)
    assert asked["mounts"][0]["Source"] == str(tmp_path / "repo")
    assert asked["command"][1] == f"{containers.TARGET}/snapshots/abc"


# --- how it ends ---------------------------------------------------------------------------


def start(spec: ServerSpec) -> None:
    with serve_all([spec], timeout=60):
        pytest.fail("ready")


def test_a_container_is_removed_and_its_log_kept(spec: Any, daemon: FakeDaemon) -> None:
    daemon.states = [RUNNING, {**RUNNING, "Status": "exited", "ExitCode": 3}]
    made = spec()
    with pytest.raises(EngineExitedError, match="exited with code 3") as caught:
        start(made)
    assert caught.value.drafting
    assert made.log.read_text().endswith("fake engine: a line\n")
    assert "| fake engine: a line" in caught.value.message
    assert len(daemon.made) == 1
    assert daemon.kept == []


@pytest.mark.parametrize(
    ("state", "error", "words", "code"),
    [
        (
            {"Status": "exited", "ExitCode": 137, "OOMKilled": True},
            ContainerMemoryError, "out of memory: the container was given 4.0 GiB", 62,
        ),
        # A process of the engine was ended for memory, and the engine said so itself.
        (
            {"Status": "exited", "ExitCode": 1, "OOMKilled": True},
            ContainerMemoryError, "out of memory", 62,
        ),
        (
            {"Status": "exited", "ExitCode": 137, "OOMKilled": False},
            ContainerKilledError, "killed by signal 9 from outside", 63,
        ),
        (
            {"Status": "dead", "ExitCode": 143, "OOMKilled": False},
            ContainerKilledError, "killed by signal 15 from outside", 63,
        ),
        (docker.errors.NotFound("gone"), ContainerKilledError, "removed from outside", 63),
        (
            requests.exceptions.ConnectionError("refused"),
            DockerUnavailableError, "no Docker daemon answers", 60,
        ),
    ],
)  # fmt: skip
def test_each_end_is_told_apart(
    spec: Any, daemon: FakeDaemon, *, state: Any, error: type[DFlashError], words: str, code: int
) -> None:
    daemon.states = [RUNNING, state]
    with pytest.raises(error, match=words) as caught:
        start(spec())
    assert caught.value.exit_code == code
    assert caught.value.hint
    assert daemon.kept == []


TIMES = {"StartedAt": "2026-01-02T03:04:05.678901234Z", "FinishedAt": "2026-01-02T03:05:06.7Z"}
BEGAN = 1767323045


@pytest.mark.parametrize("code", [137, 1])
@pytest.mark.parametrize("told", [[{"Action": "oom"}], []])
def test_a_daemon_that_hears_of_the_memory_killer_too_late(
    spec: Any, daemon: FakeDaemon, *, code: int, told: list[dict[str, Any]]
) -> None:
    daemon.states = [
        RUNNING, {"Status": "exited", "ExitCode": code, "OOMKilled": False, **TIMES},
    ]  # fmt: skip
    daemon.events_told = told
    others = {137: ContainerKilledError, 1: EngineExitedError}
    with pytest.raises(ContainerMemoryError if told else others[code]):
        start(spec())
    assert daemon.asked_events == [
        {
            "since": BEGAN,
            "until": BEGAN + 61 + containers.OOM_SECONDS,
            "filters": {"container": "c0ffee", "event": "oom"},
            "decode": True,
        }
    ]


@pytest.mark.parametrize("finished", ["", "0001-01-01T00:00:00Z", "soon"])
def test_a_daemon_that_does_not_say_when_it_ended(
    spec: Any, daemon: FakeDaemon, finished: str
) -> None:
    state = {"Status": "exited", "ExitCode": 137, "OOMKilled": False, **TIMES}
    daemon.states = [RUNNING, {**state, "FinishedAt": finished}]
    with pytest.raises(ContainerKilledError):
        start(spec())
    assert daemon.asked_events == []


def test_a_server_that_ended_by_itself_is_not_asked_about_memory(
    spec: Any, daemon: FakeDaemon
) -> None:
    daemon.states = [RUNNING, {"Status": "exited", "ExitCode": 0, "OOMKilled": False, **TIMES}]
    with pytest.raises(EngineExitedError):
        start(spec())
    assert daemon.asked_events == []


@pytest.mark.parametrize(
    ("refusal", "error", "words"),
    [
        (api_error("write /var/lib/x: no space left on device"), CacheError, "no space left"),
        (
            api_error("Bind for 127.0.0.1:80 failed: port is already allocated"),
            PortInUseError, "port is already allocated",
        ),
        (
            api_error("could not select device driver \"\" with capabilities: [[gpu]]"),
            DockerUnavailableError, "could not select device driver",
        ),
        (api_error("cgroups: cannot find"), DockerUnavailableError, "cgroups: cannot find"),
        (
            api_error("No such image: image:tag", docker.errors.ImageNotFound),
            ImageMissingError, "No such image: image:tag",
        ),
    ],
)  # fmt: skip
@pytest.mark.parametrize("when", ["refuses", "refuses_start"])
def test_each_refusal_is_told_apart(
    spec: Any,
    daemon: FakeDaemon,
    *,
    when: str,
    refusal: Exception,
    error: type[DFlashError],
    words: str,
) -> None:
    setattr(daemon, when, refusal)
    with pytest.raises(error, match=words) as caught:
        start(spec())
    assert PLUGIN in caught.value.message
    assert caught.value.hint
    assert daemon.kept == []  # also where it was created, and not started


def test_what_is_in_an_image(daemon: FakeDaemon) -> None:
    daemon.output = [b'{"torch": "2.13.0"}\n']
    assert containers.packages(daemon, "sha256:1234", ("torch",)) == {"torch": "2.13.0"}
    assert daemon.made[0].wanted["network_mode"] == "none"
    assert daemon.kept == []


def test_an_image_without_python_is_no_environment(daemon: FakeDaemon) -> None:
    daemon.output, daemon.code = [b"python3: not found"], 127
    with pytest.raises(EnvironmentBuildError, match="exit code 127: python3: not found"):
        containers.packages(daemon, "sha256:1234", ("torch",))
    assert daemon.kept == []


def test_no_daemon(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("DOCKER_HOST", f"unix://{tmp_path}/none.sock")
    with pytest.raises(DockerUnavailableError, match="no Docker daemon answers") as caught:
        containers.connect()
    assert "engine.sh start" in caught.value.hint


def test_no_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "docker", None)
    with pytest.raises(MissingDependencyError, match="the package docker"):
        containers.connect()


def test_a_living_harness_keeps_its_containers(daemon: FakeDaemon) -> None:
    for label in (containers.owner(os.getpid()), "elsewhere:1", "no number", ""):
        daemon.create("x", labels={containers.OWNER: label})
    gone = next(pid for pid in range(2**22, 1, -1) if not Path("/proc", str(pid)).exists())
    daemon.create("x", labels={containers.OWNER: containers.owner(gone)})
    containers.remove_orphans(daemon)
    assert [c.labels[containers.OWNER] for c in daemon.kept] == [
        containers.owner(os.getpid()), "elsewhere:1", "no number", "",
    ]  # fmt: skip


# --- a cell --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "error",
    [
        ContainerMemoryError("too little"),
        ContainerKilledError("killed"),
        ImageMissingError("no image"),
        DockerUnavailableError("no daemon"),
        CacheError("no space"),
        PortInUseError("taken"),
    ],
)
def test_it_is_the_outcome_of_the_cell(
    fake: Fake, monkeypatch: pytest.MonkeyPatch, error: DFlashError
) -> None:
    """Aborted, with its reason: none of these is a finding about the draft."""

    def fails(*_: Any) -> None:
        raise error

    monkeypatch.setattr(image_build, "ensure", fails)
    args = ["run", "--matrix", fake.matrix, "--out", fake.out, "--env", "image", PLUGIN]
    assert ci_main.main([str(arg) for arg in args]) == error.exit_code
    row = fake.report()[0]
    assert row["environment"] == {"kind": "image"}  # so it is saved as one of a container
    assert row["status"] == ABORTED
    assert error.message in row["reason"]
    assert row["serves"]["status"] == "not_run"


def test_limits_reach_the_container(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Wanted] = []
    stop = ImageMissingError("enough seen")

    def ensure(_: Any, wanted: Wanted) -> None:
        asked.append(wanted)
        raise stop

    monkeypatch.setattr(image_build, "ensure", ensure)
    common = ["run", "--matrix", str(fake.matrix), "--out", str(fake.out), "--env", "image"]
    ci_main.main([*common, "--memory", "2.5", "--cpus", "3", "--registry", "ghcr.io/x/", PLUGIN])
    ci_main.main([*common, PLUGIN])
    assert asked[0] == Wanted("ghcr.io/x/", int(2.5 * (1 << 30)), 3.0)
    assert asked[1].registry == ""
    assert asked[1].memory > 0 and asked[1].cpus == os.cpu_count()


@pytest.mark.parametrize(
    "args",
    [
        ["--memory", "4"],
        ["--registry", "ghcr.io/x/"],
        ["--env", "image", "--env-python", "vllm-0.32.0=/bin/sh"],
    ],
)
def test_wrong_usage(fake: Fake, args: list[str]) -> None:
    assert ci_main.main(["plan", "--matrix", str(fake.matrix), *args]) == UsageError.exit_code


@pytest.mark.parametrize("args", [["--memory", "0"], ["--cpus", "inf"], ["--cpus", "x"]])
def test_limits_are_positive(fake: Fake, args: list[str]) -> None:
    with pytest.raises(SystemExit):
        ci_main.main(["plan", "--matrix", str(fake.matrix), "--env", "image", *args])


def test_a_result_does_not_overwrite_that_of_the_other_kind(tmp_path: Path) -> None:
    cell = "vllm-0.32.0/plugin/cpu/tiny-qwen3"
    results = [
        CellResult(cell, "passed", "", environment={"kind": kind}) for kind in ("venv", "image")
    ]
    names = [path.name for path in save(results, tmp_path)]
    assert names == ["plugin.cpu.tiny-qwen3.json", "plugin.cpu.tiny-qwen3.image.json"]


def test_a_result_says_which_image_it_is_of(fake: Fake) -> None:
    environment = Environment(
        "image", Path("python3"), "vllm-0.32.0", True, {}, Path(GIVEN.id), GIVEN
    )
    reference = Environment("venv", Path("python"), "reference", False, {}, Path("reference"))
    run = SimpleNamespace(environment=environment, reference=reference)
    facts = pipeline._facts(run)  # type: ignore[arg-type]
    assert facts["kind"] == "image"
    assert facts["container"]["image"] == "image:tag"
    assert facts["container"]["id"] == "sha256:1234"
