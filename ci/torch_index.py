"""Where torch comes from: PyTorch's own index of CPU builds, or what pip is configured with."""

from __future__ import annotations

import http.client
import os
import sys
import threading
import urllib.request

from .installer import Pip

INDEX = "https://download.pytorch.org/whl/cpu"
PROBE_SECONDS = 3.0


def reachable(index: str, timeout: float = PROBE_SECONDS) -> bool:
    """Whether ``<index>/torch/`` answers a HEAD request within ``timeout`` seconds."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            request = urllib.request.Request(f"{index.rstrip('/')}/torch/", method="HEAD")
            with urllib.request.urlopen(request, timeout=timeout):
                answers.append(True)
        except (OSError, ValueError, http.client.HTTPException):
            answers.append(False)

    # In a thread, because the look-up of a host name knows no time-out.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(timeout)
    return bool(answers and answers[0])


def torch_index(default: str = INDEX) -> str | None:
    """The index of CPU builds to use, or None for pip's own.

    ``DFLASH_TORCH_INDEX`` decides (an address, or ``none``); then a pip that may not use any
    index; then whether ``default`` answers.
    """
    setting = os.environ.get("DFLASH_TORCH_INDEX", "")
    if setting:
        return None if setting.lower() == "none" else setting
    if os.environ.get("PIP_NO_INDEX", "0").lower() not in ("", "0", "false", "no", "off"):
        return None
    return default if reachable(default) else None


def install_torch(version: str, pip: Pip) -> None:
    """Install torch and what it depends on; the CPU build where it can be had."""
    index = torch_index()
    if index is None:
        pip.progress.note(
            f"no index of CPU builds ({INDEX}) can be reached: torch=={version} comes from pip's "
            "own index or folder; PyPI's Linux build is for CUDA, several GB, and runs on a CPU too"
        )
    _install("torch", version, index, pip)


def install_torchvision(version: str, pip: Pip) -> None:
    """Install torchvision alone, from where the torch below comes from: they must be one build."""
    _install("torchvision", version, torch_index(), pip, "--no-deps")


def _install(name: str, version: str, index: str | None, pip: Pip, *options: str) -> None:
    if index is None:
        pip.install(*options, f"{name}=={version}")
        return
    # Only that index has +cpu versions, so it may be an extra: a mirror set up in pip's
    # configuration stays in use for the rest. macOS has one build, with no suffix.
    local = "+cpu" if sys.platform.startswith("linux") else ""
    pip.install(*options, f"{name}=={version}{local}", "--extra-index-url", index)
