"""SGLang must not run DFlash on a CPU with some of the repairs only.

Each is needed there: without one the server dies late, or drafts in silence what the
target refuses. What is not as known ends the start, before the weights are loaded where
the release asks the platform, else before the draft's are.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from .. import engines, support
from ..errors import UnsupportedEngineError
from . import Shim, applied, load
from .sources import differences, installed


def _needed() -> list[Shim]:
    """Of the release as published: some or all may be in its files, and are looked for alike."""
    engine = engines.find("sglang")
    if engine is None:
        return []
    return [load(name) for name in support.decide("sglang", engine.base_version, "cpu").shims]


def unknown() -> list[str]:
    """What is not the source that a repair was written for; without importing it."""
    engine = engines.find("sglang")
    if engine is None or engine.location is None:
        return ["no sglang distribution found"]
    read = installed(Path(engine.location))
    return [line for shim in _needed() for line in differences(shim, read)]


def not_applied() -> list[str]:
    """Repairs that are not in place though their module is there."""
    found = []
    for shim in _needed():
        module = sys.modules.get(shim.module)
        if shim is not SHIM and module is not None and not applied(shim, module):
            found.append(shim.name)
    return found


def apply(module: Any) -> str:
    """Have the worker look before it builds the draft."""
    published = module.DFlashWorkerV2.__init__

    def __init__(self: Any, *args: Any, **options: Any) -> None:  # noqa: N807
        missing = not_applied()
        if missing:
            raise UnsupportedEngineError(
                f"dflash-plugin: not applied to this SGLang: {', '.join(missing)}; DFlash does "
                "not work on a CPU without",
                hint="see the log above for what was found there; update dflash-plugin, reinstall "
                "the engine if its files were edited, or name `dflash` in SGLANG_PLUGINS: without "
                "it only an engine patched with `all` has every repair",
            )
        published(self, *args, **options)

    module.DFlashWorkerV2.__init__ = __init__
    return "the worker starts with every repair or not at all"


SHIM = Shim(
    name="sglang-cpu-guard",
    symptom="with a repair that could not be applied, the server dies late or drafts nonsense",
    mechanism="the draft worker asks for all of them first",
    removal="with the last of the CPU repairs",
    module="sglang.srt.speculative.dflash_worker_v2",
    fingerprints={
        "DFlashWorkerV2.__init__": frozenset(
            {
                "4c2279ef51b6a926",  # 0.5.18
                "83fc024aab0a92fc",  # 0.5.19
                "a89dfc7242e4cda5",  # 0.5.20
                "9cb2c08f5e725bd1",  # 0.5.21
                "3938a2e1d63d2456",  # 0.5.22
                "6d5df96aa4a865c5",  # 0.5.23
            }
        ),
    },
    apply=apply,
)
