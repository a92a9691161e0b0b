"""Entry point ``vllm.general_plugins``: called in every vLLM process.

It must cost next to nothing and never break the engine: whatever goes wrong
here, vLLM runs as if the package were not installed, and one log line says so.
"""

from __future__ import annotations

import logging

_ANNOUNCED = "DFLASH_PLUGIN_ANNOUNCED"
_registered = False


def register() -> None:
    """Apply what :mod:`dflash_plugin.support` decides; idempotent, never raises."""
    global _registered  # noqa: PLW0603
    if _registered:
        return
    _registered = True
    # A child of "vllm", so that the engine's own handlers print it.
    log = logging.getLogger("vllm.plugins.dflash")
    try:
        from . import engines, support

        engine = engines.find("vllm")
        if engine is None:
            log.warning("dflash-plugin: no vLLM distribution found; nothing done")
            return
        if engine.half_patched:
            log.warning("dflash-plugin: %s", engines.HALF_PATCHED)
        decision = support.decide_for(engine)
        engines.announce(log, decision.line(), _ANNOUNCED)
        if decision.shims:
            from . import shims

            shims.install(decision.shims, log)
    except Exception:  # the engine must start whatever is wrong with this package
        log.exception(
            "dflash-plugin: not active because of the error below; vLLM runs as published"
        )
