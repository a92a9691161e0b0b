"""The servers of a benchmark that starts them itself: one engine, one set of arguments."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import engines, launch
from ..backends import process
from ..errors import EngineExitedError, UsageError
from .plan import BASE, DFLASH, Arm
from .sides import ServerSide

PEERS: Mapping[str, Mapping[str, Any]] = {
    # vLLM's names; further peers are given as JSON.
    "ngram": {"method": "ngram", "prompt_lookup_max": 4, "prompt_lookup_min": 2},
    "suffix": {"method": "suffix"},
}


@dataclass(frozen=True)
class ArmServer:
    """One arm's server; see :class:`dflash_plugin.backends.process.Spec`."""

    arm: Arm
    engine: engines.Installed
    python: str
    target: str
    args: tuple[str, ...]
    log: Path
    host: str = "127.0.0.1"
    port: int = 0

    @property
    def label(self) -> str:
        """For messages."""
        return f"arm {self.arm.name}"

    @property
    def engine_name(self) -> str:
        """Which engine it is."""
        return self.engine.name

    @property
    def drafting(self) -> bool:
        """Whether it speculates."""
        return self.arm.speculation is not None

    def command(self, port: int) -> tuple[list[str], dict[str, str]]:
        """Command line and environment."""
        shared, more = process.SHARED[self.engine_name]
        args = ["--served-model-name", process.MODEL_NAME, "--host", self.host]
        args += ["--port", str(port), *shared, *self.args, *self._speculation()]
        command, env = engines.serve_command(self.python, self.engine, self.target, args)
        merged = launch.environment({**more, **env})
        for name in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV", "DFLASH_PLUGIN_ANNOUNCED"):
            merged.pop(name, None)
        return command, merged

    def _speculation(self) -> list[str]:
        config = self.arm.speculation
        if config is None:
            return []
        if self.engine_name == "vllm":
            return ["--speculative-config", json.dumps(dict(config))]
        return engines.speculation(
            self.engine_name,
            config["model"],
            config["num_speculative_tokens"],
            config.get("revision"),
        )


@dataclass(frozen=True)
class Starter:
    """How arms are started: the engine of one environment, one target, one set of arguments."""

    engine: engines.Installed
    python: str
    target: str
    args: tuple[str, ...]
    logs: Path
    ready_timeout: float
    timeout: float
    stall: float

    @contextlib.contextmanager
    def running(
        self, arms: Sequence[Arm]
    ) -> Iterator[tuple[dict[str, ServerSide], dict[str, str]]]:
        """Start the servers of ``arms``, and stop them in every case.

        Yields the sides by name, and of peers that did not start the reason.

        Raises:
            EngineExitedError, EngineTimeoutError: of ``base`` or DFlash.
        """
        sides: dict[str, ServerSide] = {}
        not_run: dict[str, str] = {}
        with contextlib.ExitStack() as stack:
            needed = [arm for arm in arms if is_needed(arm)]
            groups = [needed, *([arm] for arm in arms if arm not in needed)]
            for group in filter(None, groups):
                specs = [self._spec(arm) for arm in group]
                try:
                    clients = stack.enter_context(
                        process.serve_all(specs, timeout=self.ready_timeout)
                    )
                except EngineExitedError as err:
                    if group is needed:
                        raise
                    not_run[group[0].name] = err.cause or err.message.splitlines()[0]
                    continue
                for arm, client in zip(group, clients, strict=True):
                    sides[arm.name] = ServerSide(
                        client.base_url, client.model, timeout=self.timeout, stall=self.stall,
                        engine=self.engine.name,
                    )  # fmt: skip
            yield sides, not_run

    def _spec(self, arm: Arm) -> ArmServer:
        log = (self.logs / arm.name / "server.log").absolute()
        return ArmServer(arm, self.engine, self.python, self.target, self.args, log)


def is_needed(arm: Arm) -> bool:
    """Whether a benchmark makes no sense without it; a peer may be missing."""
    return arm.name == BASE or arm.name.startswith(DFLASH)


def find_engine(name: str, python: str) -> engines.Installed:
    """The engine of an interpreter's environment, supported or not (base needs no support).

    Raises:
        EngineNotFoundError, UnsupportedEngineError: of this environment.
        EnvironmentBuildError: of another interpreter's.
    """
    if python == sys.executable:
        return launch.require_engine(name)[0]
    return process.installed_at(Path(python), name)


def plugin_version(python: str) -> str | None:
    """This package's version in the engine's environment; None: the engine is as published."""
    code = "from importlib.metadata import version; print(version('dflash-plugin'))"
    told = subprocess.run(
        [python, "-I", "-c", code], capture_output=True, text=True, check=False
    )  # fmt: skip
    return told.stdout.strip() or None


def dflash_arm(resolved: launch.ResolvedPair, k: int, name: str = DFLASH) -> Arm:
    """DFlash with K drafted tokens."""
    config = engines.speculative_config(resolved.draft, k, resolved.draft_revision)
    return Arm(name, k, json.loads(config))


def peer_arm(spec: str, k: int, engine: str = "vllm") -> Arm:
    """A peer of ``NAME`` (see :data:`PEERS`) or ``NAME={…}`` with vLLM's own configuration.

    Raises:
        UsageError: an unknown name, not JSON, or an engine that takes no such configuration.
    """
    if engine != "vllm":
        raise UsageError(
            f"--peer {spec}: peers are started with vLLM, not with {engine}",
            hint="start it yourself, and measure with --base-url, --baseline-url and NAME=URL",
        )
    name, equals, config = spec.partition("=")
    if not equals:
        if name not in PEERS:
            raise UsageError(
                f"--peer {name}: unknown",
                hint=f"one of {', '.join(PEERS)}, or NAME={{…}} with the engine's configuration",
            )
        config = json.dumps(PEERS[name])
    if name == BASE or name.startswith(DFLASH):
        raise UsageError(f"--peer {name}: that name is taken", hint="choose another")
    try:
        parsed = json.loads(config)
        assert isinstance(parsed, dict)
    except (ValueError, AssertionError) as err:
        raise UsageError(
            f"--peer {name}: not a JSON object: {config[:80]}", hint='NAME={"method": …}'
        ) from err
    tokens = int(parsed.setdefault("num_speculative_tokens", k))
    return Arm(name, tokens, parsed)
