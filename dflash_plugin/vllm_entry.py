"""Entry point ``vllm.general_plugins``: called in every vLLM process.

It must cost next to nothing and never break the engine: whatever goes wrong
here, vLLM runs as if the package were not installed, and one log line says so.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys

_ANNOUNCED = "DFLASH_PLUGIN_ANNOUNCED"
_registered = False


def register() -> None:
    """Apply what :mod:`dflash_plugin.support` decides; idempotent, never raises."""
    global _registered  # noqa: PLW0603
    if _registered:
        return
    _registered = True
    log = _logger()
    try:
        from . import engines, support

        engine = engines.find("vllm")
        if engine is None:
            log.warning("dflash-plugin: no vLLM distribution found; nothing done")
            return
        decision = support.decide("vllm", engine.version, engine.platform)
        # One line per server, not one per process: the API server comes first, and
        # the engine and worker processes inherit its environment.
        level = logging.DEBUG if os.environ.get(_ANNOUNCED) else logging.INFO
        os.environ[_ANNOUNCED] = str(os.getpid())
        log.log(level, "dflash-plugin: %s", decision.line())
        if decision.shims:
            from . import shims

            shims.install(decision.shims, log)
    except Exception:  # the engine must start whatever is wrong with this package
        log.exception(
            "dflash-plugin: not active because of the error below; vLLM runs as published"
        )


def _logger() -> logging.Logger:
    """A child of vLLM's logger, so that the engine's own handlers print it.

    The first process loads plugins before anything has imported ``vllm.logger``, which
    is what gives the "vllm" logger its handler and level.
    """
    if "vllm" in sys.modules:
        with contextlib.suppress(Exception):
            import vllm.logger  # noqa: F401
    return logging.getLogger("vllm.plugins.dflash")
