"""Which platform a process of SGLang runs on: one wheel of it serves all."""

from __future__ import annotations

import os

from ..engines import Installed
from ..support_sglang import PLATFORM


def platform(engine: Installed) -> str:
    """``cpu`` where the plugin's platform is used, else what the machine looks like."""
    return "cpu" if cpu_wanted() else engine.platform


def cpu_wanted() -> bool:
    """Whether the plugin's platform is the one to use: see ``sglang_entry.activate``."""
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
