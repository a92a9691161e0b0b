"""The real engine server as a child process: ready, exited or timed out; always stopped."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from dflash_plugin import engines
from dflash_plugin.backends import process
from dflash_plugin.backends.process import (
    MODEL_NAME,
    READY_TIMEOUT,
    SHARED,
    Server,
    clean_environment,
    installed_at,
)
from dflash_plugin.backends.server import ServerClient
from dflash_plugin.matrix import Cell

from .environment import Environment

__all__ = [
    "MODEL_NAME",
    "READY_TIMEOUT",
    "RECORDER",
    "ServerSpec",
    "installed",
    "serve",
    "serve_all",
    "taps_beside",
]

RECORDER = Path(__file__).parent / "recorder"


def taps_beside(record: Path) -> Path:
    """Where the recorder of drafted blocks writes the taps of the first prompts."""
    return record.with_name(record.name + ".taps")


@dataclass(frozen=True)
class _Options:
    """What an engine calls the things that every server here is started with.

    ``plugins``: this package's entry points, which repair a running engine; ``cpu_plugins``:
    those that add a platform, without which a patched engine does not run either. ``allowed``:
    the variable that names the plugins to load, and ``nothing`` its value for none.
    """

    length: str
    sequences: str
    eager: str
    always: tuple[str, ...]
    env: Mapping[str, str]
    cpu_env: Mapping[str, str]
    plugins: tuple[str, ...]
    cpu_plugins: tuple[str, ...]
    allowed: str
    nothing: str


_VLLM = _Options(
    length="--max-model-len",
    sequences="--max-num-seqs",
    eager="--enforce-eager",
    always=(),
    env={"VLLM_NO_USAGE_STATS": "1"},
    cpu_env={},
    plugins=("dflash",),
    cpu_plugins=(),
    allowed="VLLM_PLUGINS",
    nothing="",
)
_SGLANG = _Options(
    length="--context-length",
    sequences="--max-running-requests",
    eager="--disable-cuda-graph",
    always=("--enable-metrics", *SHARED["sglang"][0]),
    env=SHARED["sglang"][1],
    # Also where there is a GPU: the cell is the CPU's.
    cpu_env={"SGLANG_PLATFORM": "dflash_cpu"},
    plugins=("dflash",),
    cpu_plugins=("dflash_cpu",),
    allowed="SGLANG_PLUGINS",
    nothing="none",  # an empty list allows everything
)


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
    extra_args: tuple[str, ...] = ()

    @property
    def drafting(self) -> bool:
        """Whether it serves with a draft."""
        return self.draft is not None

    @property
    def engine_name(self) -> str:
        """Which engine it is."""
        return self.cell.engine.name

    @property
    def label(self) -> str:
        """For messages: cell, what is served, dtype."""
        mode = "dflash" if self.draft else "base"
        return f"{self.cell.id} ({mode}, {self.dtype})"

    def command(self, port: int) -> tuple[list[str], dict[str, str]]:
        """Command line and environment of the server."""
        args = self.arguments(self.host, port, str(self.draft))
        engine = installed(self.environment, self.engine_name)
        command, extra = engines.serve_command(
            str(self.environment.python), engine, str(self.target), args
        )
        record = str(self.record.absolute()) if self.record else ""
        return command, {**clean_environment(), **extra, **self.variables(str(RECORDER), record)}

    def arguments(self, host: str, port: int, draft: str) -> list[str]:
        """The engine's own arguments, but for the target.

        Args:
            host, port: where it listens.
            draft: the draft's folder as the engine sees it, for a server with one.
        """
        options = self._options
        args = [
            *("--served-model-name", MODEL_NAME, "--host", host, "--port", str(port)),
            *("--dtype", self.dtype, options.length, str(self.max_model_len)),
            *(options.sequences, str(self.max_num_seqs), *options.always),
            *self.cell.build.args,
            *self.extra_args,
        ]
        if self.eager:
            args.append(options.eager)
        if self.drafting:
            args += engines.speculation(self.engine_name, draft, self.num_speculative_tokens)
        return args

    def variables(self, recorder: str, record: str) -> dict[str, str]:
        """What the engine's environment has to say.

        Args:
            recorder, record: folder of the recorder and its file, as the engine sees them.
        """
        options, variant = self._options, self.cell.variant
        env = {
            **self.cell.build.env,
            # Nothing here needs a hub; a look-up would only wait for a time-out.
            "HF_HUB_OFFLINE": "1",
            **options.env,
        }
        plugins = list(options.plugins) if variant.plugin else []
        if self.cell.platform == "cpu" and (variant.plugin or variant.patches is not None):
            env |= options.cpu_env
            plugins += options.cpu_plugins
        if self.record is not None:
            env["PYTHONPATH"] = recorder
            env["DFLASH_RECORD"] = record
            plugins.append("dflash_recorder")
        # Named, so that a cell runs what it says and no other plugin of the environment.
        env[options.allowed] = ",".join(plugins) or options.nothing
        return env

    @property
    def _options(self) -> _Options:
        return _SGLANG if self.engine_name == "sglang" else _VLLM


def serve_all(
    specs: Sequence[ServerSpec], *, timeout: float = READY_TIMEOUT
) -> contextlib.AbstractContextManager[list[ServerClient]]:
    """:func:`dflash_plugin.backends.process.serve_all`, in containers where the cell says so."""
    return process.serve_all(specs, timeout=timeout, server=_server)


def _server(spec: ServerSpec, port: int) -> Server:
    if spec.environment.container is None:
        return Server(spec, port)
    from .containers import ContainerServer

    return ContainerServer(spec, port, spec.environment.container)


@contextlib.contextmanager
def serve(spec: ServerSpec, *, timeout: float = READY_TIMEOUT) -> Iterator[ServerClient]:
    """Start one server, wait until it is ready, stop it in every case."""
    with serve_all([spec], timeout=timeout) as clients:
        yield clients[0]


def installed(environment: Environment, engine: str) -> engines.Installed:
    """The engine as the environment's own interpreter sees it."""
    return installed_at(environment.python, engine)
