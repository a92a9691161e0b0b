"""Entry points ``sglang.srt.plugins`` and ``sglang.srt.platforms``.

Called in every process of a server. They must cost next to nothing and never break the
engine: whatever goes wrong here, SGLang runs as if the package were not installed.
"""

from __future__ import annotations

import logging
import os

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

        engine = engines.find("sglang")
        if engine is None:
            return
        platform = "cpu" if _cpu_wanted() else engine.platform
        decision = support.decide("sglang", engine.version, platform)
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

        engine = engines.find("sglang")
        if engine is None or not _cpu_wanted():
            return None
        decision = support.decide("sglang", engine.version, "cpu")
        if not decision.usable:
            log.warning("dflash-plugin: %s", decision.line())
            return None
    except Exception:  # as above
        log.exception("dflash-plugin: no platform for CPUs; SGLang runs as published")
        return None
    return "dflash_plugin.shims.sglang_platform:CpuPlatform"


def _cpu_wanted() -> bool:
    from .support_sglang import PLATFORM

    selected = os.environ.get("SGLANG_PLATFORM")
    if selected:
        return selected == PLATFORM
    return os.environ.get("SGLANG_USE_CPU_ENGINE") != "1" and not _accelerator()


def _accelerator() -> bool:
    """Whether torch finds a device other than the CPU."""
    import torch

    kinds = ("cuda", "xpu", "npu", "hpu", "musa", "mps")
    devices = [getattr(torch, kind, None) for kind in (*kinds, "accelerator")]
    return any(device is not None and device.is_available() for device in devices)
