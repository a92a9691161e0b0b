"""Entry points ``sglang.srt.plugins`` and ``sglang.srt.platforms``.

Called in every process of a server. They must cost next to nothing and never break the
engine: whatever goes wrong here, SGLang runs as if the package were not installed.
"""

from __future__ import annotations

import logging
from dataclasses import replace

_ANNOUNCED = "DFLASH_PLUGIN_ANNOUNCED_SGLANG"
_registered = False


def register() -> None:
    """General plugin: apply what :mod:`dflash_plugin.support` decides; idempotent."""
    global _registered  # noqa: PLW0603
    if _registered:
        return
    _registered = True
    # A child of "sglang", so that the engine's own handlers print it.
    log = logging.getLogger("sglang.dflash_plugin")
    try:
        from . import engines, support
        from .shims import sglang_device

        engine = engines.find("sglang")
        if engine is None:
            return
        if engine.half_patched:
            log.warning("dflash-plugin: %s", engines.HALF_PATCHED)
        decision = support.decide_for(replace(engine, platform=sglang_device.platform(engine)))
        engines.announce(log, decision.line(), _ANNOUNCED)
        if decision.shims:
            from . import shims

            shims.install(decision.shims, log)
    except Exception:  # the engine must start whatever is wrong with this package
        log.exception("dflash-plugin: not active; SGLang runs as published")


def activate() -> str | None:
    """Platform plugin: the class for CPUs, or None, which SGLang takes for "not here".

    It is for machines without an accelerator, and for any machine where ``SGLANG_PLATFORM``
    names it; never where ``SGLANG_USE_CPU_ENGINE`` asks for SGLang's own.
    """
    log = logging.getLogger("sglang.dflash_plugin")
    try:
        from . import engines, support
        from .shims import sglang_device

        engine = engines.find("sglang")
        if engine is None or not sglang_device.cpu_wanted():
            return None
        decision = support.decide_for(replace(engine, platform="cpu"))
        if not decision.usable:
            log.warning("dflash-plugin: %s", decision.line())
            return None
    except Exception:  # as above
        log.exception("dflash-plugin: no platform for CPUs; SGLang runs as published")
        return None
    return "dflash_plugin.shims.sglang_platform:CpuPlatform"
