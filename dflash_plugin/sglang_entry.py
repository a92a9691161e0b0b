"""Entry points ``sglang.srt.plugins`` and ``sglang.srt.platforms``.

SGLang is not covered yet: both entry points leave the engine as published and
say so once. They exist so that installing the package beside SGLang is safe.
"""

from __future__ import annotations

import logging
import os

_ANNOUNCED = "DFLASH_PLUGIN_ANNOUNCED_SGLANG"


def register() -> None:
    """General plugin: changes nothing; one log line gives the decision."""
    log = logging.getLogger("sglang.dflash_plugin")
    try:
        from . import engines, support

        engine = engines.find("sglang")
        if engine is None or os.environ.get(_ANNOUNCED):
            return
        os.environ[_ANNOUNCED] = str(os.getpid())
        log.info(
            "dflash-plugin: %s",
            support.decide_for(engine).line(),
        )
    except Exception:  # the engine must start whatever is wrong with this package
        log.exception("dflash-plugin: not active; SGLang runs as published")


def activate() -> str | None:
    """Platform plugin: None means "not this platform", which SGLang skips silently."""
    return None
