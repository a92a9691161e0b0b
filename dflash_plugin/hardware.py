"""What this machine computes with, in words that name it in results."""

from __future__ import annotations

import os
import platform
import subprocess
from pathlib import Path


def cpu_model() -> str:
    """The processor's name and the instruction sets that matter here."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    flags = next((line.split() for line in lines if line.startswith("flags")), [])
    known = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f in flags]
    return f"{names[0] if names else 'unknown'} ({' '.join(known)})"


def gpus() -> list[str]:
    """Names of the NVIDIA GPUs, as their driver tells them; none where there is no driver."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        told = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.strip() for line in told.stdout.splitlines() if line.strip()]


def describe(*, cpu: bool = False) -> str:
    """The GPUs, or else (or where ``cpu``) the processor and its cores."""
    found = [] if cpu else gpus()
    if found:
        return ", ".join(f"{found.count(name)}x {name}" for name in dict.fromkeys(found))
    return f"{cpu_model()}, {os.cpu_count()} cores"
